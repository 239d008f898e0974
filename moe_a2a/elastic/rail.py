"""Between hosts of an elastic group: as transport/rail.py, with rail peers that are replaced when they are lost.

A sender delivers a step's rows to one live rank of each host; if that one is lost before it has them, to the next one.
Ranks of that host look for a source's record in the regions of all of them, so that they need not agree on who is the
rail peer. Whoever has a source's rows in its own region adds up that source's sums.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moe_a2a.elastic.delivery import Delivery, Work, around
from moe_a2a.elastic.lookout import Awaited, Lookout
from moe_a2a.elastic.shared import Spots, Where, announce, mask_of, read_arrivals, roll_of
from moe_a2a.routing import Arrival, Contribution, bags, rank_hits
from moe_a2a.rows import sum_rows
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.engine import Engine
from moe_a2a.transport.progress import Progress
from moe_a2a.transport.protocol import SumOrder
from moe_a2a.transport.rail import NEARLY_ALL, RemotePeer
from moe_a2a.transport.region import Slot
from moe_a2a.transport.shared import check_discarded
from moe_a2a.transport.wait import CHECK_EVERY_S
from moe_a2a.transport.wire import RECORD_BYTES, FloatArray, Kind, Record, Spot, Status, withdraw

#: Share of the time-out that a rank waits for a source: others wait for its sums.
_SOURCE_SHARE = 0.8


class ElasticRail:
    """Transport between this rank and the ranks of other hosts. peers: where they are; more may come."""

    def __init__(
        self,
        arena: Arena,
        engine: Engine,
        peers: Mapping[int, RemotePeer],
        lookout: Lookout,
        progress: Progress,
        timeout_s: float,
    ) -> None:
        self._arena, self._lookout, self._progress, self._timeout = arena, lookout, progress, timeout_s
        self._delivery = Delivery(arena, engine, peers, lookout, timeout_s)
        self._config = arena.config
        self.sources = tuple(range(len(arena.peers)))
        self._rows = Spots(arena, Kind.DISPATCH, self._inboxes)
        self._weights = Spots(arena, Kind.WEIGHTS, self._inboxes)
        self._partials = Spots(arena, Kind.PARTIALS_AWAY, self._mailboxes)
        self._sums = Spots(arena, Kind.COMBINE, self._own_inboxes)

    # dispatch

    def send_dispatch(self, step: Step) -> None:
        arena, block, roll = self._arena, self._arena.block(step), roll_of(step)
        for place, host in roll.away:
            first = self._delivery.next_rail(step, host)
            if first is None:
                continue
            rows = np.flatnonzero(step.outgoing.hits[:, list(host)].any(axis=1))
            at = block.host_slots[first].rows
            if len(rows) >= NEARLY_ALL * step.tokens:
                arena.publish(step)
                rows, at = arena.numbers[: step.tokens], block.publish
            else:
                arena.pack(step, at, rows)
            step.sent_to_host[place] = rows
            start = arena.tables(step, len(rows)).tokens
            nbytes = len(rows) * arena.row_bytes(step.row_format) - start if len(rows) else 0
            record = arena.record(step, Kind.DISPATCH, len(rows), nbytes=nbytes, mask=roll.finished)
            self._begin(step, self._delivery.bring_rows(step, place, first, record, at, start))

    def recv_dispatch(self, step: Step) -> list[Arrival]:
        roll, slots = roll_of(step), self._arena.block(step).source_slots
        found = self._from_sources(step, self._rows.of(step, roll), "dispatch")
        step.traffic.dispatch_announced = time.monotonic_ns()
        arrivals = read_arrivals(self._arena, step, found, lambda source: slots[source].rows)
        roll.holders.update((arrival.rank, found[arrival.rank][1].owner) for arrival in arrivals)
        return arrivals

    def send_weights(self, step: Step, weights: FloatArray) -> None:
        for place, rows in step.sent_to_host.items():
            self._begin(step, self._delivery.bring_weights(step, place, weights[rows]))

    def recv_weights(self, step: Step) -> dict[int, FloatArray]:
        roll, slots = roll_of(step), self._arena.block(step).source_slots
        spots = {source: spots for source, spots in self._weights.of(step, roll).items() if source in roll.holders}
        came = self._from_sources(step, spots, "router weights")
        found = {}
        for arrival in step.arrivals:
            if arrival.rank in came:
                (_, spot), rows = came[arrival.rank], slots[arrival.rank].rows
                found[arrival.rank] = self._arena.weights(step, spot.owner, rows, len(arrival.ids)).copy()
        return found

    # combine

    def send_combine(self, step: Step, discarded: bool) -> None:
        arena, roll = self._arena, roll_of(step)
        status = Status.DISCARDED if discarded else Status.OK
        record = arena.record(step, Kind.PARTIALS_AWAY, status=status, mask=mask_of(roll.summed))
        announce(arena, step, Kind.PARTIALS_AWAY, record)
        for arrival in step.arrivals:
            holder = roll.holders.get(arrival.rank)
            if holder == arena.rank or (holder is not None and self._stands_in(step, arrival.rank, holder)):
                self._begin(step, self._reduce(step, arrival))

    def recv_combine(self, step: Step, discarded: bool = False) -> dict[SumOrder, Contribution]:
        arena, block, roll = self._arena, self._arena.block(step), roll_of(step)
        spots = self._sums.of(step, roll)
        if len(step.sent_to_host) < len(spots):
            spots = {place: spots[place] for place in step.sent_to_host}
        found, _ = self._lookout.wait(step, spots, self._timeout, "combine", lambda place: self._sums_of(step, place))
        step.traffic.combine_announced = time.monotonic_ns()
        check_discarded(step, {roll.hosts[place][0]: record for place, (record, _) in found.items()}, discarded)
        sums = {}
        for place, (record, spot) in found.items():
            host, rows, rail = roll.hosts[place], step.sent_to_host[place], spot.sender
            returned = {r for r in host if record.mask >> r & 1}
            roll.returned.update(returned)
            if returned != set(host):
                self._delivery.read_by_others(step, rail)
            if record.rows == len(rows) and not discarded:
                first = arena.rows_at(arena.rank, block.host_slots[rail].rows, RowFormat.PLAIN)
                sums[(host[0], rail)] = Contribution(rows, first)
        return sums

    def _sums_of(self, step: Step, place: int) -> Awaited:
        roll = roll_of(step)
        host = roll.hosts[place]

        def blame() -> int | None:
            # If rows were sent a second time, the second one may have thought that the first has them.
            return None if place in roll.resent else roll.rails.get(place)

        def gone() -> bool:
            rail = roll.rails.get(place)
            if rail is None:  # it is still being delivered, unless nobody is left
                return self._delivery.next_rail(step, host) is None
            return self._lookout.lost(roll, rail) or self._has_finished(step, rail)

        return Awaited(host[0], gone, blame)

    def _reduce(self, step: Step, arrival: Arrival) -> Work:
        """Add up this host's sums for one source and send them back: the rail peer's part of combine."""
        arena, source, rows = self._arena, arrival.rank, len(arrival.ids)
        slot, target = arena.block(step).source_slots[source], arena.block(step).host_slots[arena.rank]
        spots = {rank: spot for rank, (spot,) in self._partials.of(step, roll_of(step)).items()}
        found: dict[int, Record] = {}
        yield from self._collect(step, spots, found)
        summed = {rank for rank, record in found.items() if record.mask >> source & 1}
        if any(record.status == Status.DISCARDED for record in found.values()):
            record = arena.record(step, Kind.COMBINE, status=Status.DISCARDED, mask=mask_of(summed))
        else:
            if len(found) < len(spots):  # one that was left out may still be reading these rows
                at = arena.memory.position(arena.rank, slot.inbox + RECORD_BYTES * Kind.DISPATCH)
                withdraw(arena.memory.bytes, at, step.number + 1)
            while rows:
                self._sum_partials(step, arrival, slot, summed)
                torn = {rank for rank in summed if not spots[rank].stands(step.number)}  # if this rank is late
                if not torn:
                    break
                summed -= torn
            nbytes = rows * self._config.row_bytes
            record = arena.record(step, Kind.COMBINE, rows, nbytes=nbytes, mask=mask_of(summed))
        yield from self._delivery.transfer(step, source, record, slot, target, slot.rows, 0)

    def _sum_partials(self, step: Step, arrival: Arrival, slot: Slot, summed: Collection[int]) -> None:
        """Rows of a source's slot = the sums of these ranks' partial rows, ranks ascending."""
        arena, slots = self._arena, len(self.sources)
        hits = rank_hits(arrival.ids, self._config.local_experts(slots), slots)
        parts = [
            Contribution(np.flatnonzero(hits[:, peer]), arena.partials_row(step, peer, arrival.rank))
            for peer in sorted(summed)
        ]
        index, offsets = bags(len(arrival.ids), parts)
        out = arena.own_rows(slot.rows, len(arrival.ids), RowFormat.PLAIN)
        sum_rows(arena.table(RowFormat.PLAIN), index, offsets, out)

    def _collect(self, step: Step, all_spots: Mapping[int, Spot], found: dict[int, Record]) -> Work:
        """Wait, task fashion, until every rank of this host that is not lost has left its sums for other hosts."""
        roll, number, spots = roll_of(step), step.number, dict(all_spots)
        started = checked = time.monotonic()
        gone: set[int] = set()
        while True:
            for peer in list(spots):
                record = spots[peer].poll(number)
                if record is not None:
                    found[peer] = record
                if record is not None or peer in gone:
                    del spots[peer]
            if not spots:
                return
            now = time.monotonic()
            if now - checked >= CHECK_EVERY_S:
                checked = now
                gone.update(
                    p for p in spots if self._lookout.lost(roll, p) or p in roll.left or spots[p].passed(number)
                )
                budget = _SOURCE_SHARE * self._timeout
                for peer in spots.keys() - gone if now - started > budget else ():
                    if self._lookout.excused(peer, started):
                        continue
                    if not self._lookout.waits(peer):  # else others make it wait, and this step does without its sums
                        self._lookout.accuse(roll, peer, f"combine of {step}: no sums for other hosts in time")
                    gone.add(peer)
            yield

    # who and where

    def _inboxes(self, step: Step) -> dict[int, list[Where]]:
        """Where a source's record may be: with its rail peer, or, if that was lost, with another rank of this host."""
        roll, slots = roll_of(step), self._arena.block(step).source_slots
        return {
            source: [(holder, slots[source].inbox, source) for holder in around(roll.here, host, source)]
            for _, host in roll.away
            for source in host
        }

    def _mailboxes(self, step: Step) -> dict[int, list[Where]]:
        mailbox = self._arena.block(step).mailbox
        return {rank: [(rank, mailbox, rank)] for rank in roll_of(step).here}

    def _own_inboxes(self, step: Step) -> dict[int, list[Where]]:
        """Where a host's sums may come, by place in the roll: from the rail peer there, or the one that replaced it."""
        roll, slots, rank = roll_of(step), self._arena.block(step).host_slots, self._arena.rank
        return {
            place: [(rank, slots[rail].inbox, rail) for rail in around(host, roll.here, rank)]
            for place, host in roll.away
        }

    def _stands_in(self, step: Step, source: int, holder: int) -> bool:
        """Whether this rank sends a source its host's sums in place of one that was lost: it has its rows too, because
        the source saw the other one die before it knew that they had arrived."""
        roll = roll_of(step)
        own = next(spot for spot in self._rows.of(step, roll)[source] if spot.owner == self._arena.rank)
        return self._lookout.lost(roll, holder) and own.poll(step.number) is not None

    def _has_finished(self, step: Step, rank: int) -> bool:
        """Whether a rank of another host has dispatched the next step and finished this one before: what has not come
        from it by now never will, because it took somebody else for the one who has to send it."""
        later = replace(step, number=step.number + 1)
        found = [spot.poll(later.number) for spot in self._rows.of(later, roll_of(step))[rank]]
        return any(record is not None and record.finished >= step.number for record in found)

    def _from_sources(
        self, step: Step, spots: Mapping[int, Sequence[Spot]], what: str
    ) -> dict[int, tuple[Record, Spot]]:
        """The records of sources, and where they were."""
        roll = roll_of(step)

        def about(source: int) -> Awaited:
            return Awaited(
                source, lambda: self._lookout.lost(roll, source) or self._has_finished(step, source), lambda: source
            )

        if not roll.missing.isdisjoint(roll.here):  # then the likeliest place is with somebody else
            spots = {key: sorted(there, key=lambda spot: spot.owner in roll.missing) for key, there in spots.items()}
        found, lost = self._lookout.wait(step, spots, _SOURCE_SHARE * self._timeout, what, about)
        roll.missing.update(set(lost) - roll.left)
        return found

    def _begin(self, step: Step, work: Work) -> None:
        step.tasks.append(self._progress.start(work))
