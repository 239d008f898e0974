"""Dispatch, receiving half: wait for all sources, and copy each received row to the experts that it is for.

A work item is a block of columns of one received token: its row is read once and stored once for each of the token's
local experts. The row of a choice is what the sources before it sent to that expert, plus the index that the sender
wrote in the table: slots follow (source rank, token) order, whatever arrives first. Rows that hold no token are not
touched.

Where rows came from is written in one of two forms: `source`, source rank * M + token; or BY_SOURCE, as DeepEP's
handles hold it: `source` is the token alone, and `ranges` says which rows of an expert are of which rank.

Memory-ordering contract
    Waits for the DISPATCH flag of every source in the handle's view (acquire), then reads this rank's own region only.
    Writes the outputs, `places` (where the rows of each (source, token) went, for combine) and the handle's RECEIVED,
    EXPECTED, LONGEST and MISSING with plain stores: the next launch of the stream sees them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.kernels.formats import FP32_SCALES, NO_SCALES, PACKED_SCALES
from moe_a2a.kernels.launch import Launch
from moe_a2a.kernels.signals import aligned, has_bit, lane_bits, record_missing, wait

_WARPS = 2
_BLOCK_WORDS = 512  # 4-byte words of a row that one work item copies: 2 KiB
_PROGRAMS_A_SM = 16


@triton.jit
def _slots(block, words, source, good, L: tl.constexpr):
    """Row of each choice in the output [E_l * CAP], -1 if it is not for this rank. words: int32 [K_PAD], of a table."""
    mine = words >= 0
    expert = tl.where(mine, words & ((1 << L.EXPERT_BITS) - 1), 0)
    slot = words >> L.EXPERT_BITS
    counts = (block + L.counts).to(tl.pointer_type(tl.int32))
    OTHERS: tl.constexpr = L.R - 1
    for s in tl.static_range(OTHERS):
        before = mine & (s < source) & has_bit(good, s)
        slot += tl.load(counts + s * L.E_L + expert, mask=before, other=0)
    # A block is never overrun, whatever a damaged peer wrote.
    return tl.where(mine & (expert < L.E_L) & (slot < L.CAP), expert * L.CAP + slot, -1)


@triton.jit
def _copy_scales(
    row, first, to, out, SCALES: tl.constexpr, COUNT: tl.constexpr, G: tl.constexpr, CAP: tl.constexpr
):  # fmt: skip
    """COUNT scales (or packed words) of a row from `first` on, to column-major [E_l, width, CAP]. to: rows [K_PAD]."""
    n = first + tl.arange(0, COUNT)
    WIDTH: tl.constexpr = G if SCALES == 1 else (G + 3) // 4
    if SCALES == 1:
        value = tl.load(row + n, mask=n < G, other=0)
    else:
        four = n[:, None] * 4 + tl.arange(0, 4)[None, :]
        bits = tl.load(row + four, mask=four < G, other=0)
        value = tl.sum(((bits >> 23) & 0xFF) << (tl.arange(0, 4) * 8)[None, :], 1)
    expert = to // CAP
    address = to.to(tl.int64) + expert.to(tl.int64) * ((WIDTH - 1) * CAP)
    address = address[:, None] + n.to(tl.int64)[None, :] * CAP
    tl.store(out + address, value[None, :] + (to * 0)[:, None], mask=(to >= 0)[:, None] & (n < WIDTH)[None, :])


@triton.jit
def receive_tokens(
    pid, programs, x, scales, counts, source, ranges, region, control, alive, live, handle, places, report,
    BITS: tl.constexpr, SCALES: tl.constexpr, BY_SOURCE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What program `pid` of `programs` does."""
    step = tl.load(handle + L.STEP)
    want = tl.load(handle + L.VIEW_MASK)
    epoch = tl.load(handle + L.VIEW_EPOCH)
    block = region.to(tl.int64) + (step & 1) * L.parity_bytes
    arrived, _ = wait(pid, block, handle, control, alive, L.DISPATCH, want, step, L, LANES)

    r = tl.arange(0, L.R_PAD)
    header = (block + L.headers).to(tl.pointer_type(tl.int64)) + r * L.HEADER_WORDS
    on = (r < L.R) & has_bit(arrived, r.to(tl.int64))
    # The four loads are independent: one round trip.
    its_step = tl.load(header + L.HEADER_STEP, mask=on, other=-1)
    its_epoch = tl.load(header + L.HEADER_EPOCH, mask=on, other=-1)
    its_bits = tl.load(header + L.HEADER_BITS, mask=on, other=-1)
    tokens = tl.load(header + L.HEADER_TOKENS, mask=on, other=0)
    # An old life of a rank, or one that sends something else, counts as missing.
    fits = on & (its_step == step) & (its_epoch == epoch) & (its_bits == BITS) & (tokens <= L.W)
    tokens = tl.where(fits, tokens, 0).to(tl.int32)
    good = lane_bits(fits, r.to(tl.int64))
    longest = tl.max(tokens, 0)

    BLOCKS: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    k = tl.arange(0, L.K_PAD)
    w = tl.arange(0, BLOCK)
    table = (block + L.table).to(tl.pointer_type(tl.int32))
    for number in range(pid, longest * (L.R * BLOCKS), programs):
        item = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in Python ints
        part = item % BLOCKS
        s = (item // BLOCKS) % L.R
        t = item // (BLOCKS * L.R)
        place = s * L.W + t
        is_there = t < tl.sum(tl.where(r == s, tokens, 0), 0)
        words = tl.load(table + place * L.K + k, mask=(k < L.K) & is_there, other=-1)
        to = _slots(block, words, s, good, L)
        if part == 0:
            tl.store(places + place * L.K + k, to, mask=k < L.K)
            tl.store(source + to, (t if BY_SOURCE else s * L.M + t) + to * 0, mask=to >= 0)
        if tl.max(to, 0) >= 0:
            row = aligned(block + L.rows + place.to(tl.int64) * L.row_stride, tl.int32)
            column = part * BLOCK + w
            values = tl.load(row + column, mask=column < WORDS, other=0)
            address = (to.to(tl.int64) * WORDS)[:, None] + column[None, :]
            inside = (to >= 0)[:, None] & (column < WORDS)[None, :]
            tl.store(x + address, values[None, :] + (to * 0)[:, None], mask=inside)
            if SCALES != 0:
                GROUPS: tl.constexpr = BLOCK // 32 if SCALES == 1 else BLOCK // 128
                _copy_scales(row + L.H // 4, part * GROUPS, to, scales, SCALES, GROUPS, L.G, L.CAP)

    if pid == programs - 1:
        e = tl.arange(0, EXPERTS)
        total = tl.zeros([EXPERTS], tl.int32)
        from_source = (block + L.counts).to(tl.pointer_type(tl.int32))
        R: tl.constexpr = L.R
        for s in tl.static_range(R):
            rows = tl.load(from_source + s * L.E_L + e, mask=(e < L.E_L) & has_bit(good, s), other=0)
            if BY_SOURCE:
                tl.store(ranges + e * R + s, (total.to(tl.int64) << 32) | rows.to(tl.int64), mask=e < L.E_L)
            total += rows
        tl.store(counts + e, total, mask=e < L.E_L)
        tl.store(handle + L.RECEIVED, good)
        tl.store(handle + L.EXPECTED, good)
        tl.store(handle + L.LONGEST, longest.to(tl.int64))
        if good != want:
            record_missing(want & ~good, handle, live, alive, report, L)


@triton.jit
def _dispatch_recv(
    x, scales, counts, source, ranges, region, control, alive, live, handle, places, report,
    BITS: tl.constexpr, SCALES: tl.constexpr, BY_SOURCE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    receive_tokens(
        tl.program_id(0), tl.num_programs(0), x, scales, counts, source, ranges, region, control, alive, live, handle,
        places, report, BITS, SCALES, BY_SOURCE, WORDS, BLOCK, EXPERTS, L, LANES,
    )  # fmt: skip


def dispatch_recv(
    layout: Layout,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    counts: torch.Tensor,
    source: torch.Tensor,
    ranges: torch.Tensor | None,
    bits: int,
    *,
    region: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    places: torch.Tensor,
    report: torch.Tensor,
    processors: int,
) -> None:
    """Launch. x: [E_l, R*M, H], FP8 or payload dtype; scales: [E_l, R*M, width], fp32 or packed int32, column-major in
    the last two dimensions, or None; counts: int32 [E_l]; source: int32 [E_l, R*M]; ranges: int64 [E_l, R], or None for
    the form without it; bits: what all headers must say (`formats.header_bits`); places: int32 [R*M, K]; processors:
    SMs of the device. The others: `Layout`."""
    form = None if scales is None else scales.dtype
    launch, programs = _prepare(layout, bits, x.dtype, form, ranges is not None, processors)
    launch(
        programs,
        (
            x,
            scales if scales is not None else counts,
            counts,
            source,
            ranges if ranges is not None else handle,
            region,
            control,
            alive,
            live,
            handle,
            places,
            report,
        ),
    )


@functools.cache
def _prepare(
    layout: Layout, bits: int, dtype: torch.dtype, scales: torch.dtype | None, by_source: bool, processors: int
) -> tuple[Launch, int]:
    """The launch, and its programs."""
    constants, items = recv_constants(layout, dtype, scales, by_source)
    launch = Launch(
        _dispatch_recv,
        (bits, *constants, layout, 32 * _WARPS),
        {0: torch.int32, 1: torch.int32},
        num_warps=_WARPS,
    )
    return launch, min(items, processors * _PROGRAMS_A_SM)


def recv_constants(
    layout: Layout, dtype: torch.dtype, scales: torch.dtype | None, by_source: bool
) -> tuple[tuple[int, ...], int]:
    """`receive_tokens`' constants, from SCALES to EXPERTS, and the most work items there can be."""
    words = layout.H * dtype.itemsize // 4
    form = NO_SCALES if scales is None else FP32_SCALES if scales == torch.float32 else PACKED_SCALES
    block = min(_BLOCK_WORDS, power_of_two_at_least(words))
    if form == PACKED_SCALES:
        block = max(block, 128)
    return (form, by_source, words, block, power_of_two_at_least(layout.E_L)), layout.CAP * -(-words // block)
