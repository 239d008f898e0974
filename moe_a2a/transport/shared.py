"""Shared memory inside a host: a token is published once, its readers take it from where it lies.

Dispatch copies a rank's own tokens into its own region, once, however many ranks want them; the receivers' permute reads them
there. The sums of combine are written by their reduction straight into the own region and read there by the source's sum.
No row is copied for the sake of transport more than once, and no rank writes another rank's memory.
"""

from __future__ import annotations

import numpy as np

from moe_a2a.errors import HandleError, MoeA2AError
from moe_a2a.routing import Arrival, Contribution
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.protocol import SumOrder
from moe_a2a.transport.wait import Watch, named, wait_for
from moe_a2a.transport.wire import FloatArray, Kind, Record, Status


def check_header(step: Step, rank: int, record: Record, most_tokens: int) -> None:
    """Believe a dispatch record only if it fits this step. Raises MoeA2AError."""
    if record.format != step.format_code:
        raise MoeA2AError(
            f"{step}: rank {rank} dispatched {describe_format(record.format)}, this rank {describe_format(step.format_code)}; "
            "every rank must give the same fp8= and either all or none must give topk_weights at dispatch"
        )
    if record.rows > most_tokens or record.tokens > most_tokens:
        raise MoeA2AError(
            f"{step}: rank {rank} announces {record.rows} rows of {record.tokens} tokens; at most {most_tokens} fit"
        )


def describe_format(code: int) -> str:
    kind = {
        RowFormat.PLAIN: "plain rows",
        RowFormat.FP8: "FP8 rows",
        RowFormat.FP8_POW2: "FP8 rows with power-of-two scales",
    }
    return f"{kind[RowFormat(code % 16)]} {'with' if code >= 16 else 'without'} router weights"


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
        self._groups = arena.config.groups
        self._top_k = arena.config.top_k
        self._numbers = np.arange(arena.config.max_tokens_per_rank, dtype=np.int32)

    def send_dispatch(self, step: Step) -> None:
        arena, block, out, tokens = self._arena, self._arena.block(step), step.outgoing, step.tokens
        if tokens:
            self._table(arena.rank, block.ids, tokens, self._top_k, np.int32)[:] = out.ids
            if out.weights is not None:
                self._table(arena.rank, block.weights, tokens, self._top_k, np.float32)[:] = out.weights
            if out.scales is not None:
                self._table(arena.rank, block.scales, tokens, self._groups, np.float32)[:] = out.scales.numpy()
            arena.own_rows(block.rows, tokens, step.row_format).copy_(out.rows)
        arena.announce(step, Kind.DISPATCH, rows=tokens)

    def recv_dispatch(self, step: Step) -> list[Arrival]:
        arena, block = self._arena, self._arena.block(step)
        records = self._wait(step, Kind.DISPATCH, "dispatch")
        arrivals = []
        for rank in self.sources:
            check_header(step, rank, records[rank], arena.config.max_tokens_per_rank)
            rows = records[rank].rows
            scales = None
            if step.row_format != RowFormat.PLAIN:
                scales = self._table(rank, block.scales, rows, self._groups, np.float32)
            arrivals.append(
                Arrival(
                    rank,
                    self._numbers[:rows],
                    self._table(rank, block.ids, rows, self._top_k, np.int32),
                    self._weights(step, rank, rows) if step.has_weights else None,
                    scales,
                    arena.rows_at(step, rank, block.rows, step.row_format),
                )
            )
        return arrivals

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

    def close(self) -> None:
        """Nothing of its own: the memory belongs to the object."""

    def _wait(self, step: Step, kind: Kind, what: str) -> dict[int, Record]:
        polls = {rank: self._arena.announced(step, kind, rank) for rank in self.sources}
        return wait_for(polls, self._budget, self._watch, f"{what} of {step}", step.tasks)

    def _weights(self, step: Step, rank: int, rows: int) -> FloatArray:
        table: FloatArray = self._table(rank, self._arena.block(step).weights, rows, self._top_k, np.float32)
        return table

    def _table(self, rank: int, offset: int, rows: int, columns: int, dtype: type) -> np.ndarray:  # type: ignore[type-arg]
        memory = self._arena.memory
        at = memory.position(self._arena.index[rank], offset)
        return np.frombuffer(memory.bytes, dtype=dtype, count=rows * columns, offset=at).reshape(rows, columns)
