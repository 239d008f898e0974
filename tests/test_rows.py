"""The permute and the sums of CPU ranks, against plain loops in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steps import DTYPES

from moe_a2a.rows import gather, gather_segments, sum_rows

#: Largest error relative to the sum of the terms' magnitudes: one rounding to the dtype (half a unit in the last place;
#: bf16's kernels round ties away from zero), and fp32 sums.
ROUNDING = {torch.bfloat16: 2.0**-8 * 1.01, torch.float16: 2.0**-11 * 1.01, torch.float32: 2.0**-21}


def table_of(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_gather_copies_rows(dtype):
    table = (table_of(50, 128, torch.float32) * 50).to(dtype)
    index = np.array([49, 0, 0, 7], np.int64)
    out = torch.zeros(4, 128, dtype=dtype)
    gather(table, index, out)
    assert torch.equal(out, table[[49, 0, 0, 7]])
    gather(table, np.zeros(0, np.int64), out[:0])
    assert torch.equal(out, table[[49, 0, 0, 7]])


@pytest.mark.parametrize("columns", [128, 1 << 20], ids=["few bytes", "many bytes"])
def test_gather_segments_touches_no_other_row(columns):
    table, out = table_of(10, columns, torch.float32), torch.full((20, columns), -1.0)
    index = np.array([9, 1, 2, 3, 3, 0], np.int64)
    gather_segments(table, index, np.array([2, 0, 3, 1]), np.array([1, 5, 5, 16, 20]), out)
    want = torch.full((20, columns), -1.0)
    want[[1, 2, 5, 6, 7, 16]] = table[index]
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("columns, bags", [(128, 9000), (7168, 300)])  # more than one chunk of output
def test_sums_are_rounded_once(dtype, weighted, columns, bags):
    rng = np.random.default_rng(1)
    table = table_of(64, columns, dtype)
    sizes = rng.integers(0, 5, bags)
    sizes[: bags // 3] = 0  # a whole chunk of empty sums
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    index = rng.integers(0, 64, offsets[-1]).astype(np.int64)
    weights = rng.random(len(index)).astype(np.float32) if weighted else None
    out = torch.full((bags, columns), torch.nan, dtype=dtype)
    sum_rows(table, index, offsets, out, weights)
    scale = torch.from_numpy(weights).double() if weights is not None else torch.ones(len(index)).double()
    which = torch.from_numpy(np.repeat(np.arange(bags), sizes))
    terms = table.double()[torch.from_numpy(index)] * scale[:, None]
    want = torch.zeros(bags, columns, dtype=torch.float64).index_add_(0, which, terms)
    magnitude = torch.zeros_like(want).index_add_(0, which, terms.abs())
    assert ((out.double() - want).abs() <= ROUNDING[dtype] * magnitude + 1e-7 * (dtype == torch.float16)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_added_in_fp32_in_the_order_given(dtype):
    # One unit of fp32 next to 2**24: with fp32 sums 2**24 + 1 + 1 - 2**24 is 0, in any other order 2.
    table = torch.tensor([2.0**12, 1.0, -(2.0**12)]).to(dtype)[:, None].expand(3, 128).contiguous()
    out = torch.empty(2, 128, dtype=dtype)
    weights = np.array([2.0**12, 1, 1, 2.0**12, 1, 2.0**12, 2.0**12, 1], np.float32)
    sum_rows(table, np.array([0, 1, 1, 2, 1, 0, 2, 1]), np.array([0, 4, 8]), out, weights)
    assert out[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_sum_is_zero_and_its_neighbours_are_right(dtype):
    table, out = table_of(4, 128, dtype), torch.full((4, 128), torch.nan, dtype=dtype)
    sum_rows(table, np.array([2, 1], np.int64), np.array([0, 0, 1, 1, 2]), out)
    assert torch.equal(
        out, torch.stack([torch.zeros(128, dtype=dtype), table[2], torch.zeros(128, dtype=dtype), table[1]])
    )
    sum_rows(table, np.zeros(0, np.int64), np.zeros(5, np.int64), out)
    assert not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_outside_a_sum_are_not_read(dtype):
    table = table_of(4, 128, dtype)
    table[[0, 3]] = torch.nan
    out = torch.empty(2, 128, dtype=dtype)
    sum_rows(table, np.array([1, 2]), np.array([0, 1, 2]), out, np.ones(2, np.float32))
    assert torch.equal(out, table[1:3])
