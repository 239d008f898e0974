"""Contiguous combine in several rounds, two launches a round: rows of the tokens of one round go back to the ranks of
their tokens, and are added there.

A token's rows come from all of its ranks in the same round, so that they are added up as in one round: in rank order,
in fp32, rounded once. Rows that stay on this rank are read from `y`. A token without experts gives zeros.

Memory-ordering contract
    Runs after the last round_recv on the same stream. From the second round on the sending launch waits for the DRAINED
    flag of the round before, of every rank whose rows this rank has and that has not been missing since (acquire). Its
    last program raises one flag on each rank of the view, with system-scope release: COMBINE in the first round, then
    ROUND, with "excluded" for ranks that get no rows. The summing launch waits for that flag of every rank that is
    expected to come, and its last program raises DRAINED flags, "excluded" for ranks whose rows were not added. After
    the last round nobody stores into this step's buffers any more.
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
from moe_a2a.kernels.rounds import announce, bounds_of, flags_of, forget_wait
from moe_a2a.kernels.signals import end_step, has_bit, is_last, open_step, pick, wait

_WARPS = 32
_TILE = 16384  # elements that are sent at once
_PART = 1024  # of them, of one row
_OUT_TILE = 8192  # elements that are added at once
_UNIT = 16  # tokens of them, at most


@triton.jit(do_not_specialize=["rank", "turn", "most"])
def _round_combine_send(
    y, region, peers, control, alive, live, handle, came, report, rank, turn, most,
    FIRST: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    r = tl.arange(0, L.R_PAD)
    DTYPE: tl.constexpr = y.dtype.element_ty
    bases = tl.load(peers + r, mask=r < L.R, other=0)
    step = tl.load(handle + L.STEP)
    view = tl.load(handle + L.VIEW_MASK)
    received = tl.load(handle + L.RECEIVED)
    block = (step & 1) * L.parity_bytes
    mine = region.to(tl.int64) + block
    has_ended = (open_step(live, step, L) != step) & (view != 0)  # 0: it never began
    view = tl.where(has_ended, 0, view)
    if FIRST:
        is_empty = view < 0
        taking = tl.where(has_ended, 0, received)
    else:
        is_empty = turn >= tl.load(handle + L.FILLED)
        want = received & tl.load(handle + L.EXPECTED) & ~tl.load(handle + L.MISSING)
        want = tl.where(has_ended | is_empty, 0, want)
        flags = flags_of(mine, L.ROUNDS + turn - 1, L)
        arrived, excluded = wait(pid, flags, handle, control, alive, L.DRAINED, want, step, L, LANES)
        taking = arrived & ~excluded
        if pid == 0:
            report_missing(want & ~taking, want & ~arrived, rank, handle, live, alive, report, L)

    earlier, count = bounds_of(mine, turn, L)
    count = tl.where(has_bit(taking, r.to(tl.int64)), count, 0)
    first = tl.load(came + 1 + r, mask=r < L.R, other=0) + earlier
    PARTS: tl.constexpr = (L.H + PART - 1) // PART
    OTHERS: tl.constexpr = L.R - 1
    if OTHERS > 0:
        longest = tl.max(tl.where(r == rank, 0, count), 0)
        for item in range(pid, (longest + ROWS - 1) // ROWS * (OTHERS * PARTS), programs):
            at = tl.full([], 0, tl.int32) + item  # the interpreter's loops count in Python ints
            other = (rank + 1 + at // PARTS % OTHERS) % L.R
            row = at // (PARTS * OTHERS) * ROWS + tl.arange(0, ROWS)
            column = at % PARTS * PART + tl.arange(0, PART)
            place = pick(first, other, L) + row
            on = (row < pick(count, other, L)) & (place < most)
            inside = on[:, None] & (column < L.H)[None, :]
            values = tl.load(y + place.to(tl.int64)[:, None] * L.H + column[None, :], mask=inside)
            to = pick(bases, other, L) + block + L.sums + (rank * L.W + row).to(tl.int64) * L.sum_stride
            to = tl.multiple_of(to[:, None].to(tl.pointer_type(DTYPE)), [16, 16])
            tl.store(to + column[None, :], values, mask=inside)

    if is_last(live + (L.FINISHED + L.COMBINE), programs):
        excluding = tl.where(has_bit(taking, r.to(tl.int64)), 0, 1)
        if FIRST:
            announce(bases, block, L.COMBINE, rank, step, excluding, view, L)
            if has_ended:
                tl.store(handle + L.EXPECTED, tl.full([], 0, tl.int64))
                tl.atomic_or(report + L.MISUSE, tl.full([], L.ENDED_TWICE, tl.int64))
        else:
            forget_wait(handle, L.DRAINED, L)
            if is_empty == 0:
                announce(bases, flags_of(block, L.ROUNDS + turn, L), L.ROUND, rank, step, excluding, view, L)


@triton.jit(do_not_specialize=["tokens", "rank", "turn", "ends_here"])
def _round_combine_recv(
    out, y, region, peers, control, alive, live, handle, came, hits, within, starts, report, tokens, rank, turn,
    ends_here,
    FIRST: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    r = tl.arange(0, L.R_PAD)
    R: tl.constexpr = L.R
    H: tl.constexpr = L.H
    SIZE: tl.constexpr = L.sum_stride
    DTYPE: tl.constexpr = out.dtype.element_ty
    step = tl.load(handle + L.STEP)
    view = tl.load(handle + L.VIEW_MASK)
    want = tl.load(handle + L.EXPECTED)
    received = tl.load(handle + L.RECEIVED)
    view = tl.where(open_step(live, step, L) == step, view, 0)  # a step that has ended tells nobody anything
    block = (step & 1) * L.parity_bytes
    mine = region.to(tl.int64) + block
    if FIRST:
        is_empty = view < 0
        arrived, excluded = wait(pid, mine, handle, control, alive, L.COMBINE, want, step, L, LANES)
    else:
        is_empty = turn >= tl.load(handle + L.FILLED)
        want = tl.where(is_empty, 0, want & ~tl.load(handle + L.MISSING))
        flags = flags_of(mine, L.ROUNDS + turn, L)
        arrived, excluded = wait(pid, flags, handle, control, alive, L.ROUND, want, step, L, LANES)
    added = arrived & ~excluded
    if pid == 0:
        report_missing(want & ~added, want & ~arrived, rank, handle, live, alive, report, L)

    begin = turn * L.W
    end = tl.where(is_empty, begin, tl.maximum(tl.minimum(begin + L.W, tokens), begin))
    here = has_bit(received, rank)
    every = r[:, None]
    source = tl.minimum(every, R - 1)
    earlier = index_of(tl.minimum(begin, tokens) + r * 0, tl.minimum(r, R - 1), within, starts, tokens, L)
    kept = y.to(tl.int64) + (tl.load(came + 1 + rank) + pick(earlier, rank, L)).to(tl.int64) * SIZE
    base = tl.where(every == rank, kept, mine + L.sums + every.to(tl.int64) * (L.W * SIZE))
    PARTS: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    for item in range(pid, (end - begin + UNIT - 1) // UNIT, programs):
        t = begin + (tl.full([], 0, tl.int32) + item) * UNIT + tl.arange(0, UNIT)
        is_there = t < end
        place = index_of(t[None, :] + every * 0, source + t[None, :] * 0, within, starts, tokens, L)
        rows = base + (place - earlier[:, None]).to(tl.int64) * SIZE
        hit = tl.load(hits + t, mask=is_there, other=0) & added
        for part in range(PARTS):
            column = (tl.full([], 0, tl.int32) + part) * COLUMNS + tl.arange(0, COLUMNS)
            inside = (column < H)[None, :]
            total = tl.zeros([UNIT, COLUMNS], tl.float32)
            for origin in tl.static_range(R):
                on = has_bit(hit, origin) & (here | (rank != origin))
                row = tl.sum(tl.where(every == origin, rows, 0), 0)
                row = tl.multiple_of(row[:, None].to(tl.pointer_type(DTYPE)), [16, 16])
                total += tl.load(row + column[None, :], mask=on[:, None] & inside, other=0.0).to(tl.float32)
            at = out + (t.to(tl.int64) * H)[:, None] + column[None, :]
            tl.store(at, to_payload(total, DTYPE), mask=is_there[:, None] & inside)

    if is_last(live + (L.FINISHED + L.COMBINE), programs):
        if not FIRST:
            forget_wait(handle, L.ROUND, L)
        if ends_here != 0:
            end_step(live, step, L)
        if (turn < L.ROUNDS - 1) & (is_empty == 0):
            bases = tl.load(peers + r, mask=r < L.R, other=0)
            excluding = tl.where(has_bit(added, r.to(tl.int64)), 0, 1)
            announce(bases, flags_of(block, L.ROUNDS + turn, L), L.DRAINED, rank, step, excluding, view, L)


def round_combine_send(
    layout: Layout,
    rank: int,
    y: torch.Tensor,
    turn: int,
    *,
    region: torch.Tensor,
    peers: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    came: torch.Tensor,
    report: torch.Tensor,
    programs: int,
) -> None:
    """Launch the sending of one round. y: [N, H], payload dtype; turn: number of the round, from 0; came: int32
    [R + 2], written by round_recv. The others: `Layout`."""
    part = min(power_of_two_at_least(layout.H), _PART)
    rows_at_once = _TILE // part
    threads = 32 * warps(_WARPS, layout.R)
    items = -(-layout.W // rows_at_once) * (layout.R - 1) * -(-layout.H // part)
    launch(
        _round_combine_send,
        max(1, min(items, programs)),
        (y, region, peers, control, alive, live, handle, came, report, rank, turn, y.shape[0]),
        (turn == 0, rows_at_once, part, layout, threads),
        (y.dtype,),
        num_warps=threads // 32,
    )


def round_combine_recv(
    layout: Layout,
    rank: int,
    y: torch.Tensor,
    out: torch.Tensor,
    turn: int,
    ends_here: bool,
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
    programs: int,
) -> None:
    """Launch the sums of one round. y: as it was sent; out: [T, H], payload dtype; ends_here: it is the last round to
    be launched, and ends the step. The others as for `round_combine_send`, and `Routing`."""
    unit = _UNIT
    columns = min(power_of_two_at_least(layout.H), _OUT_TILE // unit)
    threads = 32 * warps(_WARPS, layout.R)
    most = min(max(out.shape[0] - turn * layout.W, 0), layout.W)
    launch(
        _round_combine_recv,
        max(1, min(-(-most // unit), programs)),
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
            turn,
            int(ends_here),
        ),
        (turn == 0, unit, columns, layout, threads),
        (out.dtype,),
        num_warps=threads // 32,
        # Sums are rounded one by one, as CPU ranks and the oracle do: the bits are the same everywhere.
        enable_fp_fusion=False,
    )
