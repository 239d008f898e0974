"""Times of launches on this rank's GPU, eager and from CUDA graphs.

All launches of a measurement are queued before the first is waited for, so that what is timed is the device (and, for
eager launches, the host that feeds it); ranks keep step through what they exchange.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MODES = ("graph", "eager")
PARTS = ("dispatch", "combine")
_WARM_UP = 5
_STEPS = 20  # steps in one captured graph
_SETTLE = 4  # of those, the first are not sampled: ranks start a replay at different times


@dataclass(frozen=True)
class Runner:
    """A way to make the two halves of a step. `dispatch` returns what `combine` takes."""

    dispatch: Callable[[], Any]
    combine: Callable[[Any], Any]


def measure(runner: Runner, mode: str, iterations: int) -> dict[str, list[float]]:
    """us of "dispatch", "combine" and "both"; of graphs also "event", what was taken off each half. Collective."""
    dist.barrier()
    return _time_graph(runner, iterations) if mode == "graph" else _time_eager(runner, iterations)


def _event(external: bool = False) -> torch.cuda.Event:
    """external: recorded by a captured graph whenever it is replayed."""
    return torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]


def _time_eager(runner: Runner, iterations: int) -> dict[str, list[float]]:
    """us of dispatch, combine and both, of every launch."""
    total = _WARM_UP + iterations
    marks = [[_event() for _ in range(2)] for _ in range(total + 1)]
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
