"""Shared memory inside a host of an elastic group: as transport/shared.py, with whoever is there.

Memory is used again without waiting for ranks that are lost, one of which may still be reading it. So a record is
withdrawn before what it announced is overwritten, and who has read rows looks at their record once more (`stands`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from moe_a2a.elastic.lookout import Awaited, Lookout
from moe_a2a.errors import MoeA2AError
from moe_a2a.routing import Arrival, Contribution
from moe_a2a.step import Roll, Step
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.protocol import SumOrder
from moe_a2a.transport.shared import check_discarded
from moe_a2a.transport.wire import (
    RECORD_BYTES,
    FloatArray,
    Kind,
    Record,
    Spot,
    Status,
    write_record,
)

K = TypeVar("K", bound=Hashable)


def roll_of(step: Step) -> Roll:
    assert step.roll is not None  # of every step of an elastic group
    return step.roll


def mask_of(ranks: Collection[int]) -> int:
    return sum(1 << rank for rank in ranks)


#: Where a record is: (rank in whose region, offset of the mailbox there, rank that writes it).
Where = tuple[int, int, int]


class Spots(Generic[K]):
    """The places where one transport looks for records of one kind; kept while the same processes take part, because to
    make them costs more than to look.

    where: for a step, all places where each record may come, the likeliest first.
    """

    def __init__(self, arena: Arena, kind: Kind, where: Callable[[Step], Mapping[K, Sequence[Where]]]) -> None:
        self._arena, self._kind, self._where = arena, kind, where
        self._kept: dict[tuple[int, int], tuple[dict[int, int], dict[K, tuple[Spot, ...]]]] = {}

    def of(self, step: Step, roll: Roll) -> dict[K, tuple[Spot, ...]]:
        kept = self._kept.get((step.channel, step.parity))
        if kept is None or kept[0] is not roll.incarnations:
            kept = self._kept[step.channel, step.parity] = self._make(step)
        return kept[1]

    def _make(self, step: Step) -> tuple[dict[int, int], dict[K, tuple[Spot, ...]]]:
        memory, incarnations = self._arena.memory, roll_of(step).incarnations

        def spot(owner: int, mailbox: int, sender: int) -> Spot:
            at = memory.position(owner, mailbox + RECORD_BYTES * self._kind)
            return Spot(memory.bytes, at, self._kind, incarnations[sender], owner, sender)

        return incarnations, {key: tuple(spot(*at) for at in places) for key, places in self._where(step).items()}


def announce(arena: Arena, step: Step, kind: Kind, record: Record) -> None:
    at = arena.memory.position(arena.rank, arena.block(step).mailbox + RECORD_BYTES * kind)
    write_record(arena.memory.bytes, at, record)


def read_arrivals(
    arena: Arena, step: Step, found: Mapping[int, tuple[Record, Spot]], at: Callable[[int], int]
) -> list[Arrival]:
    """What sources announced, at these offsets, with tables that stay as they are: combine reads them once more. A
    source that went on without this rank before its tables were copied has not come; what was read is not believed."""
    roll, arrivals = roll_of(step), []
    for source, (record, spot) in sorted(found.items()):
        arrival = None
        try:
            arrival = arena.arrival(step, source, record, spot.owner, at(source), keep=True)
        except MoeA2AError:
            if spot.stands(step.number):
                raise
        if arrival is None or not spot.stands(step.number):
            roll.missing.add(source)
            continue
        roll.epochs[source], roll.reading[source] = record.epoch, spot
        arrivals.append(arrival)
    return arrivals


class ElasticShared:
    """Transport between the ranks of one host."""

    def __init__(self, arena: Arena, lookout: Lookout, budget_s: float) -> None:
        self._arena, self._lookout, self._budget = arena, lookout, budget_s
        self.sources = arena.peers
        self._spots = {kind: Spots(arena, kind, self._mailboxes) for kind in Kind}

    def send_dispatch(self, step: Step) -> None:
        arena = self._arena
        arena.publish(step)
        announce(arena, step, Kind.DISPATCH, arena.record(step, Kind.DISPATCH, step.tokens))

    def recv_dispatch(self, step: Step) -> list[Arrival]:
        at = self._arena.block(step).publish
        return read_arrivals(self._arena, step, self._wait(step, Kind.DISPATCH, "dispatch"), lambda source: at)

    def send_weights(self, step: Step, weights: FloatArray) -> None:
        arena = self._arena
        self._weights(step, arena.rank, len(weights))[:] = weights
        announce(arena, step, Kind.WEIGHTS, arena.record(step, Kind.WEIGHTS, len(weights)))

    def recv_weights(self, step: Step) -> dict[int, FloatArray]:
        records = self._wait(step, Kind.WEIGHTS, "router weights", {arrival.rank for arrival in step.arrivals})
        rows = {arrival.rank: len(arrival.ids) for arrival in step.arrivals}
        return {rank: self._weights(step, rank, rows[rank]) for rank in records}

    def send_combine(self, step: Step, discarded: bool) -> None:
        arena = self._arena
        status = Status.DISCARDED if discarded else Status.OK
        record = arena.record(step, Kind.COMBINE, status=status, mask=mask_of(roll_of(step).summed))
        announce(arena, step, Kind.COMBINE, record)

    def recv_combine(self, step: Step, discarded: bool = False) -> dict[SumOrder, Contribution]:
        arena, roll = self._arena, roll_of(step)
        came = self._wait(step, Kind.COMBINE, "combine")
        check_discarded(step, {rank: record for rank, (record, _) in came.items()}, discarded)
        # A rank that left this one out has no sums for it.
        roll.reading = {rank: spot for rank, (record, spot) in came.items() if record.mask >> arena.rank & 1}
        roll.returned.update(roll.reading)
        first, hits = roll.here[0], step.outgoing.hits
        return {
            (first, rank): Contribution(np.flatnonzero(hits[:, rank]), arena.partials_row(step, rank, arena.rank))
            for rank in roll.reading
        }

    def _mailboxes(self, step: Step) -> dict[int, list[Where]]:
        mailbox = self._arena.block(step).mailbox
        return {rank: [(rank, mailbox, rank)] for rank in roll_of(step).here}

    def _wait(
        self, step: Step, kind: Kind, what: str, among: Collection[int] | None = None
    ) -> dict[int, tuple[Record, Spot]]:
        """Records of the ranks of this host that are not lost."""
        roll = roll_of(step)
        spots = self._spots[kind].of(step, roll)
        if among is not None:
            spots = {rank: where for rank, where in spots.items() if rank in among}

        def about(rank: int) -> Awaited:
            return Awaited(rank, lambda: self._lookout.lost(roll, rank), lambda: rank)

        found, lost = self._lookout.wait(step, spots, self._budget, what, about)
        roll.missing.update(set(lost) - roll.left)
        return found

    def _weights(self, step: Step, rank: int, rows: int) -> FloatArray:
        return self._arena.weights(step, rank, self._arena.block(step).publish, rows)
