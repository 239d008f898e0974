"""The bench of GPU ranks, as far as it can be tried without one: its baselines, its entries, its plots."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from rich.console import Console

from moe_a2a import AllToAll
from moe_a2a.bench import baselines, command, gpu, report
from moe_a2a.bench.baselines import Baselines, OurStep, why_absent
from moe_a2a.bench.cases import Case
from moe_a2a.bench.check import check_case
from moe_a2a.bench.low_latency import expert_rows
from moe_a2a.config import Options
from moe_a2a.fp8 import quantize
from moe_a2a.types import LAYOUTS, Layout, Masked

ROOT = pathlib.Path(__file__).parents[1]
TIMES = {"dispatch": [1.0, 2.0, 3.0], "combine": [2.0, 3.0, 4.0], "both": [3.0, 5.0, 7.0], "event": [0.5]}
BROUGHT = {"brought": {"rows": [6, 5], "expert_rows": [6, 6]}}


def case(dtype: str = "bf16", tokens: int = 6) -> Case:
    return Case(tokens, 256, 2, 8, dtype, "masked", "uniform", 3, 1)


# Which baselines there are


def test_a_baseline_that_is_not_installed_is_named_with_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    monkeypatch.setitem(sys.modules, "mooncake.ep", None)
    assert why_absent("nccl") is None
    assert "pip install sgl-deep-ep" in (why_absent("deep_ep") or "")
    assert "pip install mooncake-transfer-engine-cuda13" in (why_absent("mooncake") or "")


def test_a_baseline_whose_module_fails_to_load_says_how(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep_ep.py").write_text("assert False, 'two builds of NCCL'\n")
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert "AssertionError: two builds of NCCL" in (why_absent("deep_ep") or "")


def test_what_is_missing_is_an_error_if_asked_for_and_left_out_if_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_gpus", lambda: 2)
    monkeypatch.setattr(command, "why_absent", lambda name: None if name == "nccl" else f"pip install {name}-wheel")
    assert command._choose("cuda", None) == ["nccl"]
    done = CliRunner().invoke(command.bench, ["--device", "cuda", "--baseline", "nccl,mooncake"])
    assert done.exit_code == 2
    assert "--baseline mooncake: pip install mooncake-wheel" in " ".join(done.output.replace("│", " ").split())
    monkeypatch.setattr(command, "why_absent", lambda name: None)
    assert command._choose("cuda", None) == ["nccl", "deep_ep", "mooncake"]


def test_baselines_need_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_gpus", lambda: 2)
    done = CliRunner().invoke(command.bench, ["--device", "cuda", "--ranks", "4", "--baseline", "deep_ep"])
    assert done.exit_code == 2
    assert "deep_ep needs a GPU for each of 4 ranks, here are 2" in " ".join(done.output.replace("│", " ").split())


# Checked against ours before they are timed


class Alone:
    """DeepEP's and Mooncake EP's low-latency calls for a single rank, with rows in the reverse of our order."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.started = fault, [0]

    def _dispatch(self, x: torch.Tensor, ids: torch.Tensor, most: int, experts: int, use_fp8: bool) -> tuple[Any, ...]:
        if self.fault == "raises":
            raise RuntimeError("unsupported hidden size")
        if self.fault == "asserts":
            raise AssertionError  # without a message, as theirs
        rows, scales = quantize(x) if use_fp8 else (x, None)
        out = torch.full((experts, most, x.shape[1]), 7.0).to(rows.dtype)
        out_scales = torch.full((experts, x.shape[1] // 128, most), 7.0).transpose(1, 2)
        counts = torch.zeros(experts, dtype=torch.int32)
        places = torch.full((experts, most), -1)
        for token in reversed(range(len(x))):
            for expert in ids[token].tolist():
                at = int(counts[expert])
                out[expert, at], places[expert, at] = rows[token], token
                if scales is not None:
                    out_scales[expert, at] = scales[token]
                counts[expert] += 1
        if self.fault == "counts":
            counts[0] += 1
        if self.fault == "experts":
            out, places, counts = out.roll(1, 0), places.roll(1, 0), counts
        return (out, out_scales) if use_fp8 else out, counts, (places, counts), None, None

    def _combine(
        self, y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: Any, out: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        places, counts = handle
        sums = torch.zeros(out.shape, dtype=torch.float32)
        for expert, count in enumerate(counts.tolist()):
            for at in range(count):
                token = int(places[expert, at])
                sums[token] += float(weights[token][ids[token] == expert].sum()) * y[expert, at].float()
        return out.copy_(sums), None, None

    # DeepEP

    @staticmethod
    def get_low_latency_rdma_size_hint(tokens: int, hidden: int, ranks: int, experts: int) -> int:
        return tokens * hidden * ranks * experts

    def clean_low_latency_buffer(self, tokens: int, hidden: int, experts: int) -> None:
        self.started.append(tokens)

    def low_latency_dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, most: int, experts: int, use_fp8: bool = True
    ) -> tuple[Any, ...]:
        return self._dispatch(x, topk_idx, most, experts, use_fp8)

    def low_latency_combine(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: Any, out: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        return self._combine(x, topk_idx, topk_weights, handle, out)

    def destroy(self) -> None:
        self.started.append(-1)

    # Mooncake EP

    get_ep_buffer_size_hint = get_low_latency_rdma_size_hint

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        active_ranks: torch.Tensor,
        most: int,
        experts: int,
        timeout_us: int,
        use_fp8: bool = True,
    ) -> tuple[Any, ...]:
        assert active_ranks.tolist() == [1]
        assert timeout_us > 0
        return self._dispatch(x, topk_idx, most, experts, use_fp8)

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        active_ranks: torch.Tensor,
        timeout_us: int,
        handle: Any,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, None, None]:
        return self._combine(x, topk_idx, topk_weights, handle, out)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Baselines]]:
    """Baselines of one CPU rank, of which one library is played by `Alone`."""

    def build(name: str, fault: str) -> Baselines:
        kind = type("Buffer", (Alone,), {"__init__": lambda self, *_, **__: Alone.__init__(self, fault)})
        monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=kind))
        monkeypatch.setitem(sys.modules, "mooncake.mooncake_ep_buffer", SimpleNamespace(Buffer=kind))
        monkeypatch.setattr(dist, "new_group", lambda backend: dist.group.WORLD)
        return Baselines([name], [case(), case("fp8"), case("fp16")], torch.device("cpu"))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build
    dist.destroy_process_group()


