"""Unpermute: each token's rows, weighted and summed, back in the order of tokens.

A work item is a block of columns of one token: the rows of its choices are added in the order of k, in fp32, each
product and each sum rounded by itself as CPU ranks and the oracle do, and rounded once to the rows' dtype.

Memory-ordering contract
    Plain loads and stores of this GPU's memory, ordered by the stream. A place that the rows do not have is not read,
    and makes its token NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import power_of_two_at_least
from moe_a2a.kernels.casts import to_payload
from moe_a2a.kernels.launch import launch

_WARPS = 4
_BLOCK = 1024  # columns of a work item: 16 bytes of bf16 a thread and choice
_PROGRAMS_A_SM = 8


@triton.jit(do_not_specialize=["tokens", "rows"])
def _unpermute(
    y, places, weights, valid, out, tokens, rows,
    K: tl.constexpr, H: tl.constexpr, VALID: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    DTYPE: tl.constexpr = y.dtype.element_ty
    count = tokens
    if VALID:
        count = tl.minimum(tl.maximum(tl.load(valid), 0), tokens)
    for number in range(tl.program_id(0), count * BLOCKS, tl.num_programs(0)):
        item = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in Python ints
        column = (item % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        t = item // BLOCKS
        inside = column < H
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            at = tl.load(places + t * K + k)
            weight = tl.load(weights + t * K + k) if WEIGHTS else 1.0
            # A weight of a choice without a row may be anything, and 0 times it need not be 0.
            weight = tl.where(at >= rows, float("nan"), tl.where(at >= 0, weight, 0.0))
            row = y + at.to(tl.int64) * H
            value = tl.load(row + column, mask=inside & (at >= 0) & (at < rows), other=0.0)
            total += value.to(tl.float32) * weight
        tl.store(out + t.to(tl.int64) * H + column, to_payload(total, DTYPE), mask=inside)


def unpermute(
    y: torch.Tensor,
    places: torch.Tensor,
    topk_weights: torch.Tensor | None,
    out: torch.Tensor,
    *,
    valid: torch.Tensor | None,
    processors: int,
) -> None:
    """Launch. y: [P, H], rows of a multiple of 16 bytes; places: int32 [T, K], rows of y, negative for none;
    topk_weights: fp32 [T, K]; out: [T, H], y's dtype; valid: int32 [1], tokens that count; processors: SMs of the
    device."""
    tokens, top_k = places.shape
    hidden = y.shape[1]
    block = min(_BLOCK, power_of_two_at_least(hidden))
    launch(
        _unpermute,
        max(1, min(tokens * -(-hidden // block), processors * _PROGRAMS_A_SM)),
        (
            y,
            places,
            places if topk_weights is None else topk_weights,
            places if valid is None else valid,
            out,
            tokens,
            y.shape[0],
        ),
        (top_k, hidden, valid is not None, topk_weights is not None, block),
        (y.dtype,),
        num_warps=_WARPS,
        # Products and sums are rounded one by one, as CPU ranks and the oracle do: the bits are the same everywhere.
        enable_fp_fusion=False,
    )
