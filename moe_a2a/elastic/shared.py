"""Shared memory inside a host of an elastic group: as transport/shared.py, with whoever is there.

Memory is used again without waiting for ranks that are lost, one of which may still be reading it. So a record is
withdrawn before what it announced is overwritten, and who has read rows looks at their record once more (`stands`).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from moe_a2a.elastic.lookout import Awaited, Lookout
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


def roll_of(step: Step) -> Roll:
    assert step.roll is not None  # of every step of an elastic group
    return step.roll


def own_host(roll: Roll, rank: int) -> tuple[int, ...]:
    return next(host for host in roll.hosts if rank in host)


def mask_of(ranks: Collection[int]) -> int:
    return sum(1 << rank for rank in ranks)


class Spots:
    """The places where one transport looks for records; kept, because to make one costs more than to look."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._kept: dict[int, Spot] = {}

    def at(self, step: Step, kind: Kind, owner: int, mailbox: int, sender: int) -> Spot:
        """The place of a record of `sender` in a mailbox of `owner`'s region, which no other sender uses."""
        at = self._arena.memory.position(owner, mailbox + RECORD_BYTES * kind)
        spot = self._kept.get(at)
        if spot is None:
            spot = self._kept[at] = Spot(self._arena.memory.bytes, at, kind)
        return spot.aim(step.number, roll_of(step).incarnations[sender])


def announce(arena: Arena, step: Step, kind: Kind, record: Record) -> None:
    at = arena.memory.position(arena.rank, arena.block(step).mailbox + RECORD_BYTES * kind)
    write_record(arena.memory.bytes, at, record)


class ElasticShared:
    """Transport between the ranks of one host."""

    def __init__(self, arena: Arena, lookout: Lookout, budget_s: float) -> None:
        self._arena, self._lookout, self._budget = arena, lookout, budget_s
        self.sources = arena.peers
        self._places = Spots(arena)
        #: (channel, parity, kind) -> where the records were that the last wait found.
        self._spots: dict[tuple[int, int, Kind], dict[int, Spot]] = {}

    def send_dispatch(self, step: Step) -> None:
        arena = self._arena
        arena.publish(step)
        announce(arena, step, Kind.DISPATCH, arena.record(step, Kind.DISPATCH, step.tokens))

    def recv_dispatch(self, step: Step) -> list[Arrival]:
        arena, at, roll = self._arena, self._arena.block(step).publish, roll_of(step)
        records = self._wait(step, Kind.DISPATCH, "dispatch")
        roll.epochs.update({rank: record.epoch for rank, record in records.items()})
        return [arena.arrival(step, rank, record, rank, at) for rank, record in sorted(records.items())]

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
        records = self._wait(step, Kind.COMBINE, "combine")
        check_discarded(step, records, discarded)
        # A rank that left this one out has no sums for it.
        records = {rank: record for rank, record in records.items() if record.mask >> arena.rank & 1}
        roll.returned.update(records)
        first = own_host(roll, arena.rank)[0]
        hits = step.outgoing.hits
        return {
            (first, rank): Contribution(np.flatnonzero(hits[:, rank]), arena.partials_row(step, rank, arena.rank))
            for rank in records
        }

    def torn(self, step: Step, kind: Kind, ranks: Collection[int]) -> set[int]:
        """Those of the ranks of this host that did not leave in place what they had announced."""
        spots = self._spots[step.channel, step.parity, kind]
        return {rank for rank in ranks if not spots[rank].stands()}

    def _spot(self, step: Step, kind: Kind, rank: int) -> Spot:
        return self._places.at(step, kind, rank, self._arena.block(step).mailbox, rank)

    def _wait(self, step: Step, kind: Kind, what: str, among: Collection[int] | None = None) -> dict[int, Record]:
        """Records of the ranks of this host that are not lost."""
        roll = roll_of(step)

        def awaited(rank: int) -> Awaited:
            return Awaited({rank: spots[rank]}, rank, lambda: self._lookout.lost(roll, rank), lambda: rank)

        here = own_host(roll, self._arena.rank)
        ranks = [rank for rank in here if among is None or rank in among]
        spots = {rank: self._spot(step, kind, rank) for rank in ranks}
        self._spots[step.channel, step.parity, kind] = spots
        found, lost = self._lookout.wait(step, {rank: awaited(rank) for rank in ranks}, self._budget, what)
        roll.missing.update(set(lost) - roll.left)
        return found

    def _weights(self, step: Step, rank: int, rows: int) -> FloatArray:
        return self._arena.weights(step, rank, self._arena.block(step).publish, rows)
