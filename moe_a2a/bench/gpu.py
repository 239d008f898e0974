"""One GPU rank of a benchmark: check, then time launches, eager and from CUDA graphs; rank 0 gathers.

All launches of a measurement are queued before the first is waited for, so that what is timed is the device (and, for
eager launches, the host that feeds it), and ranks keep step through the library's own flags.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_a2a.all_to_all import AllToAll
from moe_a2a.bench.cases import Case, heading, percentiles
from moe_a2a.bench.check import check_case
from moe_a2a.bench.nccl import NcclAllToAll
from moe_a2a.bootstrap import GroupBootstrap
from moe_a2a.config import Options
from moe_a2a.types import Masked

MODES = ("graph", "eager")
PARTS = ("dispatch", "combine")
_WARM_UP = 5
_STEPS = 20  # steps in one captured graph
_SETTLE = 4  # of those, the first are not sampled: ranks start a replay at different times
Result = dict[str, Any]


@dataclass
class Runner:
    """A way to make the two halves of a step. `dispatch` returns what `combine` takes."""

    dispatch: Callable[[], Any]
    combine: Callable[[Any], Any]


def run_gpu_case(case: Case, modes: Sequence[str], options: Options, baselines: tuple[str, ...]) -> list[Result]:
    """Run one case on this rank. Returns an entry of the JSON for each mode, equal on all ranks."""
    gather = GroupBootstrap(None)
    device = torch.device("cuda", torch.cuda.current_device())
    with AllToAll(case.config("bench"), device=device, options=options) as a2a:
        problems = gather.all_gather(check_case(case, a2a, 0), options.timeout_s)
        runners, wrong = _runners(case, a2a, baselines)
        problems = [a or b for a, b in zip(problems, gather.all_gather(wrong, options.timeout_s), strict=True)]
        entries = []
        for mode in modes:
            times: dict[str, dict[str, list[float]]] = {}
            for name, runner in runners.items():
                dist.barrier()
                measure = _time_graph if mode == "graph" else _time_eager
                times[name] = measure(runner, case.iterations)
            a2a.check()
            everyone = gather.all_gather({"times": times, "bytes": _bytes(case, a2a)}, options.timeout_s)
            entries.append(_entry(case, mode, a2a, problems, everyone))
        dist.barrier()
    return entries


def _runners(case: Case, a2a: AllToAll, baselines: tuple[str, ...]) -> tuple[dict[str, Runner], str | None]:
    """Ours and the baselines, on the same inputs, and what is wrong with a baseline's results."""
    mine, device = case.inputs(a2a.rank, 1), a2a.device
    x, ids, weights = mine.x.to(device), mine.topk_ids.to(device), mine.topk_weights.to(device)
    out = torch.empty_like(x)
    got = a2a.dispatch(x, ids, weights, fp8=case.fp8)
    y = got.x
    if got.scales is not None:  # experts that return what they got
        y = torch.ones(got.x.shape, dtype=a2a.config.dtype, device=device)
        for e, count in enumerate(got.counts.tolist()):
            tiles = got.x[e, :count].float().view(count, a2a.config.groups, 128)
            y[e, :count] = (tiles * got.scales[e, :count, :, None]).view(count, a2a.config.hidden_size).to(y.dtype)
    sums = a2a.combine(y, got.handle, out=torch.empty_like(x))

    def dispatch() -> Masked:
        return a2a.dispatch(x, ids, weights, fp8=case.fp8)

    def combine(got: Masked) -> torch.Tensor:
        return a2a.combine(got.x if case.fp8 is None else y, got.handle, out=out)

    runners = {"ours": Runner(dispatch, combine)}
    wrong = None
    if "nccl" in baselines:
        group = dist.new_group(backend="nccl")
        assert isinstance(group, dist.ProcessGroup)
        nccl = NcclAllToAll(a2a.config, group, device, case.fp8)

        def experts() -> torch.Tensor:
            return nccl.x[:-1].view(y.shape) if case.fp8 is None else y

        runners["nccl"] = Runner(
            lambda: nccl.dispatch(x, ids, weights), lambda found: nccl.combine(experts(), found[0], found[1], out)
        )
        theirs = runners["nccl"].combine(runners["nccl"].dispatch())
        valid = torch.arange(y.shape[1], device=device) < got.counts[:, None]
        here = nccl.x[:-1].view(torch.uint8).view(*y.shape[:2], -1)
        if not (
            torch.equal(nccl.counts, got.counts.long()) and torch.equal(here[valid], got.x.view(torch.uint8)[valid])
        ):
            wrong = "the nccl baseline's rows differ from ours"
        elif not torch.allclose(theirs.float(), sums.float(), rtol=2**-6, atol=2**-6):
            wrong = "the nccl baseline's sums differ from ours"
    return runners, wrong


