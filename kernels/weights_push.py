"""Weights at combine: store this rank's router weights into the memory of the ranks its tokens went to.

For callers that know the weights only after the experts have run (the drop-in surfaces): one more hop, before
combine_send, which waits for it.

Memory-ordering contract
    Runs after dispatch_send on the same stream; takes step and view from the handle. Stores weights with plain stores;
    the last program raises one WEIGHTS flag on each rank of the view, with system-scope release.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout
from moe_a2a.kernels.bad_input import report_bad_weights
from moe_a2a.kernels.launch import Launch
from moe_a2a.kernels.signals import has_bit, is_last, pick, raise_flags

_WARPS = 4
_TOKENS = 16  # tokens of a program


@triton.jit(do_not_specialize=["tokens", "rank"])
def _weights_push(
    weights, peers, live, handle, hits, report, tokens, rank,
    LARGEST: tl.constexpr, TOKENS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = L.R
    lane = tl.arange(0, L.R_PAD)
    bases = tl.load(peers + lane, mask=lane < L.R, other=0)
    step = tl.load(handle + L.STEP)
    mask = tl.load(handle + L.VIEW_MASK)
    block = (step & 1) * L.parity_bytes
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, L.K_PAD)
    inside = (t < tokens)[:, None] & (k < L.K)[None, :]
    value = tl.load(weights + t[:, None] * L.K + k[None, :], mask=inside, other=0.0)
    zero = t[:, None] * 0 + k[None, :] * 0
    report_bad_weights(value, inside, zero + t[:, None], zero + k[None, :], report, LARGEST, L)
    hit = tl.load(hits + t, mask=t < tokens, other=0)
    for r in tl.static_range(R):
        if has_bit(mask, r):
            to = (pick(bases, r, L) + block + L.weights).to(tl.pointer_type(tl.float32))
            at = (rank * L.W + t)[:, None] * L.K + k[None, :]
            tl.store(to + at, value, mask=inside & has_bit(hit, r)[:, None])

    if is_last(live + (L.FINISHED + L.WEIGHTS), tl.num_programs(0)):
        flag = 2 * step + (lane * 0).to(tl.int64)
        raise_flags(bases, block + L.flags + L.WEIGHTS * L.R * 8, rank, flag, mask, L)


def weights_push(
    layout: Layout,
    rank: int,
    weights: torch.Tensor,
    *,
    peers: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    hits: torch.Tensor,
    report: torch.Tensor,
    largest_weight: float,
) -> None:
    """Launch. weights: fp32 [T, K]; hits: int64 [M], written by dispatch_send; largest_weight: beyond it weights are
    reported. The others: `Layout`."""
    tokens = weights.shape[0]
    _prepare(layout, largest_weight)(
        max(1, -(-tokens // _TOKENS)), (weights, peers, live, handle, hits, report, tokens, rank)
    )


@functools.cache
def _prepare(layout: Layout, largest_weight: float) -> Launch:
    return Launch(_weights_push, (largest_weight, _TOKENS, layout), num_warps=_WARPS)
