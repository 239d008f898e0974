"""Between hosts: a token crosses once per destination host, to the rail peer, and its combined row crosses once back.

Dispatch: tables and rows of the tokens that go to a host are packed into this rank's slot for that host; one engine
write copies the slot into its mirror in the rail peer's region; when the write is complete a second, small one delivers
the record that announces it (DESIGN.md D7). Forwarding costs nothing: every rank of that host has the rail peer's
region mapped, and reads record and rows there.

Combine: the ranks of a host leave their partial sums in their own regions; the rail peer of each source adds them up
into the source's slot and writes the rows back into the mirror slot that they came from.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np

from moe_a2a.errors import EngineError, MoeA2AError, RankLost
from moe_a2a.routing import Arrival, Contribution, bags, rank_hits
from moe_a2a.rows import sum_rows
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.engine import Engine
from moe_a2a.transport.progress import Progress
from moe_a2a.transport.protocol import SumOrder
from moe_a2a.transport.region import RegionLayout, Slot
from moe_a2a.transport.shared import check_discarded
from moe_a2a.transport.wait import CHECK_EVERY_S, Poll, Watch, out_of_time, wait_for
from moe_a2a.transport.wire import RECORD_BYTES, FloatArray, Kind, Record, Status

#: Share of the tokens from which on all are sent to a host: at most 3 % more bytes than needed.
NEARLY_ALL = 0.97


@dataclass(frozen=True)
class RemotePeer:
    """Where a rank of another host is reached: its engine's name and the address of its region in its own process."""

    engine: str
    address: int


