"""Contiguous combine: rows go back to the ranks of their tokens, and are added there, in one launch.

The first `senders` programs copy the rows of `y` that belong to another rank's tokens into `sums` of that rank: chunks
of CHUNK neighbouring rows, the destinations in turns, each chunk announced by a flag of its own. The other programs
take this rank's tokens in order, wait for the chunks that these need, and add the rows up in rank order in fp32,
rounded once. Rows that stay on this rank are read from `y`, unless the halves are launched apart (SPLIT): `y` may have
changed by the second, so that the first copies them too. A token without experts gives zeros.

Senders wait for nobody, and have the lowest numbers, so that they run even where not all programs fit on the device.

Memory-ordering contract
    Runs after contiguous_recv on the same stream. A chunk's rows are stored by one program with plain stores; a CTA
    barrier, and one thread stores the chunk's flag, 2 * step, with system-scope release. When all senders are done, the
    last one raises a COMBINE flag on each rank of the view: 2 * step, or 2 * step + 1 ("excluded") for ranks whose rows
    this rank did not receive. Receivers read flags of chunks with acquire; one of them waits for all COMBINE flags at
    its end, so that after this launch nobody stores into this step's buffers any more. Waits share the budget of the
    phase; a token whose chunk has not come by then lacks that rank's part, and the rank is reported missing. Programs
    need not agree about that, because a row's place does not depend on who is missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.gpu.routing import Routing
from moe_a2a.kernels.casts import to_payload
from moe_a2a.kernels.contiguous_layout import index_of, report_missing
from moe_a2a.kernels.launch import launch, warps
from moe_a2a.kernels.signals import (
    await_lanes,
    end_step,
    excluded_by,
    has_bit,
    is_last,
    open_step,
    pick,
    raise_flag,
    raise_flags,
)

_WARPS = 32
_TILE = 16384  # elements that a sender moves at once
_PART = 1024  # of them, of one row; 7168 columns are a multiple, so that no thread goes without
_OUT_TILE = 8192  # elements that a receiver adds at once, as wide as _UNIT leaves
_CHUNK = 32  # rows that are announced at once; at least Layout.CHUNK
_UNIT = 16  # tokens of which a receiver awaits the chunks at once


@triton.jit
def _send_chunks(
    pid, senders, longest, y, bases, block, came, rank, step, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Copy this program's share of the chunks."""
    r = tl.arange(0, L.R_PAD)
    starts = tl.load(came + 1 + r, mask=r < L.R, other=0)
    counts = tl.load(came + 2 + r, mask=r < L.R, other=0) - starts
    OTHERS: tl.constexpr = L.R if SPLIT else L.R - 1
    PARTS: tl.constexpr = (L.H + PART - 1) // PART
    ITEMS: tl.constexpr = PARTS * (CHUNK // ROWS)  # of a chunk
    for number in range(pid, (longest + CHUNK - 1) // CHUNK * OTHERS, senders):
        place = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in Python ints
        chunk = place // OTHERS
        other = (rank + 1 + place % OTHERS) % L.R
        first = pick(starts, other, L)
        count = pick(counts, other, L)
        base = pick(bases, other, L) + block
        if chunk * CHUNK < count:
            for item in tl.range(0, ITEMS, num_stages=1):
                part = tl.full([], 0, tl.int32) + item
                row = chunk * CHUNK + part // PARTS * ROWS + tl.arange(0, ROWS)
                column = part % PARTS * PART + tl.arange(0, PART)
                inside = (row < count)[:, None] & (column < L.H)[None, :]
                source = y + (first + row).to(tl.int64)[:, None] * L.H
                values = tl.load(source + column[None, :], mask=inside)
                to = base + L.sums + (rank * L.M + row).to(tl.int64) * L.sum_stride
                to = tl.multiple_of(to[:, None].to(tl.pointer_type(DTYPE)), [16, 16])
                tl.store(to + column[None, :], values, mask=inside)
            raise_flag(base + L.chunks + (rank * L.CHUNKS + chunk) * 8, 2 * step)


@triton.jit
def _await_chunks(
    t, end, leader, mine, want, control, alive, handle, within, starts, tokens, rank, step,
    CHUNK: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Wait for the rows of tokens t to end - 1 from all other ranks. Returns the ranks whose rows have not come."""
    lane = tl.arange(0, LANES)
    r = tl.minimum(lane // 2, L.R - 1)
    low = index_of(t + lane * 0, r, within, starts, tokens, L)
    high = index_of(end + lane * 0, r, within, starts, tokens, L)
    on = (lane < 2 * L.R) & (r != rank) & has_bit(want, r.to(tl.int64)) & (high > low)
    chunk = tl.where(lane % 2 == 0, low, tl.maximum(high - 1, 0)) // CHUNK  # no more than two, as UNIT <= CHUNK
    flags = mine + L.chunks + (r * L.CHUNKS + chunk).to(tl.int64) * 8
    return await_lanes(flags, r, on, leader, mine, handle, control, alive, L.COMBINE, step, L, LANES)


@triton.jit(do_not_specialize=["tokens", "rank", "senders"])
def _contiguous_combine(
    out, y, region, peers, control, alive, live, handle, came, hits, within, starts, report, tokens, rank, senders,
    ROWS: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    lane = tl.arange(0, L.R_PAD)
    R: tl.constexpr = L.R
    DTYPE: tl.constexpr = out.dtype.element_ty
    SIZE: tl.constexpr = L.sum_stride
    H: tl.constexpr = L.H
    bases = tl.load(peers + lane, mask=lane < L.R, other=0)
    step = tl.load(handle + L.STEP)
    received = tl.load(handle + L.RECEIVED)
    block = (step & 1) * L.parity_bytes
    mine = region.to(tl.int64) + block

    if pid < senders:
        mask = tl.load(handle + L.VIEW_MASK)
        has_ended = (open_step(live, step, L) != step) & (mask != 0)  # 0: it never began
        longest = tl.where(has_ended, 0, tl.load(handle + L.LONGEST)).to(tl.int32)
        if R > 1 or SPLIT:
            _send_chunks(
                pid, senders, longest, y, bases, block, came, rank, step, DTYPE, ROWS, PART, CHUNK, SPLIT, L,
            )  # fmt: skip
        if is_last(live + (L.FINISHED + L.COMBINE), senders):
            value = 2 * step + tl.where(has_bit(received, lane.to(tl.int64)), 0, 1)
            mask = tl.where(has_ended, 0, mask)
            raise_flags(bases, block + L.flags + L.COMBINE * L.R * 8, rank, value, mask, L)
            if has_ended:
                tl.store(handle + L.EXPECTED, tl.full([], 0, tl.int64))
                tl.atomic_or(report + L.MISUSE, tl.full([], L.ENDED_TWICE, tl.int64))
    else:
        want = tl.load(handle + L.EXPECTED)
        receivers = tl.num_programs(0) - senders
        if SPLIT:
            kept = mine + L.sums + (rank * L.M).to(tl.int64) * SIZE
        else:
            kept = y.to(tl.int64) + tl.load(came + 1 + rank).to(tl.int64) * SIZE  # this rank's own rows
        PARTS: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
        here = has_bit(received, rank)
        silent = want * 0
        for number in range(pid - senders, (tokens + UNIT - 1) // UNIT, receivers):
            item = tl.full([], 0, tl.int32) + number
            begin = item * UNIT
            end = tl.minimum(begin + UNIT, tokens)
            lost = _await_chunks(
                begin, end, pid == senders, mine, want, control, alive, handle, within, starts, tokens, rank, step,
                CHUNK, L, LANES,
            )  # fmt: skip
            silent |= lost
            # Where rows lie does not depend on the column: found before the loop, whose loads then depend on none.
            t = begin + tl.arange(0, UNIT)
            every = tl.arange(0, L.R_PAD)[:, None]
            base = tl.where(every == rank, kept, mine + L.sums + every.to(tl.int64) * (L.M * SIZE))
            place = index_of(
                t[None, :] + every * 0, tl.minimum(every, R - 1) + t[None, :] * 0, within, starts, tokens, L
            )
            rows = base + place.to(tl.int64) * SIZE
            hit = tl.load(hits + t, mask=t < tokens, other=0) & want & ~lost
            for part in tl.range(0, PARTS, num_stages=1):
                column = (tl.full([], 0, tl.int32) + part) * COLUMNS + tl.arange(0, COLUMNS)
                inside = (column < H)[None, :]
                total = tl.zeros([UNIT, COLUMNS], tl.float32)
                for r in tl.static_range(R):
                    on = has_bit(hit, r) & (here | (rank != r))
                    row = tl.sum(tl.where(every == r, rows, 0), 0)
                    row = tl.multiple_of(row[:, None].to(tl.pointer_type(DTYPE)), [16, 16])
                    total += tl.load(row + column[None, :], mask=on[:, None] & inside, other=0.0).to(tl.float32)
                at = out + (t.to(tl.int64) * H)[:, None] + column[None, :]
                tl.store(at, to_payload(total, DTYPE), mask=(t < tokens)[:, None] & inside)
        refused = want * 0
        if pid == senders:
            wide = tl.arange(0, LANES)
            source = tl.minimum(wide, L.R - 1)
            on = (wide < L.R) & has_bit(want, source.to(tl.int64))
            flags = mine + (L.flags + L.COMBINE * L.R * 8) + source.to(tl.int64) * 8
            silent |= await_lanes(flags, source, on, True, mine, handle, control, alive, L.COMBINE, step, L, LANES)
            refused = excluded_by(mine, want, L.COMBINE, step, L, LANES)
            end_step(live, step, L)
        else:
            refused = excluded_by(mine, silent, L.COMBINE, step, L, LANES)
        report_missing(silent | refused, silent & ~refused, rank, handle, live, alive, report, L)


def contiguous_combine(
    layout: Layout,
    rank: int,
    y: torch.Tensor,
    out: torch.Tensor,
    senders: int,
    receivers: int,
    split: bool,
    *,
    region: torch.Tensor,
    peers: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    came: torch.Tensor,
    routing: Routing,
    report: torch.Tensor,
) -> None:
    """Launch. y: [N, H] and out: [T, H], payload dtype; senders, receivers: programs of each kind, both, or only
    senders and later only receivers; split: of the two launches, the second must not read y. came: int32 [R + 1],
    written by contiguous_recv. The others: `Layout`, `Routing`."""
    part = min(power_of_two_at_least(layout.H), _PART, _TILE)
    unit, rows_at_once = min(_UNIT, _CHUNK), min(_TILE // part, _CHUNK)
    columns = min(power_of_two_at_least(layout.H), _OUT_TILE // unit)
    threads = 32 * warps(_WARPS, layout.R)
    launch(
        _contiguous_combine,
        senders + receivers,
        (
            out,
            y,
            region,
            peers,
            control,
            alive,
            live,
            handle,
            came,
            routing.hits,
            routing.within,
            routing.starts,
            report,
            out.shape[0],
            rank,
            senders,
        ),
        (
            rows_at_once,
            part,
            _CHUNK,
            unit,
            columns,
            split,
            layout,
            threads,
        ),
        (out.dtype,),
        num_warps=threads // 32,
        # Sums are rounded one by one, as CPU ranks and the oracle do: the bits are the same everywhere.
        enable_fp_fusion=False,
    )