def _event(external: bool = False) -> torch.cuda.Event:
    """external: recorded by a captured graph whenever it is replayed."""
    return torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]


def _time_eager(runner: Runner, iterations: int) -> dict[str, list[float]]:
    """us of dispatch, combine and both, of every launch."""
    total = _WARM_UP + iterations
    marks = [[_event() for _ in range(2)] for _ in range(total + 1)]
    for pair in marks:  # the first record of an event makes it, which takes longer than a launch
        for event in pair:
            event.record()
    for start, middle in marks[:-1]:
        start.record()
        got = runner.dispatch()
        middle.record()
        runner.combine(got)
    marks[-1][0].record()
    torch.cuda.synchronize()
    spans = [
        (1e3 * start.elapsed_time(middle), 1e3 * middle.elapsed_time(following[0]))
        for (start, middle), following in zip(marks[_WARM_UP:-1], marks[_WARM_UP + 1 :], strict=True)
    ]
    return {
        "dispatch": [d for d, _ in spans],
        "combine": [c for _, c in spans],
        "both": [d + c for d, c in spans],
    }


def _time_graph(runner: Runner, iterations: int) -> dict[str, list[float]]:
    """us of dispatch and combine, from events inside a graph, less what the events cost; of both, from graphs without
    events: the mean step of each replay."""
    marks = [[_event(external=True) for _ in range(3)] for _ in range(_STEPS)]
    plain, marked = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(plain):
        for _ in range(_STEPS):
            runner.combine(runner.dispatch())
    with torch.cuda.graph(marked):
        for start, middle, end in marks:
            start.record()
            got = runner.dispatch()
            middle.record()
            runner.combine(got)
            end.record()
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(_WARM_UP + iterations):
        marked.replay()
        torch.cuda.synchronize()
        if number >= _WARM_UP:
            for start, middle, end in marks[_SETTLE:]:
                samples["dispatch"].append(1e3 * start.elapsed_time(middle))
                samples["combine"].append(1e3 * middle.elapsed_time(end))
    ends = [_event() for _ in range(_WARM_UP + iterations + 1)]
    dist.barrier()
    for event in ends[:-1]:
        event.record()
        plain.replay()
    ends[-1].record()
    torch.cuda.synchronize()
    samples["both"] = [
        1e3 * a.elapsed_time(b) / _STEPS for a, b in zip(ends[_WARM_UP:-1], ends[_WARM_UP + 1 :], strict=True)
    ]
    # An event in a graph is a node that launches wait for: its cost is what the parts have more than the whole.
    extra = sum(statistics.median(samples[part]) for part in PARTS) - statistics.median(samples["both"])
    for part in PARTS:
        samples[part] = [sample - extra / 2 for sample in samples[part]]
    return {**samples, "event": [extra / 2]}


def _bytes(case: Case, a2a: AllToAll) -> list[int]:
    """[what this rank stores into its peers' memory in a step, both ways; payload alone]."""
    config, ids = a2a.config, case.inputs(a2a.rank, 1).topk_ids
    owner = torch.where(ids >= 0, ids // a2a.local_experts, -1)
    rows = sum(int((owner == r).any(dim=1).sum()) for r in range(a2a.world_size) if r != a2a.rank)
    row = (config.hidden_size + 4 * config.groups if case.fp8 else config.row_bytes) + config.row_bytes
    peers = a2a.world_size - 1
    # To every peer: tables and weights of all tokens, counts, header, two flags.
    beside = ids.numel() * 8 + a2a.local_experts * 4 + 5 * 8 + 2 * 8
    return [rows * row + peers * beside, rows * row]


def _entry(case: Case, mode: str, a2a: AllToAll, problems: list[str | None], everyone: list[Result]) -> Result:
    def of(name: str) -> Result:
        """Percentiles over the samples of all ranks."""
        return {
            f"{what}_us": percentiles(np.concatenate([rank["times"][name][what] for rank in everyone]).tolist())
            for what in everyone[0]["times"][name]
        }

    return {
        **heading(case, a2a, "cuda", mode, problems),
        "name": f"{case.name} {mode}",
        **of("ours"),
        "transport_us": None,
        "network_us": None,
        "wire_bytes": sum(rank["bytes"][0] for rank in everyone),
        "min_wire_bytes": sum(rank["bytes"][1] for rank in everyone),
        "buffer_bytes": a2a.buffer_bytes,
        "baselines": {name: of(name) for name in everyone[0]["times"] if name != "ours"},
    }
