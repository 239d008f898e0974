"""Combine, sending half: reduce the outputs of this rank's experts, and store one row into the token's own rank.

A work item is a block of columns of one received token: the rows of the token's local experts, weighted and summed
over k in fp32, rounded once to the payload dtype, stored into `sums` of the source rank.

Memory-ordering contract
    Runs after dispatch_recv on the same stream and takes the handle's step and RECEIVED, `places` and the headers'
    sources from it, never the live step. With PUSHED it first waits for the WEIGHTS flags of the received sources. The
    last program raises one COMBINE flag on each rank of the view, with system-scope release: 2 * step, or 2 * step + 1
    ("excluded") for a rank whose rows this rank did not receive, so that it does not sum what an older step left.
    A step that has ended already, as one of a graph that is replayed without its dispatch, sends nothing.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.kernels.casts import to_payload
from moe_a2a.kernels.launch import Launch
from moe_a2a.kernels.signals import aligned, has_bit, is_last, open_step, pick, raise_flags, record_missing, wait

_WARPS = 4
_BLOCK = 1024  # columns of a work item: 16 bytes of bf16 a thread and expert
_PROGRAMS_A_SM = 8


@triton.jit
def send_sums(
    pid, programs, y, region, peers, control, alive, live, handle, places, report, rank,
    PUSHED: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What program `pid` of `programs` does."""
    r = tl.arange(0, L.R_PAD)
    bases = tl.load(peers + r, mask=r < L.R, other=0)
    step = tl.load(handle + L.STEP)
    mask = tl.load(handle + L.VIEW_MASK)
    came = tl.load(handle + L.RECEIVED)
    longest = tl.load(handle + L.LONGEST).to(tl.int32)
    has_ended = (open_step(live, step, L) != step) & (mask != 0)  # 0: it never began
    mask = tl.where(has_ended, 0, mask)
    came = tl.where(has_ended, 0, came)
    longest = tl.where(has_ended, 0, longest)
    received = came
    block = (step & 1) * L.parity_bytes
    mine = region.to(tl.int64) + block
    if PUSHED:
        received, _ = wait(pid, mine, handle, control, alive, L.WEIGHTS, received, step, L, LANES)
    weights = (mine + L.weights).to(tl.pointer_type(tl.float32))

    BLOCKS: tl.constexpr = (L.H + BLOCK - 1) // BLOCK
    DTYPE: tl.constexpr = y.dtype.element_ty
    K: tl.constexpr = L.K
    for number in range(pid, longest * (L.R * BLOCKS), programs):
        item = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in Python ints
        column = (item % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        s = (item // BLOCKS) % L.R
        t = item // (BLOCKS * L.R)
        place = s * L.W + t
        inside = column < L.H
        total = tl.zeros([BLOCK], tl.float32)
        best = tl.full([], -1, tl.int32)
        for k in tl.static_range(K):
            at = tl.load(places + place * L.K + k)
            weight = tl.load(weights + place * L.K + k)
            value = tl.load(y + at.to(tl.int64) * L.H + column, mask=inside & (at >= 0), other=0.0)
            # A weight of a choice elsewhere may be anything, and 0 times it need not be 0.
            total += value.to(tl.float32) * tl.where(at >= 0, weight, 0.0)
            best = tl.maximum(best, at)
        if (best >= 0) & has_bit(received, s):
            to = pick(bases, s, L) + block + L.sums + (rank * L.W + t).to(tl.int64) * L.sum_stride
            tl.store(aligned(to, DTYPE) + column, to_payload(total, DTYPE), mask=inside)

    if is_last(live + (L.FINISHED + L.COMBINE), programs):
        value = 2 * step + tl.where(has_bit(received, r.to(tl.int64)), 0, 1)
        raise_flags(bases, block + L.flags + L.COMBINE * L.R * 8, rank, value, mask, L)
        tl.store(handle + L.SENT, tl.full([], 0, tl.int64))
        if received != came:
            tl.store(handle + L.EXPECTED, received)
            record_missing(came & ~received, handle, live, alive, report, L)
        if has_ended:
            tl.store(handle + L.EXPECTED, tl.full([], 0, tl.int64))
            tl.atomic_or(report + L.MISUSE, tl.full([], L.ENDED_TWICE, tl.int64))


@triton.jit(do_not_specialize=["rank"])
def _combine_send(
    y, region, peers, control, alive, live, handle, places, report, rank,
    PUSHED: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    send_sums(
        tl.program_id(0), tl.num_programs(0), y, region, peers, control, alive, live, handle, places, report, rank,
        PUSHED, BLOCK, L, LANES,
    )  # fmt: skip


def combine_send(
    layout: Layout,
    rank: int,
    y: torch.Tensor,
    pushed: bool,
    *,
    region: torch.Tensor,
    peers: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    places: torch.Tensor,
    report: torch.Tensor,
    processors: int,
) -> None:
    """Launch. y: [E_l, R*M, H], payload dtype, of any size if the step is discarded; pushed: the weights come by
    weights_push, not with the dispatch; places: int32 [R*M, K]; processors: SMs of the device. The others: `Layout`."""
    launch, programs = _prepare(layout, pushed, y.dtype, processors)
    launch(programs, (y, region, peers, control, alive, live, handle, places, report, rank))


@functools.cache
def _prepare(layout: Layout, pushed: bool, dtype: torch.dtype, processors: int) -> tuple[Launch, int]:
    """The launch, and its programs."""
    block = send_block(layout)
    items = layout.CAP * -(-layout.H // block)
    # Products and sums are rounded one by one, as CPU ranks and the oracle do: the bits are the same everywhere.
    launch = Launch(_combine_send, (pushed, block, layout, 32 * _WARPS), num_warps=_WARPS, enable_fp_fusion=False)
    return launch, min(items, processors * _PROGRAMS_A_SM)


def send_block(layout: Layout) -> int:
    """Columns of a work item."""
    return min(_BLOCK, power_of_two_at_least(layout.H))
