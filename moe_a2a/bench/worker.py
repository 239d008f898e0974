"""One rank of a benchmark: check, warm up, time; every rank does the same, rank 0 gathers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.all_to_all import AllToAll
from moe_a2a.bench.cases import Case, heading, percentiles, rows_to, spread
from moe_a2a.bench.check import check_case
from moe_a2a.bench.gloo import GlooAllToAll
from moe_a2a.bench.ours import RawEngine, TransportOnly
from moe_a2a.bootstrap import GroupBootstrap
from moe_a2a.config import Options
from moe_a2a.cpu_backend import CpuBackend
from moe_a2a.hosts import machine_id
from moe_a2a.types import Contiguous, Grouped, Masked
from moe_a2a.workload import Inputs

_WARM_UP = 3
Result = dict[str, Any]


@dataclass
class Samples:
    """Times of this rank, us, by what was timed; stamps are CLOCK_MONOTONIC ns."""

    times: dict[str, list[float]] = field(default_factory=dict)
    stamps: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, what: str, started_ns: int) -> None:
        self.times.setdefault(what, []).append((time.monotonic_ns() - started_ns) / 1e3)

    def stamp(self, what: str, span: tuple[int, int]) -> None:
        self.stamps.setdefault(what, []).append(span)


def run_case(case: Case, options: Options, baselines: tuple[str, ...], tick: Callable[[], None]) -> Result:
    """Run one case on this rank. Returns the case's entry of the JSON, equal on all ranks. `tick` is called after
    every iteration."""
    group = dist.group.WORLD
    assert group is not None
    gather = GroupBootstrap(None)
    with AllToAll(case.config("bench"), options=options) as a2a:
        problems = gather.all_gather(check_case(case, a2a, 0), options.timeout_s)
        several = len(a2a.hosts) > 1
        mine = case.inputs(a2a.rank, 1)
        samples = Samples()
        runs = _Runs(case, a2a, mine, group, baselines)
        wire = 0
        for iteration in range(-_WARM_UP, case.iterations):
            kept = samples if iteration >= 0 else Samples()
            wire = runs.once(kept)
            if iteration >= 0:
                tick()
        own = {"times": samples.times, "stamps": samples.stamps, "wire": wire, "clock": machine_id()}
        brought = rows_to(mine.topk_ids, a2a.local_experts, a2a.world_size)
        own |= {"least": _least(case, a2a, mine), "brought": brought}
        everyone = gather.all_gather(own, options.timeout_s)
        return _entry(case, a2a, problems, everyone, several, baselines)


class _Runs:
    """What one iteration does: ours, then each baseline, each part after a barrier."""

    def __init__(
        self, case: Case, a2a: AllToAll, inputs: Inputs, group: dist.ProcessGroup, baselines: tuple[str, ...]
    ) -> None:
        self._case, self._a2a, self._inputs, self._group = case, a2a, inputs, group
        backend = a2a._backend
        assert isinstance(backend, CpuBackend)
        self._transport = TransportOnly(backend, inputs, case.fp8)
        self._gloo = GlooAllToAll(a2a.config, group) if "gloo" in baselines else None
        self._raw = RawEngine(backend, inputs, case.fp8) if len(a2a.hosts) > 1 else None
        self._rows_of: dict[int, int] = {}
        if self._raw is not None:
            sent = GroupBootstrap(None).all_gather({str(h): n for h, n in self._raw.rows_sent.items()}, 60.0)
            here = backend._arena.host
            self._rows_of = {r: int(n[str(here)]) for r, n in enumerate(sent) if str(here) in n}
        self._out = torch.empty_like(inputs.x)
        self._y: torch.Tensor | None = None

    def once(self, kept: Samples) -> int:
        """One iteration. Returns the bytes that this rank wrote to other hosts in one step."""
        started = self._barrier()
        got = self._dispatch()
        kept.add("dispatch", started)
        y = self._experts(got)
        started = self._barrier()
        self._a2a.combine(y, got.handle, out=self._out)
        kept.add("combine", started)
        started = self._barrier()
        got = self._dispatch()
        self._a2a.combine(y, got.handle, out=self._out)
        kept.add("both", started)
        started = self._barrier()
        self._transport.run(self._transport.prepare())
        kept.add("transport", started)
        if self._raw is not None:
            self._network(kept, self._raw)
        if self._gloo is not None:
            self._baseline(kept, self._gloo)
        return got.handle.wire_bytes

    def _network(self, kept: Samples, raw: RawEngine) -> None:
        """Ours and raw writes, both from rows that lie ready before the clock starts."""
        step = self._transport.prepare()
        self._barrier()
        stamps = self._transport.run(step)
        kept.stamp("dispatch", stamps.dispatch)
        kept.stamp("combine", stamps.combine)
        self._barrier()
        kept.stamp("raw dispatch", raw.dispatch())
        self._barrier()
        kept.stamp("raw combine", raw.combine(self._rows_of))

    def _baseline(self, kept: Samples, gloo: GlooAllToAll) -> None:
        layout, fp8 = self._case.layout, self._case.fp8
        started = self._barrier()
        got = gloo.dispatch(self._inputs, layout, fp8)
        kept.add("gloo dispatch", started)
        y = self._experts(got)
        started = self._barrier()
        gloo.combine(y, got.handle, self._out)
        kept.add("gloo combine", started)
        started = self._barrier()
        got = gloo.dispatch(self._inputs, layout, fp8)
        gloo.combine(y, got.handle, self._out)
        kept.add("gloo both", started)
        started = self._barrier()
        gloo.transport(fp8)
        kept.add("gloo transport", started)

    def _dispatch(self) -> Masked | Contiguous | Grouped:
        inputs, case = self._inputs, self._case
        return self._a2a.dispatch(inputs.x, inputs.topk_ids, inputs.topk_weights, layout=case.layout, fp8=case.fp8)

    def _experts(self, got: Masked | Contiguous | Grouped) -> torch.Tensor:
        """Experts that return what they got; for FP8, rows of the payload dtype that stand for it."""
        if got.x.dtype == self._a2a.config.dtype:
            return got.x
        if self._y is None or self._y.shape != got.x.shape:
            self._y = torch.empty(got.x.shape, dtype=self._a2a.config.dtype)
            for e, count in enumerate(got.counts.tolist() if isinstance(got, Masked) else ()):
                self._y[e, :count] = 1
            if not isinstance(got, Masked):
                self._y.fill_(1)
        return self._y

    def _barrier(self) -> int:
        dist.barrier(self._group)
        return time.monotonic_ns()


def _least(case: Case, a2a: AllToAll, inputs: Inputs) -> list[int]:
    """[fewest payload bytes that this rank's tokens need between ranks (one host) or hosts, both ways; what shared
    memory moves]."""
    raw_row = case.hidden + case.hidden // 32 if case.fp8 else a2a.config.row_bytes
    both = raw_row + a2a.config.row_bytes
    ids = inputs.topk_ids
    places = a2a.hosts if len(a2a.hosts) > 1 else tuple((r,) for r in range(a2a.world_size))
    rows = 0
    for place in places:
        if a2a.rank not in place:
            owner = torch.where(ids >= 0, ids // a2a.local_experts, -1)
            rows += int(torch.isin(owner, torch.tensor(place)).any(dim=1).sum())
    peers = a2a.world_size - 1
    return [rows * both, rows * both + peers * (len(ids) * case.top_k * 8 + 2 * 64)]


def _entry(
    case: Case,
    a2a: AllToAll,
    problems: list[str | None],
    everyone: list[Result],
    several: bool,
    baselines: tuple[str, ...],
) -> Result:
    def slowest(what: str) -> dict[str, float]:
        per_rank = [rank["times"][what] for rank in everyone]
        return percentiles([max(sample) for sample in zip(*per_rank, strict=True)])

    def span(prefix: str) -> dict[str, float] | None:
        if not several or len({rank["clock"] for rank in everyone}) > 1:
            return None  # stamps of several machines do not compare
        total = []
        for iteration in range(case.iterations):
            ns = 0
            for direction in ("dispatch", "combine"):
                stamps = [rank["stamps"][prefix + direction][iteration] for rank in everyone]
                ns += max(last for _, last in stamps) - min(first for first, _ in stamps)
            total.append(ns / 1e3)
        return percentiles(total)

    compared: Result = {}
    if "gloo" in baselines:
        compared["gloo"] = {
            f"{what}_us": slowest(f"gloo {what}") for what in ("dispatch", "combine", "both", "transport")
        }
    if several:
        compared["raw_engine"] = {"network_us": span("raw ")}
    return {
        **heading(case, a2a, "cpu", "eager", problems),
        "dispatch_us": slowest("dispatch"),
        "combine_us": slowest("combine"),
        "both_us": slowest("both"),
        **spread([rank["times"] for rank in everyone], [rank["brought"] for rank in everyone]),
        "transport_us": slowest("transport"),
        "network_us": span(""),
        "wire_bytes": sum(rank["wire"] if several else rank["least"][1] for rank in everyone),
        "min_wire_bytes": sum(rank["least"][0] for rank in everyone),
        "buffer_bytes": a2a.buffer_bytes,
        "baselines": compared,
    }
