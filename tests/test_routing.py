"""Placement: who gets which token and where, against plain loops."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_a2a.routing import Arrival, Contribution, bags, place, rank_hits, receive


def routing(seed: int, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Distinct ids, some -1: int32 [tokens, top_k]."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]) if tokens else np.zeros((0, top_k))
    return np.where(rng.random((tokens, top_k)) < 0.3, -1, ids).astype(np.int32)


sizes = st.tuples(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),  # tokens by source
    st.integers(1, 4),  # ranks
    st.integers(1, 3),  # experts per rank
    st.integers(1, 5),
)


def test_an_id_of_minus_one_goes_to_no_rank():
    hits = rank_hits(np.array([[-1, 0], [-1, -1], [5, 3]], np.int32), experts_per_rank=2, world_size=3)
    assert hits.tolist() == [[True, False, False], [False, False, False], [False, True, True]]


@given(sizes)
def test_a_token_goes_once_to_each_rank_that_owns_one_of_its_experts(size):
    seed, (tokens, *_), ranks, experts, top_k = size
    ids = routing(seed, tokens, ranks * experts, min(top_k, ranks * experts))
    hits = rank_hits(ids, experts, ranks)
    assert hits.shape == (tokens, ranks)
    for t in range(tokens):
        assert set(np.flatnonzero(hits[t])) == {int(e) // experts for e in ids[t] if e >= 0}


def arrivals_of(seed: int, tokens: list[int], total: int, top_k: int) -> list[Arrival]:
    """One arrival a source; sources and first rows are out of the ordinary."""
    made = []
    for i, n in enumerate(tokens):
        numbers = np.arange(n, dtype=np.int32) * 2 + 1
        made.append(Arrival(3 * i, numbers, routing(seed + i, n, total, top_k), None, None, first_row=100 * i + 7))
    return made


@given(sizes)
def test_received_tokens_and_their_pairs_are_in_source_token_k_order(size):
    seed, tokens, ranks, experts, top_k = size
    top_k = min(top_k, ranks * experts)
    arrivals = arrivals_of(seed, tokens, ranks * experts, top_k)
    for rank in range(ranks):
        first = rank * experts
        rows, pairs = [], []
        for arrival in arrivals:
            for i, ids in enumerate(arrival.ids.tolist()):
                local = [e - first if first <= e < first + experts else -1 for e in ids]
                if max(local) >= 0:
                    pairs += [(len(rows), k, e) for k, e in enumerate(local) if e >= 0]
                    rows.append((arrival.rank, int(arrival.tokens[i]), arrival.first_row + i, local))
        got = receive(arrivals, first, experts, top_k)
        assert got.source.tolist() == [[rank, token] for rank, token, _, _ in rows]
        assert got.table_rows.tolist() == [at for _, _, at, _ in rows]
        assert got.local_ids.tolist() == [local for _, _, _, local in rows]
        assert list(zip(got.pair_row.tolist(), got.pair_k.tolist(), got.pair_expert.tolist(), strict=True)) == pairs
        assert got.rows_per_arrival == [sum(r == a.rank for r, _, _, _ in rows) for a in arrivals]


@given(sizes, st.sampled_from([1, 2, 8, 128]), st.booleans())
def test_rows_of_an_expert_follow_each_other_from_its_first_row(size, alignment, fixed):
    seed, tokens, ranks, experts, top_k = size
    top_k = min(top_k, ranks * experts)
    received = receive(arrivals_of(seed, tokens, ranks * experts, top_k), 0, experts, top_k)
    starts = np.arange(experts + 1, dtype=np.int64) * 50 if fixed else None
    placed = place(received, starts, experts, alignment)
    for e in range(experts):
        slots = placed.slot[received.pair_expert == e]  # in pair order, which is the order of arrival
        assert slots.tolist() == list(range(placed.starts[e], placed.starts[e] + len(slots)))
        assert placed.counts[e] == len(slots)
        if not fixed:
            padded = -(-len(slots) // alignment) * alignment
            assert placed.starts[e + 1] - placed.starts[e] == padded
    assert placed.starts[0] == 0
    assert (np.diff(placed.slot[placed.by_expert]) > 0).all()


def test_without_arrivals_or_choices_nothing_is_received():
    for arrivals in (
        [],
        arrivals_of(0, [0, 0], 4, 2),
        [Arrival(0, np.arange(1, dtype=np.int32), np.array([[-1, 3]], np.int32), None, None, 0)],
    ):
        got = receive(arrivals, 0, 2, 2)
        assert got.local_ids.shape == (0, 2) and got.source.shape == (0, 2) and len(got.table_rows) == 0
        assert place(got, None, 2, 128).starts.tolist() == [0, 0, 0]


@given(st.integers(0, 12), st.lists(st.tuples(st.sets(st.integers(0, 11)), st.integers(0, 1000)), max_size=5))
def test_a_tokens_bag_holds_its_rows_in_the_order_of_the_contributions(tokens, parts):
    contributions = [
        Contribution(np.array(sorted(t for t in members if t < tokens), dtype=np.int64), first)
        for members, first in parts
    ]
    index, offsets = bags(tokens, contributions)
    assert len(offsets) == tokens + 1
    for t in range(tokens):
        want = [c.first_row + c.tokens.tolist().index(t) for c in contributions if t in c.tokens]
        assert index[offsets[t] : offsets[t + 1]].tolist() == want