def our_step(of: Case) -> OurStep:
    mine = of.inputs(0, 1)
    with AllToAll(of.config("c"), store=dist.HashStore(), rank=0, world_size=1) as a2a:
        got = a2a.dispatch(mine.x, mine.topk_ids, mine.topk_weights, fp8=of.fp8)
        assert isinstance(got, Masked)
        y = expert_rows(got.x, got.scales, got.counts, 0, of)
        sums = a2a.combine(y, got.handle).clone()
    return OurStep(of, a2a.config, 0, mine.x, mine.topk_ids, mine.topk_weights, got, y, sums)


@pytest.mark.parametrize("name", ["deep_ep", "mooncake"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_peer_that_is_right_is_ready_to_be_timed(name: str, dtype: str, play: Any) -> None:
    beside, step = play(name, ""), our_step(case(dtype))
    runner, wrong = beside.prepare(name, step)
    assert wrong is None
    again = runner.combine(runner.dispatch())
    assert again.shape == step.sums.shape
    assert beside.buffer_bytes(name, step.case) == 6 * 256 * 8
    beside.close()


@pytest.mark.parametrize("name", ["deep_ep", "mooncake"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("counts", "rows per expert differ from ours"),
        ("experts", "sums differ from ours by"),
        ("raises", "RuntimeError: unsupported hidden size"),
        ("asserts", "AssertionError: raise AssertionError"),
    ],
)
def test_a_peer_that_is_wrong_says_so(name: str, fault: str, says: str, play: Any) -> None:
    _, wrong = play(name, fault).prepare(name, our_step(case()))
    assert says in wrong


def test_a_peer_that_did_not_start_is_started_once(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, step, starts = play("deep_ep", ""), our_step(case()), []

    def start(self: Any, *_: Any, **__: Any) -> None:
        starts.append(1)
        raise RuntimeError("nvshmem_init failed")

    monkeypatch.setattr(sys.modules["deep_ep"].Buffer, "__init__", start)
    for _ in range(2):
        assert "nvshmem_init failed" in beside.prepare("deep_ep", step)[1]
    assert starts == [1]


def test_a_peer_that_lacks_a_dtype_says_which_it_has(play: Any) -> None:
    assert play("deep_ep", "").prepare("deep_ep", our_step(case("fp16"))) == (None, "it has no fp16, only bf16 and fp8")


# Entries of the JSON


def entry(compared: dict[str, Any], timed: tuple[str, ...], problems: tuple[str | None, ...] = (None, None)) -> Any:
    a2a: Any = SimpleNamespace(world_size=2, hosts=((0, 1),), buffer_bytes=4096)
    everyone = [{"times": dict.fromkeys(timed, TIMES), "failed": {}, "bytes": [120, 100], **BROUGHT} for _ in range(2)]
    return gpu.entry(case(), "graph", a2a, list(problems), everyone, compared)


def test_a_wrong_baseline_is_not_held_against_ours() -> None:
    said = [{"nccl": None, "deep_ep": "sums differ"}, {"nccl": None, "deep_ep": None}]
    beside: Any = SimpleNamespace(names=("nccl", "deep_ep"), buffer_bytes=lambda name, _: 9 if name != "nccl" else None)
    compared = gpu._beside(said, case(), beside)
    found = entry(compared, ("ours", "nccl"))
    assert found["correct"] is True
    assert found["problems"] == []
    assert found["baselines"]["deep_ep"] == {"problem": "rank 0: sums differ", "buffer_bytes": 9}
    assert set(found["baselines"]["nccl"]) == {"problem", "dispatch_us", "combine_us", "both_us", "event_us"}
    assert found["baselines"]["nccl"]["problem"] is None
    assert found["both_us"] == {"p50": 5.0, "p90": 7.0, "p99": 7.0}


def test_a_baseline_that_fails_while_it_is_timed_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(runner: Any, mode: str, iterations: int) -> Any:
        if runner == "broken":
            raise RuntimeError("operation not permitted when stream is capturing")
        return TIMES

    monkeypatch.setattr(gpu, "measure", measure)
    runners: Any = {"ours": "fine", "deep_ep": "broken"}
    times, failed = gpu._measure(runners, "graph", 3)
    assert set(times) == {"ours"}
    a2a: Any = SimpleNamespace(world_size=2, hosts=((0, 1),), buffer_bytes=4096)
    other = {"times": {"ours": TIMES, "deep_ep": TIMES}, "failed": {}, "bytes": [0, 0], **BROUGHT}
    everyone = [other, {"times": times, "failed": failed, "bytes": [0, 0], **BROUGHT}]
    found = gpu.entry(case(), "graph", a2a, [None, None], everyone, {"deep_ep": {"problem": None}})
    said = "rank 1: RuntimeError: operation not permitted when stream is capturing"
    assert found["baselines"] == {"deep_ep": {"problem": said}}
    assert found["correct"] is True
    with pytest.raises(RuntimeError, match="capturing"):
        gpu._measure({"ours": runners["deep_ep"]}, "graph", 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_case_checks_what_it_times_in_each_mode(
    layout: Layout, dtype: str, play: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a CPU rank in place of the GPU's."""
    checked = []

    def check(case: Case, a2a: AllToAll, step: int, apart: bool) -> str | None:
        checked.append(apart)
        return check_case(case, a2a, step, apart)

    def measure(runner: Any, mode: str, iterations: int) -> Any:
        for _ in range(3):
            runner.combine(runner.dispatch())
        return TIMES

    monkeypatch.setattr(gpu, "AllToAll", lambda config, device, options: AllToAll(config, options=options))
    monkeypatch.setattr(gpu, "check_case", check)
    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    of = Case(6, 256, 2, 8, dtype, layout, "zipf-packed", 3, 1, None if layout == "masked" else 16)
    entries = gpu.run_gpu_case(of, ["graph", "eager"], Options(), Baselines((), (), torch.device("cpu")))
    assert checked == ([True, False] if layout == "masked" else [False])
    assert [entry["mode"] for entry in entries] == ["graph", "eager"]
    for found in entries:
        assert found["correct"], found["problems"]
        assert found["by_rank"]["rows"] == [6]
        assert found["by_rank"]["expert_rows"] == [12]
        assert found["num_sms"] == of.num_sms
    assert f"{of.name}: buffers" in capsys.readouterr().err


def test_what_is_wrong_with_ours_is() -> None:
    found = entry({}, ("ours",), (None, "combine differs"))
    assert found["correct"] is False
    assert found["problems"] == ["rank 1: combine differs"]


def test_table_and_bars_do_without_the_times_of_a_wrong_baseline(tmp_path: pathlib.Path) -> None:
    wrong = {"deep_ep": {"problem": "rank 0: [sums] differ"}}
    right = {"deep_ep": {"problem": None}}
    entries = [entry(wrong, ("ours",)), entry(right, ("ours", "deep_ep"))]
    console = Console(width=120, record=True, file=open(tmp_path / "table", "w"))  # noqa: SIM115
    report.print_table(entries, console)
    text = console.export_text()
    assert text.count("equal to the oracle") == 2
    assert "Rows received: rank 0 12, median of ranks 11" in text
    assert "5.0 (rank 0)" in text
    assert "deep_ep was not timed: rank 0: [sums] differ" in text
    report.write_plot(str(tmp_path / "bars.png"), entries)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_baselines_of_the_command_are_those_that_exist() -> None:
    assert command._BASELINES["cuda"] == baselines.GPU_BASELINES == ("nccl", "deep_ep", "mooncake")


# Plots over T, K and E


def made_up(tokens: int, top_k: int, experts: int, dtype: str, correct: bool = True, **also: Any) -> dict[str, Any]:
    us = {"p50": 10.0 + tokens * top_k / 50, "p90": 0.0, "p99": 0.0}
    times = {"dispatch_us": us, "combine_us": us, "both_us": us}
    shape = {"ranks": 2, "hidden": 7168, "routing": "uniform", "tokens": tokens, "top_k": top_k, "experts": experts}
    beside = {"nccl": {"problem": None, **times}, "deep_ep": {"problem": "rank 0: wrong"}}
    return {
        **shape, **times, "device": "cuda", "layout": "masked", "mode": "graph", "dtype": dtype, "correct": correct,
        "baselines": beside, **also,
    }  # fmt: skip


def prefill(tokens: int, routing: str, sms: int, **also: Any) -> dict[str, Any]:
    worst = {f"{part}_us": {"p50": tokens / sms, "rank": 1, "rows": tokens} for part in ("dispatch", "combine", "both")}
    it = {"layout": "contiguous", "routing": routing, "num_sms": sms, "worst_rank": worst, **also}
    return made_up(tokens, 8, 256, "bf16", **it)


def draw(tmp_path: pathlib.Path, entries: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    (tmp_path / "made_up.json").write_text(json.dumps({"cases": entries}))
    call = [sys.executable, str(ROOT / "bench" / "plot_gpu.py"), str(tmp_path / "made_up.json"), "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(call, capture_output=True, text=True, timeout=120, env=env, check=False)


def test_plots_are_drawn_from_the_json(tmp_path: pathlib.Path) -> None:
    entries = [made_up(2**n, 8, 256, dtype) for n in range(11) for dtype in ("fp8", "bf16")]
    entries += [made_up(128, k, 256, "fp8") for k in (1, 2, 4)] + [made_up(128, 8, 2**n, "fp8") for n in (5, 6, 10)]
    done = draw(tmp_path, entries)
    assert done.returncode == 0, done.stderr
    for name in ("gpu_tokens.png", "gpu_topk_experts.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "gpu_contiguous.png was not drawn" in done.stderr


def test_contiguous_steps_are_drawn_apart_from_masked_ones(tmp_path: pathlib.Path) -> None:
    entries = [
        prefill(tokens, routing, sms, baselines={} if sms == 16 else {"nccl": {"dispatch_us": {"p50": 900.0}}})
        for tokens in (4096, 8192)
        for routing in ("uniform", "zipf-packed:1.2")
        for sms in (16, 24)
    ]
    done = draw(tmp_path, [made_up(4096, 8, 256, "bf16"), *entries])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpu_contiguous.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "gpu_tokens.png").exists()


def test_a_file_of_another_program_is_refused(tmp_path: pathlib.Path) -> None:
    call = [sys.executable, str(ROOT / "bench" / "plot_gpu.py"), str(ROOT / "bench" / "results" / "gpu_kernels.json")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*call, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert done.returncode == 1
    assert "gpu_kernels.json has no cases" in done.stderr


def test_nothing_is_drawn_from_entries_that_were_wrong(tmp_path: pathlib.Path) -> None:
    done = draw(tmp_path, [made_up(2**n, 8, 256, "fp8", correct=False) for n in range(3)])
    assert done.returncode == 1
    assert "differ in tokens alone" in done.stderr
    assert not list(tmp_path.glob("*.png"))
