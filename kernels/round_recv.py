"""Contiguous dispatch in several rounds, the launch that follows each `round_send`: wait for the rows of one round, and
move them from the places of their sources to where they belong among all rows of the step, in memory of the caller.

Programs take tiles of the rows of a source. The last launch also clears the tables behind the last received row, and
says how many rows there are.

Memory-ordering contract
    Waits for the DISPATCH flag (first round) or the ROUND flag of every rank in the handle's view (acquire), then reads
    and writes this rank's own memory with plain loads and stores. When all programs are done the last one meets at a
    CTA barrier and raises a DRAINED flag on each rank of the view, with system-scope release: the places are free.
    Rows are handed out only if nobody was missing or excluded in any round, here and in round_send; otherwise there are
    none, and the handle's RECEIVED is empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.gpu.routing import Routing
from moe_a2a.kernels.contiguous_layout import agreed, report_missing
from moe_a2a.kernels.launch import launch, warps
from moe_a2a.kernels.rounds import announce, bounds_of, flags_of, forget_wait
from moe_a2a.kernels.signals import is_last, pick, wait

_WARPS = 32  # with one program an SM, all that can be in flight there comes from one program
_TILE = 16384  # words of a work item
_PART = 512  # of them, of one row
_META = 64  # rows whose ids, weights and scales go at once
_SCALES = {None: 0, torch.float32: 1, torch.int32: 2}  # as they are handed out; int32: packed UE8M0


@triton.jit
def _copy_rows(
    block, place, to, on, part, x, WORDS: tl.constexpr, PART: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """PART words of each of the rows at `place` [ROWS], to the rows `to` of x."""
    w = part * PART + tl.arange(0, PART)
    inside = on[:, None] & (w < WORDS)[None, :]
    source = (block + L.rows + place.to(tl.int64) * (WORDS * 4))[:, None]
    source = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), [16, 16])
    into = (x.to(tl.int64) + to.to(tl.int64) * (WORDS * 4))[:, None]
    into = tl.multiple_of(into.to(tl.pointer_type(tl.int32)), [16, 16])
    tl.store(into + w[None, :], tl.load(source + w[None, :], mask=inside), mask=inside)


@triton.jit
def _copy_choices(
    block, place, to, on, ids, weights, source, WEIGHTS: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Local ids, weights and source numbers."""
    k = tl.arange(0, L.K_PAD)
    inside = on[:, None] & (k < L.K)[None, :]
    at = (place.to(tl.int64) * L.K)[:, None] + k[None, :]
    into = (to.to(tl.int64) * L.K)[:, None] + k[None, :]
    chosen = tl.load((block + L.table).to(tl.pointer_type(tl.int64)) + at, mask=inside, other=-1)
    tl.store(ids + into, chosen, mask=inside)
    if WEIGHTS:
        weight = tl.load((block + L.weights).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        tl.store(weights + into, weight, mask=inside)
    tl.store(source + to, tl.load((block + L.source).to(tl.pointer_type(tl.int32)) + place, mask=on), mask=on)


@triton.jit
def _copy_scales(block, place, to, on, scales, most, SCALES: tl.constexpr, L: tl.constexpr):
    """fp32 scales: as they are, [most, G], or their exponents, four to a word: int32 [ceil(G/4), most]."""
    bits = (block + L.scales).to(tl.pointer_type(tl.int32)) + (place.to(tl.int64) * L.G)[:, None]
    if SCALES == 1:
        g = tl.arange(0, L.G_PAD)
        inside = on[:, None] & (g < L.G)[None, :]
        into = scales + (to.to(tl.int64) * L.G)[:, None] + g[None, :]
        tl.store(into, tl.load(bits + g[None, :], mask=inside), mask=inside)
    else:
        four = tl.arange(0, 4)
        WIDTH: tl.constexpr = (L.G + 3) // 4
        for w in tl.static_range(WIDTH):
            value = tl.load(bits + w * 4 + four[None, :], mask=on[:, None] & (w * 4 + four < L.G)[None, :], other=0)
            word = tl.sum(((value >> 23) & 0xFF) << (four * 8)[None, :], 1)
            tl.store(scales + to + most.to(tl.int64) * w, word, mask=on)


@triton.jit
def _clear(ids, weights, source, row, on, WEIGHTS: tl.constexpr, L: tl.constexpr):
    """No token, in the tables of these rows."""
    k = tl.arange(0, L.K_PAD)
    at = (row.to(tl.int64) * L.K)[:, None] + k[None, :]
    inside = on[:, None] & (k < L.K)[None, :]
    tl.store(ids + at, tl.full([], -1, tl.int64) + at * 0, mask=inside)
    if WEIGHTS:
        tl.store(weights + at, (at * 0).to(tl.float32), mask=inside)
    tl.store(source + row, row * 0 - 1, mask=on)


@triton.jit(do_not_specialize=["rank", "own_block", "turn", "ends_here", "most"])
def _round_recv(
    x, ids, weights, source, scales, counts, tokens_per_rank, region, peers, control, alive, live, handle, came,
    routing, report, rank, own_block, turn, ends_here, most,
    FIRST: tl.constexpr, BITS: tl.constexpr, KNOWN: tl.constexpr, WEIGHTS: tl.constexpr, SCALES: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, META: tl.constexpr, EXPERTS: tl.constexpr,
    L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    s = tl.arange(0, L.R_PAD)
    step = tl.load(handle + L.STEP)
    before = tl.load(handle + L.MISSING)
    view = tl.load(handle + L.VIEW_MASK)
    epoch, followed = tl.load(handle + L.VIEW_EPOCH), tl.load(routing + L.ROUTING_STEP)
    block = (step & 1) * L.parity_bytes
    mine = region.to(tl.int64) + block
    if FIRST:
        is_void, is_empty = before != 0, view < 0
        want = view & ~before
        arrived, excluded = wait(pid, mine, handle, control, alive, L.DISPATCH, want, step, L, LANES)
        there = arrived & ~excluded
    else:
        is_void = (before != 0) | (tl.load(handle + L.RECEIVED) == 0)
        is_empty = turn >= tl.load(handle + L.FILLED)
        want = tl.where(is_void | is_empty, view * 0, view)
        flags = flags_of(mine, turn, L)
        arrived, excluded = wait(pid, flags, handle, control, alive, L.ROUND, want, step, L, LANES)
        there = (arrived & ~excluded) | (view & ~want)
    good, matrix = agreed(mine, there, step, epoch, followed, BITS, L)
    lost = want & ~good
    is_void |= lost != 0

    rows = tl.where(is_void, 0, tl.sum(tl.where(s[None, :] == rank, matrix, 0), 1))
    ends = tl.cumsum(rows, 0)
    total = tl.sum(rows, 0)
    earlier, count = bounds_of(mine, turn, L)
    count = tl.where(is_void | is_empty, 0, count)
    longest = tl.max(count, 0)
    first = ends - rows + earlier  # where the first row of the round of each source belongs
    staged = region.to(tl.int64) + own_block.to(tl.int64) * L.parity_bytes
    PARTS: tl.constexpr = (WORDS + PART - 1) // PART
    R: tl.constexpr = L.R
    for item in range(pid, (longest + ROWS - 1) // ROWS * (R * PARTS), programs):
        at = tl.full([], 0, tl.int32) + item  # the interpreter's loops count in Python ints
        origin = at // PARTS % R
        row = at // (PARTS * R) * ROWS + tl.arange(0, ROWS)
        to = pick(first, origin, L) + row
        on = (row < pick(count, origin, L)) & (to < most)
        _copy_rows(staged, origin * L.W + row, to, on, at % PARTS, x, WORDS, PART, L)
    if not KNOWN or SCALES != 0:
        for item in range(pid, (longest + META - 1) // META * R, programs):
            at = tl.full([], 0, tl.int32) + item
            origin = at % R
            row = at // R * META + tl.arange(0, META)
            to = pick(first, origin, L) + row
            on = (row < pick(count, origin, L)) & (to < most)
            if not KNOWN:
                _copy_choices(staged, origin * L.W + row, to, on, ids, weights, source, WEIGHTS, L)
            if SCALES != 0:
                _copy_scales(staged, origin * L.W + row, to, on, scales, most, SCALES, L)
    if not KNOWN:
        for item in range(pid * META, ends_here * L.MOST, programs * META):
            row = item + tl.arange(0, META)
            _clear(ids, weights, source, row, (row >= total) & (row < L.MOST), WEIGHTS, L)

    if pid == 0:
        e = tl.arange(0, EXPERTS)
        choices = e * 0
        sent = (mine + L.counts).to(tl.pointer_type(tl.int32))
        for origin in tl.static_range(R):
            choices += tl.load(sent + origin * L.E_L + e, mask=(e < L.E_L) & (total > 0), other=0)
        tl.store(counts + e, choices, mask=e < L.E_L)
        tl.store(tokens_per_rank + s, rows, mask=s < L.R)
        tl.store(came, total)
        tl.store(came + 1 + s, ends - rows, mask=s < L.R)
        tl.store(came + 1 + L.R, total)
        tl.store(handle + L.RECEIVED, tl.where(is_void, view * 0, view))
        report_missing(lost, lost & ~excluded, rank, handle, live, alive, report, L)
    if is_last(live + (L.FINISHED + L.DISPATCH), programs):
        if not FIRST:
            forget_wait(handle, L.ROUND, L)
        if (turn < L.ROUNDS - 1) & (is_void | (is_empty == 0)):
            bases = tl.load(peers + s, mask=s < L.R, other=0)
            excluding = tl.where(is_void, 1, 0) + s * 0
            announce(bases, flags_of(block, turn, L), L.DRAINED, rank, step, excluding, view, L)


def round_recv(
    layout: Layout,
    rank: int,
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    scales: torch.Tensor | None,
    counts: torch.Tensor,
    tokens_per_rank: torch.Tensor,
    bits: int,
    known: bool,
    own_block: int,
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
    """Launch one round. x: [n, H], n rows of what is handed out; tables: int64 [R*M, K] ids, fp32 [R*M, K] weights or
    None, int32 [R*M] source numbers; scales: fp32 [n, H/128], int32 [ceil(H/512), n] for UE8M0, or None; counts: int32
    [E_l]; tokens_per_rank: int32 [R]; bits, known, own_block: as they were sent; turn: number of the round; ends_here:
    it is the last to be launched; came: int32 [R + 2]: N, the first row of each source, N. The others: `Layout`,
    `Routing`."""
    ids, weights, source = tables
    words = layout.H * x.element_size() // 4
    threads = 32 * warps(_WARPS, layout.R)
    part = min(power_of_two_at_least(words), _PART)
    rows_at_once = _TILE // part
    items = max(-(-layout.W // rows_at_once) * layout.R * -(-words // part), -(-layout.MOST // _META))
    form = None if scales is None else scales.dtype
    launch(
        _round_recv,
        min(items, programs),
        (
            x.view(torch.uint8),
            ids,
            weights if weights is not None else counts,
            source,
            scales.view(torch.int32) if scales is not None else counts,
            counts,
            tokens_per_rank,
            region,
            peers,
            control,
            alive,
            live,
            handle,
            came,
            routing.words,
            report,
            rank,
            own_block,
            turn,
            int(ends_here),
            x.shape[0],
        ),
        (
            turn == 0,
            bits,
            known,
            weights is not None,
            _SCALES[form],
            words,
            rows_at_once,
            part,
            _META,
            power_of_two_at_least(layout.E_L),
            layout,
            threads,
        ),
        (torch.int32 if weights is None else torch.float32,),
        num_warps=threads // 32,
    )