class RailTransport:
    """Transport between this rank and the ranks of other hosts."""

    def __init__(
        self,
        arena: Arena,
        engine: Engine,
        peers: Mapping[int, RemotePeer],
        watch: Watch,
        progress: Progress,
        forward_budget_s: float,
        budget_s: float,
    ) -> None:
        """forward_budget_s: for waits whose failure is reported to ranks that wait for this one; budget_s: for the
        others."""
        self._arena, self._engine, self._peers = arena, engine, peers
        self._watch, self._progress = watch, progress
        self._forward_budget, self._budget = forward_budget_s, budget_s
        self._config, self._hosts = arena.config, arena.hosts
        self.sources = self._hosts.remote_ranks(arena.host)
        self._remote_hosts = self._hosts.remote_hosts(arena.host)
        self._rails = {host: self._hosts.rail(host, arena.rank) for host in self._remote_hosts}
        self._railed = self._hosts.sources_railed_to(arena.rank)
        self._receiver = {source: self._hosts.rail(arena.host, source) for source in self.sources}
        self._layouts = {host: RegionLayout.of(self._config, self._hosts, host) for host in self._remote_hosts}

    def send_dispatch(self, step: Step) -> None:
        arena, block = self._arena, self._arena.block(step)
        for host, rail in self._rails.items():
            rows = np.flatnonzero(step.outgoing.hits[:, list(self._hosts.ranks_of[host])].any(axis=1))
            slot = block.host_slots[host]
            at = slot.rows
            if len(rows) >= NEARLY_ALL * step.tokens:
                # Nearly all tokens go there: send the published ones as they lie. A few rows too many cost less than
                # a second copy.
                arena.publish(step)
                rows, at = arena.numbers[: step.tokens], block.publish
            else:
                arena.pack(step, at, rows)
            step.sent_to_host[host] = rows
            start = arena.tables(step, len(rows)).tokens
            nbytes = len(rows) * arena.row_bytes(step.row_format) - start if len(rows) else 0
            record = arena.record(step, Kind.DISPATCH, len(rows), nbytes=nbytes)
            self._start(step, rail, record, slot, self._mirror(step, host), at, start)

    def recv_dispatch(self, step: Step) -> list[Arrival]:
        records = self._wait(step, Kind.DISPATCH, "dispatch")
        step.traffic.dispatch_announced = time.monotonic_ns()
        slots = self._arena.block(step).source_slots
        return [
            self._arena.arrival(step, source, records[source], self._receiver[source], slots[source].rows)
            for source in self.sources
        ]

    def send_weights(self, step: Step, weights: FloatArray) -> None:
        arena = self._arena
        for host, rail in self._rails.items():
            rows = step.sent_to_host[host]
            slot = arena.block(step).host_slots[host]
            arena.weights(step, arena.rank, slot.rows, len(rows))[:] = weights[rows]
            record = arena.record(step, Kind.WEIGHTS, len(rows), nbytes=len(rows) * arena.config.top_k * 4)
            start = arena.tables(step, len(rows)).weights
            self._start(step, rail, record, slot, self._mirror(step, host), slot.rows, start)

    def recv_weights(self, step: Step) -> dict[int, FloatArray]:
        self._wait(step, Kind.WEIGHTS, "router weights")
        slots = self._arena.block(step).source_slots
        return {
            arrival.rank: self._arena.weights(
                step, self._receiver[arrival.rank], slots[arrival.rank].rows, len(arrival.ids)
            )
            for arrival in step.arrivals
            if arrival.rank in self._receiver
        }

    def send_combine(self, step: Step, discarded: bool) -> None:
        self._arena.announce(step, Kind.PARTIALS_AWAY, Status.DISCARDED if discarded else Status.OK)
        arrivals = {arrival.rank: arrival for arrival in step.arrivals}
        for source in self._railed:
            step.tasks.append(self._progress.start(self._reduce(step, arrivals[source]), source))

    def recv_combine(self, step: Step, discarded: bool = False) -> dict[SumOrder, Contribution]:
        arena, block = self._arena, self._arena.block(step)
        polls: dict[int, Poll] = {}
        for host, rail in self._rails.items():
            polls[rail] = arena.record_at(step, Kind.COMBINE, arena.rank, block.host_slots[host].inbox, rail)
        records = wait_for(polls, self._budget, self._watch, f"combine of {step}", step.wait_times)
        step.traffic.combine_announced = time.monotonic_ns()
        check_discarded(step, records, discarded)
        sums = {}
        for host, rail in self._rails.items():
            rows = step.sent_to_host[host]
            if not discarded and records[rail].rows != len(rows):
                raise MoeA2AError(
                    f"{step}: rank {rail} returned {records[rail].rows} rows of {len(rows)} that were sent"
                )
            first = arena.rows_at(arena.rank, block.host_slots[host].rows, RowFormat.PLAIN)
            sums[(host, self._hosts.ranks_of[host][0])] = Contribution(rows, first)
        return sums

    def _wait(self, step: Step, kind: Kind, what: str) -> dict[int, Record]:
        """Wait for the records of all ranks of other hosts."""
        polls = {source: self._from_source(step, source, kind) for source in self.sources}
        return wait_for(polls, self._forward_budget, self._watch, f"{what} of {step}", step.wait_times)

    def _from_source(self, step: Step, source: int, kind: Kind) -> Poll:
        """A poll for the record of a rank of another host, in its slot at its rail peer here."""
        inbox = self._arena.block(step).source_slots[source].inbox
        return self._arena.record_at(step, kind, self._receiver[source], inbox, source)

    # combine

    def _reduce(self, step: Step, arrival: Arrival) -> Generator[None, None, None]:
        """Add up this host's sums for one source and send them back: the rail peer's part of combine."""
        arena, source = self._arena, arrival.rank
        slot = arena.block(step).source_slots[source]
        target = self._layouts[self._hosts.host_of[source]].blocks[step.channel][step.parity].host_slots[arena.host]
        record = arena.record(step, Kind.COMBINE, len(arrival.ids), nbytes=len(arrival.ids) * self._config.row_bytes)
        try:
            records = yield from self._collect(step)
        except RankLost as error:
            missing = error.ranks[0] if error.ranks else arena.rank
            failed = record._replace(status=Status.FAULT, missing=missing, rows=0, nbytes=0)
            yield from self._transfer(step, source, failed, slot, target, slot.rows, 0)
            raise
        if any(r.status == Status.DISCARDED for r in records.values()):
            record = record._replace(status=Status.DISCARDED, rows=0, nbytes=0)
        elif len(arrival.ids):
            self._sum_partials(step, arrival, slot)
        yield from self._transfer(step, source, record, slot, target, slot.rows, 0)

    def _sum_partials(self, step: Step, arrival: Arrival, slot: Slot) -> None:
        """Rows of a source's slot = the sums of this host's partial rows, ranks ascending."""
        arena, world = self._arena, len(self._hosts.host_of)
        hits = rank_hits(arrival.ids, self._config.local_experts(world), world)
        parts = [
            Contribution(np.flatnonzero(hits[:, peer]), arena.partials_row(step, peer, arrival.rank))
            for peer in arena.peers
        ]
        index, offsets = bags(len(arrival.ids), parts)
        out = arena.own_rows(slot.rows, len(arrival.ids), RowFormat.PLAIN)
        sum_rows(arena.table(RowFormat.PLAIN), index, offsets, out)

    def _collect(self, step: Step) -> Generator[None, None, dict[int, Record]]:
        """Wait, task fashion, until every rank of this host has left its sums for other hosts."""
        polls = {peer: self._arena.announced(step, Kind.PARTIALS_AWAY, peer) for peer in self._arena.peers}
        found: dict[int, Record] = {}
        started = checked = time.monotonic()
        lost: RankLost | None = None
        while True:
            for peer in list(polls):
                record = polls[peer]()
                if record is not None:
                    del polls[peer]
                    found[peer] = record
            if not polls:
                return found
            if lost is not None:  # what came before the loss was seen has been read by now
                raise lost
            now = time.monotonic()
            if now - started > self._forward_budget:
                raise out_of_time(f"combine of {step}", list(polls), self._forward_budget, self._watch)
            if now - checked >= CHECK_EVERY_S:
                checked = now
                try:
                    self._watch.check(polls.keys())
                except RankLost as error:
                    lost = error.with_traceback(None)  # which would keep the callers alive, in a circle
                    continue
            yield

    # the engine

    def _mirror(self, step: Step, host: int) -> Slot:
        """The slot of this rank in the region of a rank of `host`."""
        return self._layouts[host].blocks[step.channel][step.parity].source_slots[self._arena.rank]

    def _start(self, step: Step, peer: int, record: Record, slot: Slot, mirror: Slot, at: int, start: int) -> None:
        step.tasks.append(self._progress.start(self._transfer(step, peer, record, slot, mirror, at, start), peer))

    def _transfer(
        self, step: Step, peer: int, record: Record, slot: Slot, mirror: Slot, at: int, start: int
    ) -> Generator[None, None, None]:
        """Write `record.nbytes` from `start`, relative to the row at offset `at`, to the same place of the mirror;
        when that is complete, write the record."""
        arena, traffic = self._arena, step.traffic
        own = arena.memory.address(arena.index[arena.rank])
        if record.kind == Kind.COMBINE:
            traffic.combine_posted = traffic.combine_posted or time.monotonic_ns()
        else:
            traffic.dispatch_posted = traffic.dispatch_posted or time.monotonic_ns()
        if record.nbytes:
            yield from self._write(peer, own + at + start, mirror.rows + start, record.nbytes)
        outbox, inbox = slot.outbox + RECORD_BYTES * record.kind, mirror.inbox + RECORD_BYTES * record.kind
        place = arena.memory.position(arena.index[arena.rank], outbox)
        arena.memory.bytes[place : place + RECORD_BYTES] = record.pack()
        yield from self._write(peer, own + outbox, inbox, RECORD_BYTES)
        traffic.wire_bytes += record.nbytes + RECORD_BYTES

    def _write(self, peer: int, source: int, target: int, nbytes: int) -> Generator[None, None, None]:
        """One engine write to an offset of a peer's region, until it is applied there. Raises RankLost naming the
        peer."""
        remote = self._peers[peer]
        started = time.monotonic()
        try:
            batch = self._engine.submit_write(remote.engine, source, remote.address + target, nbytes)
            while not self._engine.is_done(batch, remote.engine):
                if time.monotonic() - started > self._budget:
                    raise EngineError(f"a write of {nbytes} bytes did not end within {self._budget:g} s")
                yield
        except EngineError as error:
            raise RankLost(f"rank {peer} ({remote.engine}) could not be written to: {error}", [peer]) from error

    def greet(self, timeout_s: float) -> None:
        """Write one record to every rail peer, so that a peer that cannot be reached is known before the first step.
        Raises RankLost with rank, address and time."""
        arena = self._arena
        for host, rail in self._rails.items():
            started = time.monotonic()
            block = arena.layout.blocks[0][0]
            mirror = self._layouts[host].blocks[0][0].source_slots[arena.rank]
            own = arena.memory.address(arena.index[arena.rank]) + block.host_slots[host].outbox
            try:
                for _ in self._write(rail, own, mirror.inbox, RECORD_BYTES):
                    time.sleep(1e-4)
            except RankLost as error:
                took = time.monotonic() - started
                raise RankLost(f"{error} (after {took:.1f} s)", [rail]) from error
