"""Combine, receiving half: wait for all ranks, and add the rows that came back for each token.

A work item is a block of columns of one of this rank's tokens. Rows are added in rank order in fp32 and rounded once.
A token without experts gives zeros.

Memory-ordering contract
    Waits for the COMBINE flag of every rank that is not missing from the step so far (acquire), also if this rank
    brought no token: that the others are done with this step is what makes its buffers free again. Reads this rank's
    own region and `hits`; writes `out`, the handle's MISSING and `live`, where the step is no longer open, with plain
    stores. A rank that is missing, or says "excluded", adds nothing.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.kernels.casts import to_payload
from moe_a2a.kernels.launch import Launch
from moe_a2a.kernels.signals import aligned, end_step, has_bit, record_missing, wait

_WARPS = 4
_BLOCK = 2048
_PROGRAMS_A_SM = 8


@triton.jit
def add_sums(
    pid, programs, out, region, control, alive, live, handle, hits, report, tokens,
    BLOCK: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What program `pid` of `programs` does."""
    step = tl.load(handle + L.STEP)
    want = tl.load(handle + L.EXPECTED)
    has_rows = tl.load(handle + L.ROWS) != 0
    block = region.to(tl.int64) + (step & 1) * L.parity_bytes
    arrived, excluded = wait(pid, block, handle, control, alive, L.COMBINE, want, step, L, LANES)
    # In a step that is discarded everybody says "excluded", and that is how it should be.
    good = arrived & ~tl.where(has_rows, excluded, 0)
    if pid == 0:  # early, so that it costs no time; only later launches look at it
        end_step(live, step, L)

    BLOCKS: tl.constexpr = (L.H + BLOCK - 1) // BLOCK
    DTYPE: tl.constexpr = out.dtype.element_ty
    R: tl.constexpr = L.R
    for number in range(pid, tokens * BLOCKS, programs):
        item = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in Python ints
        column = (item % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        t = item // BLOCKS
        inside = column < L.H
        hit = tl.load(hits + t) & good
        total = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(R):
            row = aligned(block + L.sums + (r * L.W + t).to(tl.int64) * L.sum_stride, DTYPE)
            total += tl.load(row + column, mask=inside & has_bit(hit, r), other=0.0).to(tl.float32)
        tl.store(out + t.to(tl.int64) * L.H + column, to_payload(total, DTYPE), mask=inside)

    if (pid == 0) & (good != want):
        record_missing(want & ~good, handle, live, alive, report, L)


@triton.jit(do_not_specialize=["tokens"])
def _combine_recv(
    out, region, control, alive, live, handle, hits, report, tokens,
    BLOCK: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    add_sums(
        tl.program_id(0), tl.num_programs(0), out, region, control, alive, live, handle, hits, report, tokens,
        BLOCK, L, LANES,
    )  # fmt: skip


def combine_recv(
    layout: Layout,
    out: torch.Tensor,
    *,
    region: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    hits: torch.Tensor,
    report: torch.Tensor,
    processors: int,
) -> None:
    """Launch. out: [T, H], payload dtype; hits: int64 [M], written by dispatch_send. The others: `Layout`."""
    tokens = out.shape[0]
    launch, blocks = _prepare(layout, out.dtype)
    launch(
        max(1, min(tokens * blocks, processors * _PROGRAMS_A_SM)),
        (out, region, control, alive, live, handle, hits, report, tokens),
    )


@functools.cache
def _prepare(layout: Layout, dtype: torch.dtype) -> tuple[Launch, int]:
    """The launch, and the work items of a token."""
    block = recv_block(layout)
    return Launch(_combine_recv, (block, layout, 32 * _WARPS), num_warps=_WARPS), -(-layout.H // block)


def recv_block(layout: Layout) -> int:
    """Columns of a work item."""
    return min(_BLOCK, power_of_two_at_least(layout.H))
