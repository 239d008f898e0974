"""The plug-in in SGLang's own framework and argument resolution: active when asked for, and otherwise not there.

Each test forks: what a plug-in patches stays patched.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import operators
import sglang
from servers import FLAGS, MOONCAKE, Failed, in_child, is_active, load_plugins, resolve
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins.hook_registry import HookRegistry

from moe_a2a.errors import RankLost
from moe_a2a.sglang_plugin import adapter, limits
from moe_a2a.sglang_plugin.limits import FlagError

ROOT = Path(__file__).resolve().parents[2]


def decided(*flags: str) -> dict[str, Any]:
    """What the flags resolve to."""
    args = adapter.view(resolve(*flags))
    names = ["moe_a2a_backend", "deepep_mode", "ep_size", "max_running_requests", "elastic_ep_backend"]
    graphs = args.cuda_graph_config
    return {name: getattr(args, name) for name in names} | {"graphs": (graphs.decode.backend, graphs.prefill.backend)}


def with_plugin(*flags: str) -> dict[str, Any]:
    load_plugins()
    return decided(*flags)


@pytest.mark.parametrize("mode", ["auto", "low_latency"])
def test_decode_has_graphs(mode: str) -> None:
    got = in_child(with_plugin, *MOONCAKE, "--deepep-mode", mode)
    assert got["moe_a2a_backend"] == "mooncake" and got["deepep_mode"] == mode and got["ep_size"] == 2
    assert got["graphs"][0] == "full"


def test_normal_mode_has_none() -> None:
    got = in_child(with_plugin, *MOONCAKE, "--deepep-mode", "normal")
    assert got["deepep_mode"] == "normal" and got["graphs"] == ("disabled", "disabled")


def test_requests_are_limited_to_the_decode_graphs_unless_a_flag_says_more() -> None:
    assert in_child(with_plugin, *MOONCAKE, "--cuda-graph-max-bs-decode", "48")["max_running_requests"] == 96
    flags = ["--cuda-graph-max-bs-decode", "48", "--max-running-requests", "400"]
    assert in_child(with_plugin, *MOONCAKE, *flags)["max_running_requests"] == 400


def test_the_word_none_is_no_elastic_backend() -> None:
    assert in_child(with_plugin, *MOONCAKE, "--elastic-ep-backend", "none")["elastic_ep_backend"] is None


def test_a_server_that_does_not_ask_is_left_alone() -> None:
    flags = ["--moe-a2a-backend", "deepep", "--elastic-ep-backend", "none"]

    def child() -> tuple[dict[str, Any], list[str]]:
        got = with_plugin(*flags)
        scheduler(*flags)
        assert not is_active()
        return got, [name for name in sys.modules if name.startswith("moe_a2a.sglang_plugin.a")]

    got, modules = in_child(child)
    assert got == in_child(decided, *flags)
    assert set(modules) <= {"moe_a2a.sglang_plugin.adapter"}  # of this test


def test_the_switch_leaves_sglang_as_it_was() -> None:
    def child() -> None:
        os.environ["MOE_A2A_SGLANG"] = "0"
        got = with_plugin(*MOONCAKE)
        assert got["max_running_requests"] is None
        assert not HookRegistry._hooks
        scheduler(*MOONCAKE)
        assert not is_active()

    in_child(child)


# Failures must stop the server, although SGLang swallows those of plug-ins.


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.0.0.dev0"])
def test_an_unknown_version_stops_a_server_that_asks(version: str) -> None:
    def child(*flags: str) -> None:
        with mock.patch.object(sglang, "__version__", version):
            with_plugin(*flags)

    with pytest.raises(
        Failed, match=rf"FlagError: SGLang {version} .* SGLang 0\.5\.17 to 0\.5\.23; .*MOE_A2A_SGLANG=0"
    ):
        in_child(child, *MOONCAKE)
    in_child(child)


def test_a_broken_package_stops_a_server_that_asks() -> None:
    def child(*flags: str) -> None:
        with mock.patch.dict(sys.modules, {"moe_a2a.sglang_plugin.arguments": None}):
            with_plugin(*flags)

    with pytest.raises(Failed, match=r"ModuleNotFoundError: .*moe_a2a\.sglang_plugin\.arguments"):
        in_child(child, *MOONCAKE)
    in_child(child)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--elastic-ep-backend", "mooncake"], r"--elastic-ep-backend mooncake .*does not serve elastic EP yet"),
        (["--chunked-prefill-size", "-1"], r"--chunked-prefill-size -1.*give a size above 0"),
        (["--mooncake-ib-device", "mlx5_99"], r"--mooncake-ib-device mlx5_99: mlx5_99 not found"),
        (["--ep-num-redundant-experts", "1"], r"--ep-size 2 .* 16 experts \+ 1 .* --ep-num-redundant-experts 2"),
        (["--nnodes", "2", "--dist-init-addr", "127.0.0.1:1"], r"--nnodes 2 .* use --nnodes 1"),
    ],
)
def test_flags_that_cannot_work_stop_a_server(flags: list[str], message: str) -> None:
    with pytest.raises(Failed, match=rf"FlagError: .*{message}"):
        in_child(with_plugin, *MOONCAKE, *flags)


# The scheduler process.


def scheduler(*flags: str, args: Any = None) -> None:
    """A Scheduler as SGLang makes it in a process of its own, up to what our hook precedes."""
    import pickle

    server_args = pickle.loads(pickle.dumps(resolve(*flags) if args is None else args))
    object.__new__(Scheduler).__init__(server_args, None)


@pytest.fixture(autouse=True)
def _empty_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "__init__", lambda self, server_args, port_args, *args, **kwargs: None)


def test_a_scheduler_gets_our_dispatcher_its_limits_and_one_line_in_the_log() -> None:
    def child() -> tuple[limits.Limits, list[str]]:
        load_plugins()
        lines: list[str] = []
        logger = logging.getLogger("moe_a2a")
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        args = resolve(*MOONCAKE, "--cuda-graph-max-bs-decode", "32", "--enable-two-batch-overlap")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        assert not is_active()
        scheduler(args=args)
        assert is_active()
        return limits.current(), lines

    got, lines = in_child(child)
    assert got == limits.Limits(32, 128, ("0", "1"))
    (line,) = lines
    assert f"SGLang {sglang.__version__}: EP 2 over mapped memory of the GPUs of one host, --deepep-mode auto" in line
    assert "at most 32 tokens per rank in decode and 128 in prefill, 2 micro-batches in flight" in line


def test_two_batch_overlap_finds_the_sms_of_communication_without_deepep() -> None:
    def child() -> int:
        load_plugins()
        scheduler(*MOONCAKE)
        from sglang.srt.batch_overlap import operations_strategy

        return int(operations_strategy.DeepEPConfig.get_instance().num_sms)

    assert in_child(child) == 24


def test_arguments_that_were_resolved_before_the_plugin_came_stop_the_scheduler() -> None:
    def child() -> None:
        args = resolve(*MOONCAKE)
        load_plugins()
        scheduler(args=args)

    with pytest.raises(Failed, match=r"FlagError: .*load_plugins\(\) before ServerArgs"):
        in_child(child)


def test_a_dispatcher_that_cannot_be_imported_stops_the_scheduler() -> None:
    def child() -> None:
        load_plugins()
        with mock.patch.dict(sys.modules, {"moe_a2a.sglang_plugin.dispatcher": None}):
            scheduler(*MOONCAKE)

    with pytest.raises(Failed, match=r"ModuleNotFoundError: .*moe_a2a\.sglang_plugin\.dispatcher"):
        in_child(child)


def test_another_plugins_dispatcher_stops_the_scheduler() -> None:
    def child() -> None:
        load_plugins()
        import sglang.srt.batch_overlap.two_batch_overlap as two_batch_overlap

        class Other:
            pass

        two_batch_overlap.MooncakeEPDispatcher = Other
        scheduler(*MOONCAKE)

    with pytest.raises(Failed, match=r"RuntimeError: .*another plug-in has replaced it"):
        in_child(child)


def test_what_replayed_graphs_have_found_is_raised_after_a_forward_pass() -> None:
    def child() -> None:
        from sglang.srt.model_executor.model_runner import ModelRunner

        ModelRunner.forward = lambda self: "logits"
        load_plugins()
        scheduler(*MOONCAKE)
        from moe_a2a.sglang_plugin import buffers

        runner = object.__new__(ModelRunner)
        assert runner.forward() == "logits"
        with mock.patch.object(buffers, "poll", side_effect=RankLost("rank 1 is gone", [1])):
            runner.forward()

    with pytest.raises(Failed, match="RankLost: rank 1 is gone"):
        in_child(child)


# Expert layers.


def expert_layer(quantisation: str | None, runner: str, deep_gemm: bool = True, **fields: Any) -> Any:
    """An expert layer as SGLang has built it, and what the plug-in makes of it."""
    from sglang.srt.layers import deep_gemm_wrapper, moe
    from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend

    from moe_a2a.sglang_plugin import activation

    quant_config = None if quantisation is None else SimpleNamespace(get_name=lambda: quantisation)
    known = {"deprecate_flag": False, "use_w4afp8": False, "quant_config": quant_config, "dispatcher": mock.Mock()}
    layer = SimpleNamespace(**known | fields)
    with (
        mock.patch.object(moe, "get_moe_a2a_backend", return_value=MoeA2ABackend.MOONCAKE),
        mock.patch.object(moe, "get_moe_runner_backend", return_value=MoeRunnerBackend(runner)),
        mock.patch.object(deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", deep_gemm),
    ):
        activation.check_runner(layer)
    return layer


def test_layers_that_a_runner_serves_pass() -> None:
    assert expert_layer("fp8", "auto", deprecate_flag=True).deprecate_flag
    assert not expert_layer("w4afp8", "cutlass", use_w4afp8=True).deprecate_flag


def test_unquantised_layers_get_bf16_rows_and_deepgemm() -> None:
    layer = expert_layer(None, "deep_gemm")
    assert layer.deprecate_flag
    layer.dispatcher.set_quant_config.assert_called_once_with({"dispatcher_output_dtype": "bf16"})


@pytest.mark.parametrize(
    "quantisation, runner, deep_gemm", [("awq", "auto", True), (None, "triton", True), (None, "deep_gemm", False)]
)
def test_layers_that_no_runner_serves_stop_the_server(quantisation: str | None, runner: str, deep_gemm: bool) -> None:
    with pytest.raises(
        FlagError, match=rf"--moe-runner-backend {runner} .* quantised as {quantisation}.*use an FP8 model"
    ):
        expert_layer(quantisation, runner, deep_gemm)


# What it costs.

_IMPORTED = f"""{operators.PROGRAM}
import json, sys, time, torch
import sglang.srt.plugins, sglang.srt.server_args
from sglang.srt.plugins.hook_registry import HookRegistry
before, begin = set(sys.modules), time.perf_counter()
from moe_a2a.sglang_plugin import register
register()
HookRegistry.apply_hooks()
took = time.perf_counter() - begin
print(json.dumps([took, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


def test_a_launcher_does_not_pay_for_it() -> None:
    """Argument parsing comes before schedulers: by then nothing of theirs may be imported, nor CUDA initialised."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _IMPORTED], env=environment, check=True, capture_output=True, text=True
    ).stdout
    took, modules, initialised = json.loads(output.splitlines()[-1])
    assert took < 1.0 and not initialised
    allowed = ("moe_a2a", "sglang.srt.arg_groups", "sglang.srt.plugins")
    assert [name for name in modules if not name.startswith(allowed)] == []


def test_flags_are_checked_in_less_than_a_second() -> None:
    def child() -> float:
        load_plugins()
        begin = time.perf_counter()
        resolve(*MOONCAKE)
        with_checks = time.perf_counter() - begin
        begin = time.perf_counter()
        resolve()
        return with_checks - (time.perf_counter() - begin)

    assert in_child(child) < 1.0


def test_the_installed_entry_point_is_the_one_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."sglang.srt.plugins"]\nmoe-a2a = "moe_a2a.sglang_plugin:register"\n' in text
    assert len(FLAGS) > 10
