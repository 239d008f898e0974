"""DeepEP's Buffer on CPU ranks, against the oracle."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_ep_steps import Program, all_forms, dropped, parts, refused, sizes, two_batches
from ranks import Ctx, run_ranks
from test_docs import run_program

from moe_a2a import ConfigError, HandleError, InputError, Options
from moe_a2a.compat import deep_ep
from moe_a2a.compat.deep_ep import Buffer, EventHandle, EventOverlap
from moe_a2a.gpu.layout import Layout

EXAMPLE = Path(__file__).parents[1] / "examples" / "deep_ep_program.py"


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_form_and_every_way_to_wait_matches_the_oracle(ranks: int) -> None:
    run_ranks(all_forms, ranks)


def test_two_batches_take_turns_in_one_buffer() -> None:
    run_ranks(two_batches, 2)


def test_steps_that_are_not_combined_make_room_for_later_ones() -> None:
    run_ranks(dropped, 2)


def test_handles_results_and_statistics_are_deep_eps() -> None:
    run_ranks(parts, 2)


def test_sizes_may_change_and_buffers_are_many() -> None:
    run_ranks(sizes, 2)


def _bad_input(ctx: Ctx) -> None:
    program = Program(ctx)
    buffer = program.buffer
    inputs = program.inputs(0, [6, 2])
    mine = inputs[ctx.rank]
    x, ids, weights = mine.x, mine.topk_ids, mine.topk_weights

    def dispatch(x: Any = x, ids: Any = ids, most: int = 6, experts: int = 8, **options: Any) -> str:
        return refused(InputError, lambda: buffer.low_latency_dispatch(x, ids, most, experts, **options))

    program.step(0, [6, 2])
    assert "x has dtype torch.float32; give torch.bfloat16" in dispatch(x.float())
    assert "topk_idx has dtype torch.int32; give torch.int64" in dispatch(ids=ids.int())
    assert "topk_idx is not a tensor with two dimensions" in dispatch(ids=ids[0])
    assert "x is not a tensor" in dispatch(x.tolist())
    assert "use_nvfp4 and x_global_scale are not served" in dispatch(use_nvfp4=True)
    assert "give round_scale=True with it" in dispatch(use_ue8m0=True)
    assert "cannot both be set" in dispatch(async_finish=True, return_recv_hook=True)
    assert "max_tokens_per_rank=6, but this call brings 7 tokens" in dispatch(
        torch.zeros(7, 256, dtype=torch.bfloat16), torch.zeros(7, 3, dtype=torch.int64)
    )
    assert "allowed are 0 to 7, and -1" in dispatch(ids=torch.full_like(ids, 8))
    for name, wrong in (
        ("cumulative_local_expert_recv_stats", torch.zeros(8, dtype=torch.int32)),
        ("dispatch_wait_recv_cost_stats", torch.zeros(2, 2, dtype=torch.int64)),
    ):
        assert f"{name} is {wrong.dtype} {list(wrong.shape)}" in dispatch(**{name: wrong})
    assert "num_experts=9 does not divide by 2 ranks" in refused(
        ConfigError, lambda: buffer.low_latency_dispatch(x, ids, 6, 9)
    )
    program.step(1, [6, 2])

    got = program.dispatch(inputs, end="hook")
    y = program.outputs(0)[ctx.rank]

    def combine(y: Any = y, ids: Any = ids, weights: Any = weights, handle: Any = got.handle, **options: Any) -> str:
        error = options.pop("error", InputError)
        return refused(error, lambda: buffer.low_latency_combine(y, ids, weights, handle, **options))

    assert "sent, not received" in combine(error=HandleError)
    got.finish()
    assert "is received, not combined; this call needs a step that is sent" in refused(HandleError, got.finish)
    assert "x is torch.float32" in combine(y.float())
    assert "topk_idx is torch.int64 [1, 3]" in combine(ids=ids[:1])
    assert "topk_weights is torch.float64" in combine(weights=weights.double())
    assert "router weights must be finite" in combine(weights=torch.full_like(weights, float("nan")))
    assert "out is torch.bfloat16 [1, 256]" in combine(out=torch.zeros(1, 256, dtype=torch.bfloat16))
    assert "which was never asked for" in combine(zero_copy=True)
    assert "overlap and src_signals are not served" in combine(overlap=True)
    assert "combine_wait_recv_cost_stats is a list" in combine(combine_wait_recv_cost_stats=[0, 0])
    assert "not the tuple of five" in combine(handle=None, error=HandleError)
    assert "no open step has this handle" in combine(handle=(*_copies(got.handle[:2]), 6, 256, 8), error=HandleError)
    got.combine(0)
    assert "enable_shrink=True" in refused(HandleError, buffer.low_latency_clean_mask_buffer)
    buffer.destroy()
    with pytest.raises(HandleError, match="low_latency_mode=False"):
        Buffer(buffer.group, device="cpu").low_latency_dispatch(x, ids, 6, 8)
    with pytest.raises(ConfigError, match="enable_shrink=True needs GPU ranks"):
        Buffer(buffer.group, low_latency_mode=True, enable_shrink=True, device="cpu")


def _copies(tensors: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_ranks(_bad_input, 2)


def test_a_buffer_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="mpi4py communicator cannot be used"):
        Buffer(None, comm=object())
    with pytest.raises(ConfigError, match="group is None"):
        Buffer(None)


def test_the_size_hint_is_what_gpu_ranks_allocate() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    real = Layout(8, 256, 7168, 8, 128, 2).region_bytes
    assert hint % (2 << 20) == 0
    assert real <= hint < 1.02 * real + (2 << 20)


def test_statics_and_events_are_there() -> None:
    assert Buffer.is_sm90_compiled() is True
    assert deep_ep.topk_idx_t == torch.int64
    before = Buffer.num_sms
    Buffer.set_num_sms(before + 4)
    assert Buffer.num_sms == before + 4
    Buffer.set_num_sms(before)
    with pytest.raises(AssertionError, match="even"):
        Buffer.set_num_sms(3)
    calls: list[int] = []
    event = Buffer.capture()
    event.register_hook_after_wait(lambda: calls.append(1))
    with event(release_handle=True):
        assert calls == []
    assert calls == [1] and event.event is None
    EventOverlap(EventHandle()).current_stream_wait()
    with pytest.raises(AssertionError, match="not asynchronous"):
        EventOverlap().current_stream_wait()


def test_the_parameters_are_those_of_deep_ep_1_2_1() -> None:
    """Names, order and defaults, so that positional calls mean the same."""
    signatures = {
        "__init__": "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False num_qps_per_rank=24 "
        "allow_nvlink_for_low_latency_mode=True allow_mnnvl=False use_fabric=None explicitly_destroy=False "
        "enable_shrink=False comm=None",
        "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts "
        "cumulative_local_expert_recv_stats=None dispatch_wait_recv_cost_stats=None x_global_scale=None use_fp8=True "
        "round_scale=False use_ue8m0=False use_nvfp4=False async_finish=False return_recv_hook=False",
        "low_latency_combine": "x topk_idx topk_weights handle use_logfmt=False zero_copy=False async_finish=False "
        "return_recv_hook=False out=None combine_wait_recv_cost_stats=None overlap=False src_signals=None "
        "src_signal_expect_value=0",
        "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank hidden num_experts",
        "get_next_low_latency_combine_buffer": "handle",
        "low_latency_update_mask_buffer": "rank_to_mask mask=False",
        "low_latency_query_mask_buffer": "mask_status",
        "low_latency_clean_mask_buffer": "",
        "destroy": "",
    }
    for name, text in signatures.items():
        found = [
            p.name if p.default is p.empty else f"{p.name}={p.default}"
            for p in inspect.signature(getattr(Buffer, name)).parameters.values()
            if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert " ".join(found) == text, name


def run_example(ctx: Ctx, source: str) -> None:
    """Run the example as torchrun would have started it."""
    run_program(ctx, source, "deep_ep_program.py")


def test_a_program_for_deep_ep_runs_by_changing_its_import() -> None:
    source = EXAMPLE.read_text()
    ours = "from moe_a2a.compat.deep_ep import Buffer\n"
    assert source.count("moe_a2a") == source.count(ours) == 1
    run_ranks(run_example, 2, source)


def _options_reach_the_core(ctx: Ctx) -> None:
    program = Program(ctx, options=Options(timeout_s=7.5, host=f"host-{ctx.rank}"))
    program.step(0, [4, 5], "fp8", "hook")
    (steps,) = program.buffer._low_latency._all.values()
    assert steps.a2a.options.timeout_s == 7.5 and steps.a2a.hosts == ((0,), (1,))
    program.buffer.destroy()


def test_options_of_the_core_can_be_given() -> None:
    pytest.importorskip("mooncake.engine", reason="needs the Transfer Engine")
    run_ranks(_options_reach_the_core, 2)
