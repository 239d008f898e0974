"""Writes to other hosts: a step's rows to one live rank of each host, or to the next one if that is lost first.

Work is task fashion: generators that yield while they wait (transport/progress.py).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Mapping

from moe_a2a.elastic.lookout import Lookout
from moe_a2a.elastic.shared import roll_of
from moe_a2a.errors import EngineError
from moe_a2a.step import Roll, Step
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.engine import Engine
from moe_a2a.transport.rail import RemotePeer
from moe_a2a.transport.region import Slot
from moe_a2a.transport.wait import CHECK_EVERY_S
from moe_a2a.transport.wire import RECORD_BYTES, FloatArray, Kind, Record, withdrawn

#: Share of the time-out: a write that hangs is noticed before those who wait for what it carries give up.
_WRITE_SHARE = 0.5

Work = Generator[None, None, None]


def around(host: tuple[int, ...], home: tuple[int, ...], rank: int) -> list[int]:
    """The ranks of a host in the order in which a rank of another one, `home`, prefers them as rail peers."""
    begin = home.index(rank)
    return [host[(begin + i) % len(host)] for i in range(len(host))]


class Delivery:
    """What one rank writes into regions of other hosts. peers: where they are; more may come."""

    def __init__(
        self, arena: Arena, engine: Engine, peers: Mapping[int, RemotePeer], lookout: Lookout, timeout_s: float
    ) -> None:
        self._arena, self._engine, self._peers = arena, engine, peers
        self._lookout, self._timeout = lookout, timeout_s
        #: (channel, parity, rank) of slots from which somebody may still be reading rows of an earlier step.
        self._dirty: set[tuple[int, int, int]] = set()

    def read_by_others(self, step: Step, rail: int) -> None:
        """Some of a rail peer's host took no part in a step: they may still be reading this rank's rows."""
        self._dirty.add((step.channel, step.parity, rail))

    def next_rail(self, step: Step, host: tuple[int, ...], tried: Collection[int] = ()) -> int | None:
        """The live rank of a host that this rank sends to: the one at this rank's place, or one of those after it."""
        roll = roll_of(step)
        for rank in around(host, roll.here, self._arena.rank):
            if rank in self._peers and rank not in tried and not self._lookout.lost(roll, rank):
                return rank
        return None

    def bring_rows(self, step: Step, place: int, first: int, record: Record, at: int, start: int) -> Work:
        """Bring this rank's rows to a host: to its rail peer there, `first`, or to another one if that is lost."""
        roll, block = roll_of(step), self._arena.block(step)
        host = roll.hosts[place]
        rail: int | None = first
        tried: list[int] = []
        while rail is not None:
            mirror = block.source_slots[self._arena.rank]
            sent = yield from self.transfer(step, rail, record, block.host_slots[rail], mirror, at, start)
            if sent:
                if tried:
                    roll.resent.add(place)
                roll.rails[place] = rail
                return
            tried.append(rail)
            rail = self.next_rail(step, host, tried)

    def bring_weights(self, step: Step, place: int, weights: FloatArray) -> Work:
        """Bring weights to where the rows are."""
        arena, roll, block = self._arena, roll_of(step), self._arena.block(step)
        while place not in roll.rails:
            if self.next_rail(step, roll.hosts[place]) is None:
                return
            yield
        rail, rows = roll.rails[place], len(weights)
        slot, mirror = block.host_slots[rail], block.source_slots[arena.rank]
        arena.weights(step, arena.rank, slot.rows, rows)[:] = weights
        record = arena.record(step, Kind.WEIGHTS, rows, nbytes=rows * arena.config.top_k * 4)
        yield from self.transfer(step, rail, record, slot, mirror, slot.rows, arena.tables(step, rows).weights)

    def transfer(
        self, step: Step, peer: int, record: Record, slot: Slot, mirror: Slot, at: int, start: int
    ) -> Generator[None, None, bool]:
        """Write `record.nbytes` from `start`, relative to the row at offset `at`, to the same place of the mirror;
        when that is complete, write the record. False if the peer is lost."""
        arena, traffic, roll = self._arena, step.traffic, roll_of(step)
        if record.kind == Kind.COMBINE:
            traffic.combine_posted = traffic.combine_posted or time.monotonic_ns()
        else:
            traffic.dispatch_posted = traffic.dispatch_posted or time.monotonic_ns()
        own = arena.memory.address(arena.rank)
        outbox, inbox = slot.outbox + RECORD_BYTES * record.kind, mirror.inbox + RECORD_BYTES * record.kind
        place = arena.memory.position(arena.rank, outbox)
        used = (step.channel, step.parity, peer)
        if used in self._dirty and record.kind == Kind.DISPATCH:
            arena.memory.bytes[place : place + RECORD_BYTES] = withdrawn(step.number)
            if not (yield from self._write(roll, peer, own + outbox, inbox, RECORD_BYTES)):
                return False
            self._dirty.discard(used)
        if record.nbytes and not (
            yield from self._write(roll, peer, own + at + start, mirror.rows + start, record.nbytes)
        ):
            return False
        arena.memory.bytes[place : place + RECORD_BYTES] = record.pack()
        if not (yield from self._write(roll, peer, own + outbox, inbox, RECORD_BYTES)):
            return False
        traffic.wire_bytes += record.nbytes + RECORD_BYTES
        return True

    def _write(self, roll: Roll, peer: int, source: int, target: int, nbytes: int) -> Generator[None, None, bool]:
        """One engine write to an offset of a peer's region, until it is applied there. False if the peer is lost; one
        that cannot be written to is accused."""
        remote = self._peers.get(peer)
        if remote is None:  # it came to its slot while this rank could not reach it, and has been accused
            return False
        started = checked = time.monotonic()
        try:
            batch = self._engine.submit_write(remote.engine, source, remote.address + target, nbytes)
            while not self._engine.is_done(batch, remote.engine):
                now = time.monotonic()
                if now - checked >= CHECK_EVERY_S:
                    checked = now
                    if self._lookout.lost(roll, peer):
                        return False
                    if now - started > _WRITE_SHARE * self._timeout:
                        raise EngineError(f"a write of {nbytes} bytes did not end within {now - started:.1f} s")
                yield
        except EngineError as error:
            self._lookout.accuse(roll, peer, f"{remote.engine} could not be written to: {error}")
            return False
        return True
