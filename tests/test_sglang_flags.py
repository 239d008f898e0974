"""Token limits and refused flags of the SGLang plug-in, on plain values: SGLang itself is not needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_a2a.sglang_plugin import flags, limits, versions
from moe_a2a.sglang_plugin.flags import ModelSizes
from moe_a2a.sglang_plugin.limits import FlagError, Limits, limits_from_server_args

DEEPSEEK_V3 = ModelSizes(experts=256, hidden=7168, top_k=8)


def graphs(max_bs: int | None = 256, prefill: str = "disabled") -> SimpleNamespace:
    return SimpleNamespace(decode=SimpleNamespace(max_bs=max_bs), prefill=SimpleNamespace(backend=prefill))


def arguments(**changes: Any) -> SimpleNamespace:
    """Eight ranks of DP attention, as SGLang has resolved them: chunks are those of one rank already."""
    fields: dict[str, Any] = {
        "tp_size": 8,
        "dp_size": 8,
        "pp_size": 1,
        "ep_size": 8,
        "nnodes": 1,
        "enable_dp_attention": True,
        "deepep_mode": "auto",
        "chunked_prefill_size": 1024,
        "max_prefill_tokens": 16384,
        "max_running_requests": 1024,
        "enable_mixed_chunk": False,
        "enable_dynamic_chunking": False,
        "enable_two_batch_overlap": False,
        "speculative_algorithm": None,
        "speculative_num_draft_tokens": None,
        "speculative_eagle_topk": None,
        "speculative_num_steps": None,
        "enable_multi_layer_eagle": False,
        "cuda_graph_config": graphs(),
        "ep_num_redundant_experts": 0,
        "elastic_ep_backend": None,
        "mooncake_ib_device": None,
        "device": "cuda",
        "use_ray": False,
    }
    return SimpleNamespace(**fields | changes)


def tokens(**changes: Any) -> tuple[int, int]:
    got = limits_from_server_args(arguments(**changes))
    return got.max_tokens_per_rank_decode, got.max_tokens_per_rank_prefill


def test_a_rank_decodes_its_share_of_the_requests_and_prefills_a_chunk() -> None:
    assert tokens() == (128, 1024)


def test_a_step_in_which_others_prefill_holds_a_whole_decode_batch() -> None:
    assert tokens(chunked_prefill_size=64) == (128, 128)


def test_decode_tokens_are_added_to_mixed_chunks() -> None:
    assert tokens(enable_mixed_chunk=True) == (128, 1024 + 128)


def test_low_latency_mode_prefills_with_masked_rows() -> None:
    assert tokens(deepep_mode="low_latency") == (1024, 1024)


def test_draft_tokens_multiply_the_requests() -> None:
    speculative = {"speculative_algorithm": "EAGLE", "speculative_num_draft_tokens": 4, "speculative_eagle_topk": 1}
    assert tokens(**speculative) == (512, 1024)
    args = arguments(**speculative)
    assert limits_from_server_args(args, draft_tokens=6).max_tokens_per_rank_decode == 768


def test_ranks_that_share_an_attention_share_its_tokens() -> None:
    assert tokens(dp_size=2, max_running_requests=512) == (256 // 4, 1024 // 4)
    assert tokens(dp_size=1, enable_dp_attention=False, max_running_requests=160) == (24, 128)


def test_the_width_of_attention_has_a_name_of_its_own_since_0_5_23() -> None:
    assert tokens(dp_size=1, enable_dp_attention=False, attn_dp_size=8) == (128, 1024)


def test_replicas_of_a_server_do_not_share_requests() -> None:
    """--dp-size without DP attention: whole servers side by side, each with all requests for itself."""
    assert tokens(dp_size=8, enable_dp_attention=False, tp_size=1, max_running_requests=96) == (96, 1024)


def test_without_a_flag_the_decode_graphs_say_how_many_requests() -> None:
    assert tokens(max_running_requests=None, cuda_graph_config=graphs(48)) == (48, 1024)
    assert tokens(max_running_requests=None, cuda_graph_config=graphs(None))[0] == limits.DEFAULT_RUNNING_REQUESTS
    assert tokens(max_running_requests=None, cuda_graph_config=None)[0] == limits.DEFAULT_RUNNING_REQUESTS


def test_chunks_that_grow_are_counted_at_their_largest() -> None:
    assert tokens(pp_size=2, enable_dynamic_chunking=True) == (128, 16384)


def test_two_batch_overlap_has_two_channels() -> None:
    assert limits_from_server_args(arguments()).channels == ("0",)
    assert limits_from_server_args(arguments(enable_two_batch_overlap=True)).channels == ("0", "1")


@pytest.mark.parametrize("chunk", [-1, 0, None])
def test_without_chunked_prefill_there_is_no_limit(chunk: int | None) -> None:
    with pytest.raises(FlagError, match=rf"--chunked-prefill-size {chunk}: .* give a size above 0"):
        tokens(chunked_prefill_size=chunk)


def test_limits_are_those_that_were_set() -> None:
    before = limits._current
    try:
        limits._current = None
        with pytest.raises(FlagError, match=r"limits\.use"):
            limits.current()
        limits.use(Limits(8, 64))
        assert limits.current() == Limits(8, 64, ("0",))
    finally:
        limits._current = before


@pytest.mark.parametrize("version", ["0.5.17", "0.5.20", "0.5.23", "0.5.17.post1", "0.5.23+cu130"])
def test_versions_in_the_range(version: str) -> None:
    assert versions.supported(version)


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0", "0.0.0.dev0", "main"])
def test_versions_out_of_the_range(version: str) -> None:
    assert not versions.supported(version)


def refused(match: str, **changes: Any) -> None:
    with pytest.raises(FlagError, match=match):
        flags.check_request(arguments(**changes))


def test_flags_that_are_right_pass() -> None:
    flags.check_request(arguments())
    flags.check_request(arguments(elastic_ep_backend="none"))
    flags.check_request(arguments(nnodes=2, pp_size=2))
    flags.check_resolved(arguments(), limits_from_server_args(arguments()), DEEPSEEK_V3)


def test_elastic_ep_is_refused() -> None:
    refused(
        r"--elastic-ep-backend mooncake .* use --elastic-ep-backend none, .*MOE_A2A_SGLANG=0",
        elastic_ep_backend="mooncake",
    )
    refused(r"--elastic-ep-backend nixl", elastic_ep_backend="nixl")


def test_amd_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.2", raising=False)
    refused(r"AMD GPU \(ROCm 7\.2\).* use --moe-a2a-backend mori")
    refused(r"AMD GPU", device=None)
    flags.check_request(arguments(device="cpu"))


def test_experts_on_several_hosts_are_refused() -> None:
    refused(r"--nnodes 2 with --pp-size 1 .* use --nnodes 1", nnodes=2)
    refused(r"--nnodes 4 with --pp-size 2 .* use --nnodes 2", nnodes=4, pp_size=2)


def test_ray_is_refused() -> None:
    refused(r"--use-ray .* leave --use-ray out", use_ray=True)


def test_ib_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flags, "INFINIBAND", tmp_path / "absent")
    refused(
        r"--mooncake-ib-device mlx5_0: mlx5_0 not found .*there is no such device.* leave the flag out",
        mooncake_ib_device="mlx5_0",
    )
    (tmp_path / "there" / "mlx5_1").mkdir(parents=True)
    monkeypatch.setattr(flags, "INFINIBAND", tmp_path / "there")
    flags.check_request(arguments(mooncake_ib_device="mlx5_1"))
    refused(r"mlx5_7 not found .*there are mlx5_1", mooncake_ib_device="mlx5_1, mlx5_7")


def test_ib_devices_have_three_spellings(tmp_path: Path) -> None:
    assert flags.ib_device_names("mlx5_0, mlx5_1") == ["mlx5_0", "mlx5_1"]
    by_gpu = '{"0": "mlx5_0,mlx5_1", "1": "mlx5_2"}'
    assert flags.ib_device_names(by_gpu) == ["mlx5_0", "mlx5_1", "mlx5_2"]
    (tmp_path / "map.json").write_text(by_gpu)
    assert flags.ib_device_names(str(tmp_path / "map.json")) == ["mlx5_0", "mlx5_1", "mlx5_2"]


def refused_later(match: str, sizes: ModelSizes = DEEPSEEK_V3, **changes: Any) -> None:
    args = arguments(**changes)
    with pytest.raises(FlagError, match=match):
        flags.check_resolved(args, limits_from_server_args(args), sizes)


def test_ranks_that_do_not_divide_the_experts_are_refused() -> None:
    sizes = ModelSizes(experts=60, hidden=2048, top_k=4)
    refused_later(r"--ep-size 8 .* 60 experts \+ 0 .* use --ep-num-redundant-experts 4", sizes)
    args = arguments(ep_num_redundant_experts=4)
    flags.check_resolved(args, limits_from_server_args(args), sizes)


def test_more_experts_than_fit_are_refused() -> None:
    refused_later(r"--ep-num-redundant-experts 800 makes 1056 experts; at most 1024", ep_num_redundant_experts=800)


def test_models_that_do_not_fit_are_refused() -> None:
    refused_later(r"hidden size 2880 is not a multiple of 128", ModelSizes(32, 2880, 4))
    refused_later(r"40 experts per token, at most 32", ModelSizes(64, 2048, 40))


def test_a_model_without_experts_in_its_configuration_is_left_to_sglang() -> None:
    flags.check_resolved(arguments(), limits_from_server_args(arguments()), ModelSizes(None, None, None))


def test_masked_rows_that_do_not_fit_are_refused() -> None:
    refused_later(
        r"low_latency with --chunked-prefill-size 8192 .* 56\.0 GiB .* at most 16 GiB .* use --deepep-mode auto",
        deepep_mode="low_latency",
        chunked_prefill_size=8192,
    )
    refused_later(r"--max-running-requests 32768: 4096 tokens per rank .* use fewer", max_running_requests=32768)
    args = arguments(deepep_mode="normal", max_running_requests=32768)
    flags.check_resolved(args, limits_from_server_args(args), DEEPSEEK_V3)


def test_whole_prefill_steps_in_a_graph_are_refused() -> None:
    refused_later(
        r"--cuda-graph-backend-prefill full .* use --cuda-graph-backend-prefill disabled",
        cuda_graph_config=graphs(prefill="full"),
    )
    args = arguments(deepep_mode="low_latency", cuda_graph_config=graphs(prefill="full"))
    flags.check_resolved(args, limits_from_server_args(args), DEEPSEEK_V3)


@pytest.mark.parametrize("name", ["n_routed_experts", "num_experts", "num_local_experts"])
def test_sizes_are_read_from_the_models_configuration(name: str) -> None:
    config = SimpleNamespace(**{name: 64}, hidden_size=2048, num_experts_per_tok=6)
    assert ModelSizes.of(SimpleNamespace(hf_text_config=config)) == ModelSizes(64, 2048, 6)
