"""Shared memory inside a host: a token is published once, its readers take it from where it lies.

Dispatch copies a rank's own tokens into its own region, once, however many ranks want them; the receivers' permute
reads them there. The sums of combine are written by their reduction straight into the own region and read there by the
source's sum. No row is copied for the sake of transport more than once, and no rank writes another rank's memory.
"""

from __future__ import annotations

import numpy as np

from moe_a2a.errors import HandleError
from moe_a2a.routing import Arrival, Contribution
from moe_a2a.step import Step
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.protocol import SumOrder
from moe_a2a.transport.wait import Watch, named, wait_for
from moe_a2a.transport.wire import FloatArray, Kind, Record, Status


def check_discarded(step: Step, records: dict[int, Record], discarded: bool) -> None:
    """Raises HandleError unless every rank ended this step as this rank did."""
    expected = Status.DISCARDED if discarded else Status.OK
    others = [rank for rank, record in records.items() if record.status != expected]
    if others:
        did = ("combined", "discarded") if discarded else ("discarded", "combined")
        raise HandleError(f"{step}: {named(others)} {did[0]} it, this rank {did[1]} it; all ranks must do the same")


class SharedMemoryTransport:
    """Transport between the ranks of one host."""

    def __init__(self, arena: Arena, watch: Watch, budget_s: float) -> None:
        self.sources = arena.peers
        self._arena, self._watch, self._budget = arena, watch, budget_s

    def send_dispatch(self, step: Step) -> None:
        self._arena.publish(step)
        self._arena.announce(step, Kind.DISPATCH, rows=step.tokens)

    def recv_dispatch(self, step: Step) -> list[Arrival]:
        arena, at = self._arena, self._arena.block(step).publish
        records = self._wait(step, Kind.DISPATCH, "dispatch")
        return [arena.arrival(step, rank, records[rank], rank, at) for rank in self.sources]

    def send_weights(self, step: Step, weights: FloatArray) -> None:
        self._weights(step, self._arena.rank, len(weights))[:] = weights
        self._arena.announce(step, Kind.WEIGHTS, rows=len(weights))

    def recv_weights(self, step: Step) -> dict[int, FloatArray]:
        records = self._wait(step, Kind.WEIGHTS, "router weights")
        rows = {arrival.rank: len(arrival.ids) for arrival in step.arrivals}
        return {rank: self._weights(step, rank, rows[rank]) for rank in records}

    def send_combine(self, step: Step, discarded: bool) -> None:
        self._arena.announce(step, Kind.COMBINE, Status.DISCARDED if discarded else Status.OK)

    def recv_combine(self, step: Step, discarded: bool = False) -> dict[SumOrder, Contribution]:
        arena = self._arena
        records = self._wait(step, Kind.COMBINE, "combine")
        check_discarded(step, records, discarded)
        hits = step.outgoing.hits
        return {
            (arena.host, rank): Contribution(np.flatnonzero(hits[:, rank]), arena.partials_row(step, rank, arena.rank))
            for rank in self.sources
        }

    def _wait(self, step: Step, kind: Kind, what: str) -> dict[int, Record]:
        polls = {rank: self._arena.announced(step, kind, rank) for rank in self.sources}
        return wait_for(polls, self._budget, self._watch, f"{what} of {step}", step.wait_times)

    def _weights(self, step: Step, rank: int, rows: int) -> FloatArray:
        return self._arena.weights(step, rank, self._arena.block(step).publish, rows)
