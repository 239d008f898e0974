"""Contiguous dispatch, last launch: wait for the rows, which lie where they belong; say how many there are.

Programs take blocks of rows: those behind the last received one get id -1, weight 0 and source -1, so that whoever
reads a block of fixed size finds no expert in them; with PACK, the scales of the others are packed into UE8M0 words,
column-major.

Memory-ordering contract
    Waits for the DISPATCH flag of every rank in the handle's view (acquire), then reads and writes this rank's own
    memory only, with plain stores: the next launch of the stream sees them. Rows are handed out only if nobody is
    missing or excluded, here and in contiguous_send, and every source began where this rank expects; otherwise there
    are none, and the handle's RECEIVED is empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.gpu.routing import Routing
from moe_a2a.kernels.contiguous_layout import agreed, report_missing
from moe_a2a.kernels.launch import launch
from moe_a2a.kernels.signals import has_bit, lane_bits, wait

_WARPS = 4
_BLOCK = 128  # rows of a work item


@triton.jit
def _clear(block, row, on, WEIGHTS: tl.constexpr, L: tl.constexpr):
    """No token, in the tables of these rows [BLOCK]."""
    k = tl.arange(0, L.K_PAD)
    at = (row.to(tl.int64) * L.K)[:, None] + k[None, :]
    inside = on[:, None] & (k < L.K)[None, :]
    none = tl.full([], -1, tl.int64)
    tl.store((block + L.table).to(tl.pointer_type(tl.int64)) + at, none + at * 0, mask=inside)
    if WEIGHTS:
        tl.store((block + L.weights).to(tl.pointer_type(tl.float32)) + at, (at * 0).to(tl.float32), mask=inside)
    tl.store((block + L.source).to(tl.pointer_type(tl.int32)) + row, row * 0 - 1, mask=on)


@triton.jit
def _pack(block, row, on, packed, L: tl.constexpr):
    """fp32 scales of rows [BLOCK] -> exponents, four to a word: packed int32 [ceil(G/4), CAPACITY]."""
    four = tl.arange(0, 4)
    WIDTH: tl.constexpr = (L.G + 3) // 4
    bits = (block + L.scales).to(tl.pointer_type(tl.int32)) + (row.to(tl.int64) * L.G)[:, None] + four[None, :]
    for w in tl.static_range(WIDTH):
        value = tl.load(bits + w * 4, mask=on[:, None] & (w * 4 + four < L.G)[None, :], other=0)
        word = tl.sum(((value >> 23) & 0xFF) << (four * 8)[None, :], 1)
        tl.store(packed + w * L.CAPACITY + row, word, mask=on)


@triton.jit
def receive_rows(
    pid, programs, counts, tokens_per_rank, packed, region, control, alive, live, handle, came, routing, report, rank,
    own_block, BITS: tl.constexpr, KNOWN: tl.constexpr, WEIGHTS: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What program `pid` of `programs` does."""
    step = tl.load(handle + L.STEP)
    before = tl.load(handle + L.MISSING)
    want = tl.load(handle + L.VIEW_MASK) & ~before
    epoch = tl.load(handle + L.VIEW_EPOCH)
    followed = tl.load(routing + L.ROUTING_STEP)
    block = region.to(tl.int64) + (step & 1) * L.parity_bytes
    arrived, excluded = wait(pid, block, handle, control, alive, L.DISPATCH, want, step, L, LANES)
    good, matrix = agreed(block, arrived & ~excluded, step, epoch, followed, BITS, L)
    s = tl.arange(0, L.R_PAD)
    rows = tl.sum(tl.where(s[None, :] == rank, matrix, 0), 1)
    ends = tl.cumsum(rows, 0)
    header = (block + L.headers).to(tl.pointer_type(tl.int64)) + s * L.HEADER_WORDS
    on = (s < L.R) & has_bit(good, s.to(tl.int64))
    began = tl.load(header + L.HEADER_FIRST, mask=on, other=-1)
    in_place = lane_bits(on & (began == (ends - rows).to(tl.int64)), s.to(tl.int64))
    good = tl.where(
        (good == want) & (before == 0), in_place, good
    )  # without all counts, nobody can be blamed for another place
    whole = (good == want) & (before == 0)
    rows = tl.where(whole, rows, 0)
    ends = tl.where(whole, ends, 0)
    total = tl.sum(rows, 0)

    if not KNOWN or PACK:
        into = region.to(tl.int64) + own_block.to(tl.int64) * L.parity_bytes
        for number in range(pid * BLOCK, L.CAPACITY, programs * BLOCK):
            row = number + tl.arange(0, BLOCK)
            if not KNOWN:
                _clear(into, row, (row >= total) & (row < L.CAPACITY), WEIGHTS, L)
            if PACK:
                _pack(into, row, row < total, packed, L)

    if pid == 0:
        e = tl.arange(0, EXPERTS)
        choices = e * 0
        sent = (block + L.counts).to(tl.pointer_type(tl.int32))
        R: tl.constexpr = L.R
        for source in tl.static_range(R):
            choices += tl.load(sent + source * L.E_L + e, mask=(e < L.E_L) & whole, other=0)
        tl.store(counts + e, choices, mask=e < L.E_L)
        tl.store(tokens_per_rank + s, rows, mask=s < L.R)
        tl.store(came, total)
        tl.store(came + 1 + s, ends - rows, mask=s < L.R)
        tl.store(came + 1 + L.R, total)
        tl.store(handle + L.RECEIVED, tl.where(whole, good, 0))
        tl.store(handle + L.LONGEST, tl.max(rows, 0).to(tl.int64))
        report_missing(want & ~good, want & ~good & ~excluded, rank, handle, live, alive, report, L)


@triton.jit(do_not_specialize=["rank", "own_block"])
def _contiguous_recv(
    counts, tokens_per_rank, packed, region, control, alive, live, handle, came, routing, report, rank, own_block,
    BITS: tl.constexpr, KNOWN: tl.constexpr, WEIGHTS: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    receive_rows(
        tl.program_id(0), tl.num_programs(0), counts, tokens_per_rank, packed, region, control, alive, live, handle,
        came, routing, report, rank, own_block, BITS, KNOWN, WEIGHTS, PACK, BLOCK, EXPERTS, L, LANES,
    )  # fmt: skip


def contiguous_recv(
    layout: Layout,
    rank: int,
    counts: torch.Tensor,
    tokens_per_rank: torch.Tensor,
    packed: torch.Tensor | None,
    bits: int,
    known: bool,
    weights: bool,
    own_block: int,
    *,
    region: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    came: torch.Tensor,
    routing: Routing,
    report: torch.Tensor,
    programs: int,
) -> None:
    """Launch. counts: int32 [E_l]; tokens_per_rank: int32 [R]; packed: int32 [ceil(H/512), CAPACITY] for UE8M0 scales,
    or None; bits, known, own_block: as they were sent; came: int32 [R + 2]: N, the first row of each source, N. The
    others: `Layout`, `Routing`."""
    items = -(-layout.CAPACITY // _BLOCK) if packed is not None or not known else 1
    launch(
        _contiguous_recv,
        max(1, min(items, programs)),
        (
            counts,
            tokens_per_rank,
            packed if packed is not None else counts,
            region,
            control,
            alive,
            live,
            handle,
            came,
            routing.words,
            report,
            rank,
            own_block,
        ),
        (
            bits,
            known,
            weights,
            packed is not None,
            _BLOCK,
            power_of_two_at_least(layout.E_L),
            layout,
            32 * _WARPS,
        ),
        (),
        num_warps=_WARPS,
    )
