"""Who gets which token, and where: pure functions over expert ids. Numpy arrays in, numpy arrays out.

Everything follows (source rank, token, k) order, so equal inputs give equal outputs, bit for bit (DESIGN.md D2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_a2a.transport.wire import FloatArray, IntArray, LongArray

BoolArray = npt.NDArray[np.bool_]


def rank_hits(ids: IntArray, experts_per_rank: int, world_size: int) -> BoolArray:
    """[T, R]: does token t go to rank r. ids: int32 [T, K], -1 for no expert."""
    owner = np.where(ids >= 0, ids // experts_per_rank, world_size)
    hits = np.zeros((len(ids), world_size + 1), dtype=np.bool_)
    hits[np.arange(len(ids))[:, None], owner] = True
    return hits[:, :world_size]


@dataclass(frozen=True)
class Arrival:
    """What one source rank sent to this rank's host in one step.

    tokens: int32 [n], the tokens' numbers at their source; ids: int32 [n, K]; weights: fp32 [n, K] or None;
    scales: fp32 [n, G] or None (FP8 rows only); first_row: row of the first token in the host's memory table.
    """

    rank: int
    tokens: IntArray
    ids: IntArray
    weights: FloatArray | None
    scales: FloatArray | None
    first_row: int


@dataclass(frozen=True)
class Received:
    """The tokens that have an expert on this rank, over all arrivals, N in all, and their P (token, expert) pairs.

    arrival_rows: per arrival, which of its rows are meant for this rank; table_rows: int64 [N]; source: int32 [N, 2] of
    (source rank, token); local_ids: int32 [N, K], -1 elsewhere; pair_row, pair_k, pair_expert: int64 [P], in (source,
    token, k) order.
    """

    arrival_rows: tuple[LongArray, ...]
    table_rows: LongArray
    source: IntArray
    local_ids: IntArray
    pair_row: LongArray
    pair_k: LongArray
    pair_expert: LongArray

    @property
    def rows_per_arrival(self) -> list[int]:
        return [len(rows) for rows in self.arrival_rows]


def receive(arrivals: Sequence[Arrival], first_expert: int, experts: int, top_k: int) -> Received:
    """Pick what is meant for the rank that owns `experts` experts from `first_expert` on."""
    picked: list[LongArray] = []
    table_rows: list[LongArray] = []
    source: list[IntArray] = []
    local: list[IntArray] = []
    for arrival in arrivals:
        ids = arrival.ids - first_expert
        ids = np.where((arrival.ids >= 0) & (ids >= 0) & (ids < experts), ids, -1).astype(np.int32)
        rows = np.flatnonzero((ids >= 0).any(axis=1)).astype(np.int64)
        picked.append(rows)
        table_rows.append(arrival.first_row + rows)
        source.append(np.stack([np.full(len(rows), arrival.rank, np.int32), arrival.tokens[rows]], axis=1))
        local.append(ids[rows])
    local_ids = np.concatenate(local) if local else np.zeros((0, top_k), np.int32)
    pair_row, pair_k = np.nonzero(local_ids >= 0)
    return Received(
        tuple(picked),
        np.concatenate(table_rows) if table_rows else np.zeros(0, np.int64),
        np.concatenate(source) if source else np.zeros((0, 2), np.int32),
        local_ids,
        pair_row,
        pair_k,
        local_ids[pair_row, pair_k].astype(np.int64),
    )


@dataclass(frozen=True)
class Placement:
    """Where each (token, expert) pair goes in an output that is grouped by expert.

    slot: int64 [P], output row of each pair, in pair order; counts: int64 [E_l]; starts: int64 [E_l + 1], first
    output row of each expert; by_expert: int64 [P], the pairs in output order.
    """

    slot: LongArray
    counts: LongArray
    starts: LongArray
    by_expert: LongArray


def place(received: Received, starts_of: LongArray | None, experts: int, alignment: int = 1) -> Placement:
    """Give each pair a row: expert by expert, (source, token) order inside.

    starts_of: int64 [E_l + 1], fixed first rows (masked layout); None: experts follow each other, each padded to
    `alignment`.
    """
    by_expert = np.argsort(received.pair_expert, kind="stable")
    counts = np.bincount(received.pair_expert, minlength=experts).astype(np.int64)
    if starts_of is None:
        padded = -(-counts // alignment) * alignment
        starts_of = np.concatenate([np.zeros(1, np.int64), np.cumsum(padded)])
    before = np.cumsum(counts) - counts
    ordered = received.pair_expert[by_expert]
    slot = np.empty(len(by_expert), np.int64)
    slot[by_expert] = np.arange(len(by_expert)) - before[ordered] + starts_of[ordered]
    return Placement(slot, counts, starts_of, by_expert)


@dataclass(frozen=True)
class Contribution:
    """Rows that one rank, or one other host, returns for this rank's tokens: row j, from `first_row` on, belongs to
    `tokens[j]`."""

    tokens: LongArray
    first_row: int


def bags(tokens: int, contributions: Sequence[Contribution]) -> tuple[LongArray, LongArray]:
    """Which table rows make up each token's sum. Returns (index int64 [P], offsets int64 [tokens + 1]), the rows of a
    token in the order of `contributions`."""
    table = np.full((tokens, len(contributions)), -1, dtype=np.int64)
    for column, contribution in enumerate(contributions):
        table[contribution.tokens, column] = contribution.first_row + np.arange(len(contribution.tokens))
    present = table >= 0
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(present.sum(axis=1))])
    return table[present], offsets
