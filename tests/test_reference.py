"""The oracle itself, against cases worked out by hand and against properties it must have."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from moe_a2a import reference as ref
from moe_a2a.workload import make_inputs

# Two ranks, four experts (0, 1 on rank 0; 2, 3 on rank 1), three tokens a rank at most, top-2.
# Token t of rank r holds the value 10 * (r + 1) + t in every column.
SIZES = ref.Sizes(ranks=2, experts=4, max_tokens_per_rank=3)
IDS = [torch.tensor([[0, 2], [3, 2], [1, -1]]), torch.tensor([[2, 1], [-1, -1]])]
WEIGHTS = [torch.tensor([[0.5, 0.25], [1.0, 2.0], [4.0, 8.0]]), torch.tensor([[0.125, 3.0], [7.0, 7.0]])]
X = [torch.tensor([10.0, 11.0, 12.0])[:, None].repeat(1, 128), torch.tensor([20.0, 21.0])[:, None].repeat(1, 128)]


def values(rows: torch.Tensor) -> list[float]:
    """The one value that fills each row."""
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    return [float(v) for v in rows[:, 0]]


def test_a_rank_receives_a_token_once_in_source_and_token_order() -> None:
    came = ref.arrivals(SIZES, IDS, rank=1)
    assert came.source_rank.tolist() == [0, 0, 1]
    assert came.token.tolist() == [0, 1, 0]
    assert came.local_ids.tolist() == [[-1, 0], [1, 0], [0, -1]]


def test_masked_rows_by_hand() -> None:
    on0, on1 = (ref.dispatch_masked(SIZES, X, IDS, rank) for rank in (0, 1))
    assert on0.x.shape == (2, 6, 128)
    assert on0.counts.tolist() == [1, 2] and on0.counts.dtype == torch.int32
    assert values(on0.x[0, :1]) == [10] and values(on0.x[1, :2]) == [12, 20]
    assert on0.source[0, :1].tolist() == [0] and on0.source[1, :2].tolist() == [2, 3]
    assert on1.counts.tolist() == [3, 1]
    assert values(on1.x[0, :3]) == [10, 11, 20] and values(on1.x[1, :1]) == [11]
    assert on1.source[0, :3].tolist() == [0, 1, 3]


def test_contiguous_rows_by_hand() -> None:
    got = ref.dispatch_contiguous(SIZES, X, IDS, WEIGHTS, rank=0)
    assert values(got.x) == [10, 12, 20]
    assert got.topk_ids.tolist() == [[0, -1], [1, -1], [-1, 1]]
    assert got.topk_weights is not None and got.topk_weights.tolist() == [[0.5, 0], [4, 0], [0, 3]]
    assert got.counts.tolist() == [1, 2]
    assert got.tokens_per_rank.tolist() == [2, 1]
    assert got.source.tolist() == [0, 2, 3]


@pytest.mark.parametrize("alignment, starts, total", [(1, [0, 3], 4), (2, [0, 4], 6), (128, [0, 128], 256)])
def test_grouped_rows_by_hand(alignment: int, starts: list[int], total: int) -> None:
    got = ref.dispatch_grouped(SIZES, X, IDS, WEIGHTS, rank=1, alignment=alignment)
    assert got.offsets.tolist() == [*starts, total]
    assert got.counts.tolist() == [3, 1]
    real = [starts[0], starts[0] + 1, starts[0] + 2, starts[1]]
    padding = [row for row in range(total) if row not in real]
    assert values(got.x[real]) == [10, 11, 20, 11]
    assert got.expert_ids[real].tolist() == [0, 0, 0, 1]
    assert got.source[real].tolist() == [0, 1, 3, 1]
    assert got.topk_weights is not None and got.topk_weights[real].tolist() == [0.25, 2.0, 0.125, 1.0]
    assert set(got.expert_ids[padding].tolist()) <= {-1} and set(got.source[padding].tolist()) <= {-1}
    assert got.topk_weights[padding].count_nonzero() == 0


def test_combine_by_hand_in_every_layout() -> None:
    # Expert e multiplies by 10**e, so every digit of a result names the experts that it went through.
    expected = [
        [0.5 * 10 + 0.25 * 1000, 1.0 * 11000 + 2.0 * 1100, 4.0 * 120],
        [0.125 * 2000 + 3.0 * 200, 0.0],
    ]
    masked = [ref.dispatch_masked(SIZES, X, IDS, rank) for rank in (0, 1)]
    y_masked = []
    for rank, got in enumerate(masked):
        y = torch.full_like(got.x, math.nan)  # a row that holds no token must not reach a result
        for e, count in enumerate(got.counts.tolist()):
            y[e, :count] = got.x[e, :count] * 10 ** (2 * rank + e)
        y_masked.append(y)
    y_grouped, y_contiguous = [], []
    for rank in (0, 1):
        grouped = ref.dispatch_grouped(SIZES, X, IDS, WEIGHTS, rank, alignment=8)
        factor = torch.where(grouped.expert_ids >= 0, 10.0 ** (2 * rank + grouped.expert_ids), math.nan)
        y_grouped.append(grouped.x * factor[:, None])
        rows = ref.dispatch_contiguous(SIZES, X, IDS, WEIGHTS, rank)
        assert rows.topk_weights is not None
        factor = (rows.topk_weights * 10.0 ** (2 * rank + rows.topk_ids) * (rows.topk_ids >= 0)).sum(dim=1)
        y_contiguous.append(rows.x * factor[:, None])
    for rank in (0, 1):
        assert values(ref.combine_masked(SIZES, y_masked, IDS, WEIGHTS[rank], rank)) == expected[rank]
        assert values(ref.combine_grouped(SIZES, y_grouped, IDS, WEIGHTS[rank], rank, 8)) == expected[rank]
        assert values(ref.combine_contiguous(SIZES, y_contiguous, IDS, rank)) == expected[rank]

        def expert(e: int, rows: torch.Tensor) -> torch.Tensor:
            return rows * 10**e

        assert values(ref.moe_output(SIZES, X[rank], IDS[rank], WEIGHTS[rank], rank, expert)) == expected[rank]


def test_partial_sums_are_rounded_once_per_rank() -> None:
    # bfloat16 has eight bits: 257 rounds to 256, 514 to 512 and 515 to 516.
    sizes = ref.Sizes(ranks=2, experts=4, max_tokens_per_rank=1)
    ids, weights, x = torch.tensor([[0, 1, 2]]), torch.tensor([[256.0, 1.0, 258.0]]), torch.ones(1, 128).bfloat16()
    assert values(ref.moe_output(sizes, x, ids, weights, 0, lambda e, rows: rows)) == [512]
    one_rank = ref.Sizes(ranks=1, experts=4, max_tokens_per_rank=1)
    assert values(ref.moe_output(one_rank, x, ids, weights, 0, lambda e, rows: rows)) == [516]


def test_a_remote_hosts_sum_is_rounded_once_more_and_the_own_hosts_is_not() -> None:
    sizes = ref.Sizes(ranks=4, experts=4, max_tokens_per_rank=1)
    ids, weights = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[256.0, 2.0, 256.0, 1.0]])
    x, hosts = torch.ones(1, 128).bfloat16(), [[0, 1], [2, 3]]
    assert values(ref.moe_output(sizes, x, ids, weights, 0, lambda e, rows: rows)) == [516]
    assert values(ref.moe_output(sizes, x, ids, weights, 0, lambda e, rows: rows, hosts)) == [512]
    assert values(ref.moe_output(sizes, x, ids, weights, 2, lambda e, rows: rows, hosts)) == [516]


CASES = [
    # ranks, experts, top_k, tokens by rank, hidden, dtype, routing, hosts
    (1, 4, 1, [3], 128, torch.float32, "uniform", None),
    (2, 8, 3, [0, 5], 256, torch.float16, "zipf", [[0], [1]]),
    (4, 32, 8, [16, 1, 0, 9], 128, torch.bfloat16, "uniform", [[0, 2], [1, 3]]),
    (4, 8, 8, [7, 7, 7, 7], 128, torch.float32, "k-hot", [[0, 1], [2, 3]]),
    (3, 6, 2, [0, 0, 0], 128, torch.bfloat16, "uniform", None),
]


@pytest.mark.parametrize("ranks, experts, top_k, tokens, hidden, dtype, routing, hosts", CASES)
def test_the_layouts_agree_with_the_plain_sum(ranks, experts, top_k, tokens, hidden, dtype, routing, hosts) -> None:
    sizes = ref.Sizes(ranks, experts, max_tokens_per_rank=16)
    inputs = [
        make_inputs(
            5,
            r,
            0,
            t,
            hidden=hidden,
            experts=experts,
            top_k=top_k,
            dtype=dtype,
            routing=routing,
            padding=0.2,
            holes=0.1,
        )
        for r, t in enumerate(tokens)
    ]
    x, ids, weights = [i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]

    def expert(e: int, rows: torch.Tensor) -> torch.Tensor:
        return (rows.float() * (1 + e) + e).to(dtype)

    y_masked, y_grouped = [], []
    for rank in range(ranks):
        first = rank * sizes.experts_per_rank
        masked = ref.dispatch_masked(sizes, x, ids, rank)
        y = torch.full_like(masked.x, math.nan)
        for e, count in enumerate(masked.counts.tolist()):
            y[e, :count] = expert(first + e, masked.x[e, :count])
        y_masked.append(y)
        grouped = ref.dispatch_grouped(sizes, x, ids, weights, rank, alignment=4)
        y = torch.full_like(grouped.x, math.nan)
        for e, (start, count) in enumerate(zip(grouped.offsets.tolist(), grouped.counts.tolist(), strict=False)):
            y[start : start + count] = expert(first + e, grouped.x[start : start + count])
        y_grouped.append(y)
    for rank in range(ranks):
        expected = ref.moe_output(sizes, x[rank], ids[rank], weights[rank], rank, expert, hosts)
        assert torch.equal(ref.combine_masked(sizes, y_masked, ids, weights[rank], rank, hosts), expected)
        assert torch.equal(ref.combine_grouped(sizes, y_grouped, ids, weights[rank], rank, 4, hosts), expected)


@pytest.mark.parametrize("ranks, experts, top_k, tokens, hidden, dtype, routing, hosts", CASES)
def test_identity_experts_give_the_sum_of_the_weights_times_x(
    ranks, experts, top_k, tokens, hidden, dtype, routing, hosts
) -> None:
    sizes = ref.Sizes(ranks, experts, max_tokens_per_rank=16)
    inputs = [
        make_inputs(6, r, 0, t, hidden=hidden, experts=experts, top_k=top_k, dtype=dtype, routing=routing, padding=0.2)
        for r, t in enumerate(tokens)
    ]
    x, ids, weights = [i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]
    y = [ref.dispatch_masked(sizes, x, ids, rank).x for rank in range(ranks)]
    eps = torch.finfo(dtype).eps
    for rank in range(ranks):
        out = ref.combine_masked(sizes, y, ids, weights[rank], rank, hosts)
        expected = weights[rank].sum(dim=1, keepdim=True) * x[rank].float()
        assert out.dtype == dtype and out.shape == x[rank].shape
        torch.testing.assert_close(out.float(), expected, rtol=2 * eps, atol=2 * eps)


def test_every_layout_carries_the_same_rows_and_scales() -> None:
    sizes = ref.Sizes(ranks=2, experts=8, max_tokens_per_rank=8)
    inputs = [make_inputs(1, r, 0, 8, hidden=640, experts=8, top_k=3) for r in range(2)]
    ids, weights = [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]
    for kind in ("fp32", "ue8m0"):
        x, scales = zip(*[ref.quantise(i.x, kind) for i in inputs], strict=True)
        rows = ref.dispatch_contiguous(sizes, x, ids, weights, 1, scales)
        masked = ref.dispatch_masked(sizes, x, ids, 1, scales)
        grouped = ref.dispatch_grouped(sizes, x, ids, weights, 1, 128, scales)
        assert rows.scales is not None and masked.scales is not None and grouped.scales is not None
        assert masked.scales.stride()[1] == 1 and grouped.scales.stride()[0] == 1
        assert rows.scales.stride()[0 if kind == "ue8m0" else 1] == 1
        for e, count in enumerate(masked.counts.tolist()):
            chosen = (rows.topk_ids == e).any(dim=1)
            block = slice(int(grouped.offsets[e]), int(grouped.offsets[e]) + count)
            for name in ("x", "scales", "source"):
                one, two, three = (
                    getattr(rows, name)[chosen],
                    getattr(masked, name)[e, :count],
                    getattr(grouped, name)[block],
                )
                assert torch.equal(one.float(), two.float()) and torch.equal(one.float(), three.float())


def test_fp8_scales_by_hand() -> None:
    x = torch.zeros(1, 384)
    x[0, 5], x[0, 130], x[0, 140] = -448.0, 3.0, 1.5
    q, scale = ref.quantise(x, "fp32")
    assert q.dtype == torch.float8_e4m3fn
    assert scale.tolist() == [[1.0, pytest.approx(3 / 448), pytest.approx(1e-4 / 448)]]
    assert q[0, [5, 130, 140]].float().tolist() == [-448.0, 448.0, 224.0]
    q, scale = ref.quantise(x, "pow2")
    assert scale.tolist() == [[1.0, 2.0**-7, 2.0**-22]]  # 3/448 is just below 2**-7; 1e-4/448 is 2.2e-7
    assert q[0, [5, 130, 140]].float().tolist() == [-448.0, 384.0, 192.0]


@pytest.mark.parametrize("kind", ["fp32", "pow2", "ue8m0"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 1.0, 3e4])
def test_fp8_round_trip_is_within_half_a_step(kind: ref.Fp8Kind, magnitude: float) -> None:
    x = magnitude * torch.randn(17, 640, generator=torch.Generator().manual_seed(0))
    q, scales = ref.quantise(x, kind)
    back = ref.dequantise(q, scales)
    amax = x.abs().unflatten(-1, (-1, 128)).amax(-1, keepdim=True).clamp(min=1e-4)
    # e4m3 has four significant bits: 1/16 relative. Near zero a step is 2**-9 of a scale, which is at most amax / 224.
    limit = (x.abs() / 16).unflatten(-1, (-1, 128)).maximum(amax / 224 * 2**-10).flatten(-2)
    assert ((back - x).abs() <= limit * 1.0001).all()
    assert back.shape == x.shape


@pytest.mark.parametrize("columns", [128, 512, 640, 7168])
def test_ue8m0_words_match_an_independent_computation(columns: int) -> None:
    count = columns // 128
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) * torch.logspace(-6, 30, 5)[:, None]
    _, packed = ref.quantise(x, "ue8m0")
    assert packed.shape == (5, math.ceil(columns / 512)) and packed.dtype == torch.int32
    for row in range(5):
        exponents = []
        for tile in range(count):
            amax = max(abs(v) for v in x[row, 128 * tile : 128 * (tile + 1)].tolist())
            wanted = struct.unpack(
                "<f", struct.pack("<f", max(amax, struct.unpack("<f", struct.pack("<f", 1e-4))[0]) / 448)
            )[0]
            exponent = -150
            while 2.0**exponent < wanted:
                exponent += 1
            exponents.append(exponent + 127)
        exponents += [0] * (-count % 4)
        words = struct.unpack(f"<{len(exponents) // 4}i", bytes(exponents))
        assert packed[row].tolist() == list(words)


def test_ue8m0_unpacks_what_was_packed_and_leaves_exact_powers_alone() -> None:
    scales = 2.0 ** torch.arange(-126, 127, dtype=torch.float64).float()
    assert torch.equal(ref.unpack_ue8m0(ref.pack_ue8m0(scales), len(scales)), scales)
    x = (448.0 * 2.0 ** torch.arange(-20, 20)).float()[:, None].expand(-1, 128)
    assert torch.equal(ref.quantise(x, "pow2")[1].flatten(), 2.0 ** torch.arange(-20, 20).float())


def test_rows_of_no_tokens_quantise_to_nothing() -> None:
    for kind in ("fp32", "pow2", "ue8m0"):
        q, scales = ref.quantise(torch.zeros(0, 640), kind)
        assert q.shape == (0, 640) and scales.shape[0] == 0
        assert ref.dequantise(q, scales).shape == (0, 640)


@pytest.mark.parametrize("rows, columns", [(3, 1024), (3, 128), (1, 1024), (0, 1024)])
def test_column_major_scales_are_read_as_row_major_ones_are(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    for kind in ("fp32", "pow2", "ue8m0"):
        q, scales = ref.quantise(x, kind)
        column_major = scales.new_empty(scales.shape[1], 7).t()[:rows]
        column_major.copy_(scales)
        assert torch.equal(ref.dequantise(q, column_major), ref.dequantise(q, scales))
        if kind == "pow2":
            assert torch.equal(ref.pack_ue8m0(column_major), ref.pack_ue8m0(scales))
