"""Running this package's steps for the benchmark: whole steps, and steps that only move rows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from moe_a2a.all_to_all import AllToAll
from moe_a2a.fp8 import ScaleFormat, quantize
from moe_a2a.routing import rank_hits
from moe_a2a.step import Outgoing, RowFormat, Step
from moe_a2a.transport.rail import RailTransport
from moe_a2a.transport.wire import Tables
from moe_a2a.workload import Inputs


@dataclass(frozen=True)
class Stamps:
    """First post and last announcement of this rank, CLOCK_MONOTONIC in ns, for dispatch and for combine; 0 without a
    network."""

    dispatch: tuple[int, int]
    combine: tuple[int, int]


def outgoing(inputs: Inputs, fp8: ScaleFormat | None, experts: int, world: int) -> tuple[Outgoing, RowFormat]:
    """Inputs as rows to be sent, quantised if asked for. experts: E_l."""
    rows, scales, row_format = inputs.x, None, RowFormat.PLAIN
    if fp8 is not None:
        q, scales = quantize(rows, fp8 != "fp32")
        rows, row_format = q.view(torch.uint8), RowFormat.FP8
    ids = inputs.topk_ids.numpy().astype(np.int32)
    weights = inputs.topk_weights.numpy()
    return Outgoing(rows, ids, weights, scales, rank_hits(ids, experts, world)), row_format


class TransportOnly:
    """Moves one case's rows through an AllToAll's transports without replicating or summing any.

    Inside a host the reductions of combine write where the rows are read, so that moving them is an announcement;
    between hosts rows are packed, written, announced, and written back.
    """

    def __init__(self, a2a: AllToAll, inputs: Inputs, fp8: ScaleFormat | None) -> None:
        self._a2a = a2a
        self._outgoing, self._format = outgoing(inputs, fp8, a2a.local_experts, a2a.world_size)

    def prepare(self) -> Step:
        """Open a step and publish its rows; nothing is announced or posted yet."""
        a2a = self._a2a
        a2a._number[0] += 1
        step = Step(0, a2a.config.channels[0], a2a._number[0], self._format, self._outgoing)
        a2a._open[0].append(step)
        a2a._arena.publish(step)
        return step

    def run(self, step: Step) -> Stamps:
        """Both directions of a step."""
        a2a = self._a2a
        with self._no_sums():
            a2a._each(lambda transport: transport.send_dispatch(step))
            a2a._receive(step)
            a2a._each(lambda transport: transport.send_combine(step, False))
            a2a._each(lambda transport: transport.recv_combine(step))
            a2a._finish(step)
        traffic = step.traffic
        return Stamps(
            (traffic.dispatch_posted, traffic.dispatch_announced), (traffic.combine_posted, traffic.combine_announced)
        )

    @contextmanager
    def _no_sums(self) -> Iterator[None]:
        rails = [t for t in self._a2a._transports if isinstance(t, RailTransport)]
        for rail in rails:
            rail._sum_partials = lambda *_: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            for rail in rails:
                del rail._sum_partials


class RawEngine:
    """Raw Transfer Engine writes: as many bytes as a step's, between the same processes and places, announced to
    nobody."""

    def __init__(self, a2a: AllToAll, inputs: Inputs, fp8: ScaleFormat | None) -> None:
        self._format = RowFormat.PLAIN if fp8 is None else RowFormat.FP8
        self._rail = next(t for t in a2a._transports if isinstance(t, RailTransport))
        self._arena = a2a._arena
        ids = inputs.topk_ids.numpy().astype(np.int32)
        hits = rank_hits(ids, a2a.local_experts, a2a.world_size)
        hosts = a2a._meeting.hosts
        self._there = {
            host: int(hits[:, list(hosts.ranks_of[host])].any(axis=1).sum())
            for host in hosts.remote_hosts(self._arena.host)
        }

    def dispatch(self) -> tuple[int, int]:
        """Write this rank's rows to its rail peers. Returns (first post, last completion)."""
        arena, rail = self._arena, self._rail
        block = arena.layout.blocks[0][0]
        writes = []
        for host, rows in self._there.items():
            mirror = rail._layouts[host].blocks[0][0].source_slots[arena.rank]
            groups = 0 if self._format == RowFormat.PLAIN else arena.config.groups
            tables = -Tables.of(rows, arena.config.top_k, groups).tokens
            nbytes = rows * arena.row_bytes(self._format) + tables
            writes.append((rail._rails[host], block.host_slots[host].rows - tables, mirror.rows - tables, nbytes))
        return self._write(writes)

    def combine(self, rows_of: dict[int, int]) -> tuple[int, int]:
        """Write back as many rows as came from each source that this rank is the rail peer of. rows_of: source ->
        rows."""
        arena, rail = self._arena, self._rail
        block = arena.layout.blocks[0][0]
        writes = []
        for source in rail._railed:
            target = rail._layouts[arena.hosts.host_of[source]].blocks[0][0].host_slots[arena.host]
            writes.append(
                (source, block.source_slots[source].rows, target.rows, rows_of[source] * arena.config.row_bytes)
            )
        return self._write(writes)

    @property
    def rows_sent(self) -> dict[int, int]:
        """Host -> rows that this rank sends there."""
        return self._there

    def _write(self, writes: list[tuple[int, int, int, int]]) -> tuple[int, int]:
        rail, engine = self._rail, self._rail._engine
        own = self._arena.memory.address(self._arena.index[self._arena.rank])
        started = time.monotonic_ns()
        batches = []
        for peer, source, target, nbytes in writes:
            remote = rail._peers[peer]
            batches.append(
                (engine.submit_write(remote.engine, own + source, remote.address + target, nbytes), remote.engine)
            )
        idle = 0
        while batches:
            batches = [(batch, peer) for batch, peer in batches if not engine.is_done(batch, peer)]
            idle += 1
            if idle < 30:
                os.sched_yield()
            else:
                time.sleep(20e-6)
        return started, time.monotonic_ns()
