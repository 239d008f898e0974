"""The kernels of permute and unpermute in Triton's interpreter, against loops and the torch code of CPU tensors."""

from __future__ import annotations

import os
import sys
from typing import Any

# Before anything imports Triton, which decides then how it runs kernels.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from permuting import DTYPES, bits, check, routing, rows_of, summed

from moe_a2a import InputError, Permuted, worst_case_rows
from moe_a2a.fp8 import pack_ue8m0, quantize
from moe_a2a.kernels import permute as kernels
from moe_a2a.kernels.unpermute import unpermute as launch_unpermute
from moe_a2a.permutation import new_outputs

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton was imported to compile in this process; run without tests/gpu"
)

POISON = 0x7F  # as bytes: NaN in FP8 and bf16, huge in int32


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several counting programs, rounds of the scan, blocks of a row and tiles of scales, with little work in each."""
    tiles = {
        "_CHOICES": 16,
        "_COMPARED": 8,
        "_SCAN_TILE": 64,
        "_BLOCK_WORDS": 64,
        "_SCALE_ROWS": 16,
        "_SCALE_COLUMNS": 4,
    }
    for name, value in tiles.items():
        monkeypatch.setattr(kernels, name, value)


def permuted(
    x: torch.Tensor,
    ids: torch.Tensor,
    experts: int,
    alignment: int,
    *,
    weights: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    names: torch.Tensor | None = None,
    valid: int | None = None,
    rows: int | None = None,
    processors: int = 1,
) -> Permuted:
    """What `moe_a2a.permute` does for GPU tensors, into storage that was used before."""
    rows = worst_case_rows(*ids.shape, experts, alignment) if rows is None else rows
    out = new_outputs(x, ids, experts, rows, weights is not None, scales)
    for tensor in vars(out).values():
        if tensor is not None:
            tensor.view(torch.uint8).fill_(POISON)
    kernels.permute(
        x,
        ids,
        out,
        alignment,
        topk_weights=weights,
        scales=scales,
        names=names,
        valid=None if valid is None else torch.tensor([valid], dtype=torch.int32),
        processors=processors,
    )
    by_row = None if out.scales is None else out.scales.t()
    padding = (bits(out.x) == POISON).all(dim=1) == (out.source < 0)
    assert padding.all(), "padding was written, or a row was not"
    if by_row is not None:
        assert ((bits(by_row) == POISON).all(dim=1) == (out.source < 0)).all()
    return Permuted(
        out.x, out.expert_ids, out.counts, out.offsets, out.topk_weights, out.source, by_row, out.places, out.report
    )


def unpermuted(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None, **options: Any) -> torch.Tensor:
    out = torch.full((len(places), y.shape[1]), torch.nan, dtype=y.dtype)
    launch_unpermute(y, places, weights, out, valid=options.get("valid"), processors=1)
    return out


def test_rows_and_sums_match_loops() -> None:
    x, ids, weights = rows_of(21, 1408 // 8, torch.bfloat16), routing(21, 5, 39), torch.rand(21, 5)
    got = permuted(x, ids, 39, 8, weights=weights)
    check(got, x, ids, 39, 8, weights)
    got.check()
    for given_weights in (weights, None):
        out = unpermuted(got.x, got.places, given_weights)
        assert torch.equal(bits(out), bits(summed(got.x, got.places, given_weights)))


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 9), st.integers(0, 1 << 20)),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 4, 128]),
    st.sampled_from([torch.int32, torch.int64]),
    st.none() | st.integers(-2, 12),
    st.booleans(),
)
def test_any_routing_matches_loops(sizes, holes, alignment, id_dtype, valid, weighted) -> None:
    tokens, top_k, experts, seed = sizes
    x, ids = rows_of(tokens, 8, torch.float32, seed), routing(tokens, top_k, experts, seed, holes).to(id_dtype)
    weights = torch.rand(tokens, top_k) if weighted else None
    got = permuted(x, ids, experts, alignment, weights=weights, valid=valid)
    real = None if valid is None else min(max(valid, 0), tokens)
    check(got, x, ids, experts, alignment, weights, valid=real)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    out = unpermuted(got.x, got.places, weights, valid=count)
    assert torch.equal(bits(out[:real]), bits(summed(got.x, got.places[:real], weights)))
    assert out[tokens if real is None else real :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_every_dtype_have_the_bits_of_the_loops(dtype: torch.dtype) -> None:
    places = torch.randint(-1, 30, (7, 4), generator=torch.Generator().manual_seed(1)).int()
    y, weights = rows_of(30, 1032, dtype), torch.rand(7, 4)
    assert torch.equal(bits(unpermuted(y, places, weights)), bits(summed(y, places, weights)))


@pytest.mark.parametrize("form", ["row-major fp32", "column-major fp32", "row-major ue8m0", "column-major ue8m0"])
def test_fp8_rows_bring_their_scales(form: str) -> None:
    x, scales = quantize(rows_of(6, 640, torch.bfloat16), power_of_two=True)
    if "ue8m0" in form:
        scales = pack_ue8m0(scales)
    if "column" in form:
        scales = scales.t().contiguous().t()
    ids = routing(6, 3, 7)
    got = permuted(x, ids, 7, 8, scales=scales)
    check(got, x, ids, 7, 8, scales=scales)
    named = permuted(x, ids, 7, 8, scales=scales, names=torch.tensor([9, 0, 9, 50, 2, 2], dtype=torch.int32))
    assert named.scales is not None and got.scales is not None
    assert torch.equal(bits(named.scales.contiguous()), bits(got.scales.contiguous()))


def test_scales_of_rows_that_do_not_fit_are_not_written() -> None:
    x, scales = quantize(rows_of(6, 640, torch.bfloat16))
    ids = routing(6, 3, 7, holes=0.0)
    got = permuted(x, ids, 7, 8, scales=scales, rows=9)
    check(got, x, torch.full_like(ids, -1), 7, 8, scales=scales)


def test_programs_share_the_work_evenly_or_not() -> None:
    x, ids = rows_of(5, 256, torch.bfloat16), routing(5, 3, 4)
    for processors in (1, 1000):
        check(permuted(x, ids, 4, 2, processors=processors), x, ids, 4, 2)


def test_rows_may_be_named_by_something_else_than_their_token() -> None:
    x, ids, names = rows_of(6, 8, torch.float32), routing(6, 2, 3), torch.arange(100, 106, dtype=torch.int32)
    got, plain = permuted(x, ids, 3, 4, names=names), permuted(x, ids, 3, 4)
    assert torch.equal(got.source, torch.where(plain.source >= 0, plain.source + 100, -1))


@pytest.mark.parametrize("value", [-2, 5, 1 << 20, -(1 << 31), (1 << 31) - 1])
def test_a_wrong_id_loses_its_row_and_is_named(value: int) -> None:
    x, ids = rows_of(40, 8, torch.float32), routing(40, 2, 5)
    wrong = ids.clone()
    wrong[31, 1], wrong[33, 0], wrong[17, 1] = value, 77, value
    got = permuted(x, wrong, 5, 4)
    ids[31, 1] = ids[33, 0] = ids[17, 1] = -1
    check(got, x, ids, 5, 4)
    with pytest.raises(InputError, match=rf"topk_ids\[17, 1\] = {value}; allowed are 0 to 4, and -1 for no expert"):
        got.check()


def test_a_wrong_id_beyond_int32_is_named_too() -> None:
    ids = routing(4, 2, 5)
    ids[2, 1] = 1 << 40
    with pytest.raises(InputError, match=r"topk_ids\[2, 1\] = 2147483647"):
        permuted(rows_of(4, 8, torch.float32), ids, 5, 4).check()


def test_wrong_ids_of_tokens_that_do_not_count_are_not_looked_at() -> None:
    x, ids = rows_of(4, 8, torch.float32), routing(4, 2, 5)
    ids[3] = 99
    got = permuted(x, ids, 5, 4, valid=3)
    check(got, x, ids, 5, 4, valid=3)
    got.check()


def test_a_capacity_that_is_too_small_gives_nothing_and_says_so() -> None:
    x, ids, weights = rows_of(20, 8, torch.float32), routing(20, 2, 3, holes=0.0), torch.rand(20, 2)
    needed = int(permuted(x, ids, 3, 8).offsets[-1])
    check(permuted(x, ids, 3, 8, rows=needed), x, ids, 3, 8)
    got = permuted(x, ids, 3, 8, rows=needed - 1, weights=weights)
    check(got, x, torch.full_like(ids, -1), 3, 8, torch.zeros_like(weights))
    with pytest.raises(InputError, match=rf"capacity={needed - 1}, but this routing needs {needed} rows"):
        got.check()


def test_a_place_that_the_rows_do_not_have_makes_its_token_nan() -> None:
    y = rows_of(3, 8, torch.bfloat16)
    out = unpermuted(y, torch.tensor([[0, 3], [1, 2], [1 << 30, -1]], dtype=torch.int32), None)
    assert out[0].isnan().all() and out[2].isnan().all()
    assert torch.equal(out[1], (y[1].float() + y[2].float()).to(y.dtype))


def test_a_weight_of_no_choice_may_be_anything() -> None:
    y, places = rows_of(2, 8, torch.bfloat16), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int32)
    out = unpermuted(y, places, torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]]))
    assert torch.equal(out, torch.stack([y[1], torch.zeros_like(y[1])]))
