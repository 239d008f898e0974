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
    """us of "dispatch", "combine" and "both", and "event", what was taken off each half. Collective.

    both: the mean step of every 20. The halves come from events between them, which cost something themselves: half of
    what the halves have more than the whole is taken off each.
    """
    dist.barrier()
    samples = _halves_in_graph(runner, iterations) if mode == "graph" else _halves_eager(runner, iterations)
    samples["both"] = _whole(_captured(runner) if mode == "graph" else lambda: _steps(runner), iterations)
    extra = sum(statistics.median(samples[part]) for part in PARTS) - statistics.median(samples["both"])
    for part in PARTS:
        samples[part] = [sample - extra / 2 for sample in samples[part]]
    return {**samples, "event": [extra / 2]}


def _event(external: bool = False) -> torch.cuda.Event:
    """external: recorded by a captured graph whenever it is replayed."""
    return torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]


def _steps(runner: Runner) -> None:
    for _ in range(_STEPS):
        runner.combine(runner.dispatch())


def _captured(runner: Runner) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _steps(runner)
    return graph.replay


def _whole(batch: Callable[[], None], iterations: int) -> list[float]:
    """us of a step, one sample for each batch of steps."""
    ends = [_event() for _ in range(_WARM_UP + iterations + 1)]
    dist.barrier()
    for event in ends[:-1]:
        event.record()
        batch()
    ends[-1].record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) / _STEPS for a, b in zip(ends[_WARM_UP:-1], ends[_WARM_UP + 1 :], strict=True)]


def _marked(runner: Runner, marks: list[list[torch.cuda.Event]]) -> None:
    for start, middle, end in marks:
        start.record()
        got = runner.dispatch()
        middle.record()
        runner.combine(got)
        end.record()


def _add(samples: dict[str, list[float]], marks: list[list[torch.cuda.Event]]) -> None:
    for start, middle, end in marks:
        samples["dispatch"].append(1e3 * start.elapsed_time(middle))
        samples["combine"].append(1e3 * middle.elapsed_time(end))


def _halves_eager(runner: Runner, iterations: int) -> dict[str, list[float]]:
    marks = [[_event() for _ in range(3)] for _ in range(_WARM_UP + iterations)]
    for events in marks:
        for event in events:
            event.record()  # the first record makes the event, which takes longer than a launch
    _marked(runner, marks)
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    _add(samples, marks[_WARM_UP:])
    return samples


def _halves_in_graph(runner: Runner, iterations: int) -> dict[str, list[float]]:
    marks = [[_event(external=True) for _ in range(3)] for _ in range(_STEPS)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _marked(runner, marks)
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(_WARM_UP + iterations):
        graph.replay()
        torch.cuda.synchronize()
        if number >= _WARM_UP:
            _add(samples, marks[_SETTLE:])
    return samples
