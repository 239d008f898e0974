"""Contiguous dispatch, first launch: what this rank will send, told to all ranks.

Programs take blocks of tokens: check the ids, and find for every token its destination ranks, and how many tokens of
the block before it go to each of them. The last program to finish adds the blocks up, and stores the number of rows for
each rank (a row of `matrix`), for each of the receiver's experts, and a header into every rank's memory. Whoever has
all rows of the matrix knows where the rows of every source lie on every rank: packed, in (source rank, token) order.
Of steps in several rounds it also tells every rank how many rows come before each round.

With KNOWN nothing is counted: the step follows the routing of an earlier one, whose counts are told again.

Memory-ordering contract
    Reads `live` and `control` (written before this launch). Writes the routing with plain stores; then the last program
    stores matrix, counts and headers, meets at a CTA barrier, and raises one LAYOUT flag on each rank of the view, with
    system-scope release: "excluded" if the step cannot be, because a rank of the view was given up before, or because
    the view or the tables have changed since the step that it follows. If its buffers are still those of an open step,
    nobody gets anything. The row of the matrix ends with the block into which this rank wants its rows of this step:
    the flag says that all that was launched here before is done with that block. It writes the handle and advances the
    step in `live`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.gpu.routing import Routing
from moe_a2a.kernels.bad_input import report_bad
from moe_a2a.kernels.launch import launch
from moe_a2a.kernels.signals import (
    either,
    has_bit,
    is_last,
    is_taken,
    lane_bits,
    next_step,
    raise_flags,
    record_missing,
)

_WARPS = 8
_SCAN = 64  # blocks that the last program adds up at once


@triton.jit
def _checked(ids, t, tokens, report, L: tl.constexpr):
    """The ids of tokens t [BLOCK], with -1 for none and for wrong ones: int32 [BLOCK, K_PAD]. The first wrong one is
    reported."""
    K: tl.constexpr = L.K
    k = tl.arange(0, L.K_PAD)
    row = t.to(tl.int64) * L.K
    inside = (t < tokens)[:, None] & (k < L.K)[None, :]
    raw = tl.load(ids + row[:, None] + k[None, :], mask=inside, other=-1).to(tl.int64)
    wrong = inside & ((raw < -1) | (raw >= L.E))
    own = tl.where(wrong, -1, raw).to(tl.int32)
    twice = own < -1  # all False
    for j in tl.static_range(K):
        other = tl.load(ids + row + j, mask=t < tokens, other=-1).to(tl.int64)
        other = tl.where((other >= 0) & (other < L.E), other, -2).to(tl.int32)
        twice |= (own == other[:, None]) & (k > j)[None, :]
    seen = tl.minimum(tl.maximum(raw, -(1 << 31)), (1 << 31) - 1) + (1 << 31)
    choice = t[:, None] * 0 + k[None, :]
    report_bad(wrong | twice, t[:, None], choice, twice.to(tl.int32), seen, report, L)
    return tl.where(twice, -1, own)


@triton.jit
def _count(
    block, ids, hits, within, starts, chosen, experts, report, tokens, mask, L: tl.constexpr
):  # fmt: skip
    """One block of tokens."""
    t = block * L.BLOCK + tl.arange(0, L.BLOCK)
    k = tl.arange(0, L.K_PAD)
    r = tl.arange(0, L.R_PAD)
    own = _checked(ids, t, tokens, report, L)
    row = t.to(tl.int64)[:, None]
    tl.store(chosen + row * L.K + k[None, :], own, mask=(t < tokens)[:, None] & (k < L.K)[None, :])
    tl.atomic_add(experts + tl.maximum(own, 0), 1, mask=own >= 0, sem="relaxed", scope="gpu")
    owner = tl.maximum(own, 0) // L.E_L
    one = tl.full([], 1, tl.int64)
    hit = tl.reduce(tl.where(own >= 0, one << owner.to(tl.int64), 0), 1, either) & mask
    tl.store(hits + t, hit, mask=t < tokens)
    goes = has_bit(hit[:, None], r.to(tl.int64)[None, :]).to(tl.int32)
    before = tl.cumsum(goes, 0) - goes
    tl.store(within + row * L.R + r[None, :], before, mask=(r < L.R)[None, :])
    tl.store(starts + block * L.R + r, tl.sum(goes, 0), mask=r < L.R)


@triton.jit
def _add_up(starts, blocks, L: tl.constexpr, SCAN: tl.constexpr):
    """Counts of blocks -> rows before each block, and behind the last all of them: int32 [R_PAD], which is returned."""
    r = tl.arange(0, L.R_PAD)
    carry = r * 0
    for first in range(0, blocks, SCAN):
        b = first + tl.arange(0, SCAN)
        at = starts + b[:, None] * L.R + r[None, :]
        on = (b < blocks)[:, None] & (r < L.R)[None, :]
        count = tl.load(at, mask=on, other=0)
        tl.store(at, carry[None, :] + tl.cumsum(count, 0) - count, mask=on)
        carry += tl.sum(count, 0)
    tl.store(starts + blocks * L.R + r, carry, mask=r < L.R)
    return carry


@triton.jit
def index_of(t, r, within, starts, tokens, L: tl.constexpr):
    """How many of this rank's tokens before t go to rank r, for t from 0 to `tokens`. t and r: of one shape."""
    last = (tokens + L.BLOCK - 1) // L.BLOCK
    inside = t < tokens
    block = tl.where(inside, t // L.BLOCK, last)
    return tl.load(starts + block * L.R + r) + tl.load(within + t.to(tl.int64) * L.R + r, mask=inside, other=0)


@triton.jit
def _tell_bounds(to, on, rank, within, starts, tokens, BLOCK: tl.constexpr, L: tl.constexpr):
    """How many of this rank's tokens go to each rank before each round. to: int64 [R_PAD], blocks of the ranks; on:
    which of them are told."""
    r = tl.arange(0, L.R_PAD)
    tl.debug_barrier()  # other threads of this program have stored what is read here
    for begin in range(0, L.ROUNDS + 1, BLOCK):
        turn = begin + tl.arange(0, BLOCK)
        t = tl.minimum(tl.minimum(turn, L.ROUNDS) * L.W, tokens)[:, None] + (r * 0)[None, :]
        rows = index_of(t, tl.minimum(r, L.R - 1)[None, :] + t * 0, within, starts, tokens, L)
        at = (to + L.bounds)[None, :] + ((rank * (L.ROUNDS + 1) + turn) * 4)[:, None].to(tl.int64)
        tl.store(at.to(tl.pointer_type(tl.int32)), rows, mask=(turn <= L.ROUNDS)[:, None] & on[None, :])


@triton.jit
def agreed(block, arrived, step, epoch, routing, BITS: tl.constexpr, L: tl.constexpr):
    """What the sources said with their LAYOUT flags: (sources that fit, matrix int32 [R_PAD, R_PAD]).

    block: int64 address of this rank's block of the step's parity. The matrix has a row for each source, zeros for
    those that did not arrive or do not fit; no entry is more than M, whatever a damaged peer wrote.
    """
    s = tl.arange(0, L.R_PAD)
    on = (s < L.R) & has_bit(arrived, s.to(tl.int64))
    header = (block + L.headers).to(tl.pointer_type(tl.int64)) + s * L.HEADER_WORDS
    tokens = tl.load(header + L.HEADER_TOKENS, mask=on, other=-1)
    fits = on & (tl.load(header + L.HEADER_STEP, mask=on, other=-1) == step)
    fits &= tl.load(header + L.HEADER_EPOCH, mask=on, other=-1) == epoch
    fits &= tl.load(header + L.HEADER_BITS, mask=on, other=-1) == BITS
    fits &= tl.load(header + L.HEADER_ROUTING, mask=on, other=-1) == routing
    fits &= (tokens >= 0) & (tokens <= L.M)
    # Loaded whether or not the headers fit: after them would be a round trip more.
    counts = (block + L.matrix).to(tl.pointer_type(tl.int32)) + s[:, None] * (L.R + 1) + s[None, :]
    matrix = tl.load(counts, mask=on[:, None] & (s < L.R)[None, :], other=0)
    fits &= tl.min(((matrix >= 0) & (matrix <= tokens.to(tl.int32)[:, None])).to(tl.int32), 1) > 0
    return lane_bits(fits, s.to(tl.int64)), tl.where(fits[:, None], matrix, 0)


@triton.jit
def report_missing(lost, gone, rank, handle, live, alive, report, L: tl.constexpr):
    """Write down that ranks are missing from a step; that this rank's own rows are lost with theirs goes without
    saying.

    lost: mask of ranks whose rows are not to be had; gone: those of them that did not come. The others came, and said
    "excluded" because they miss somebody themselves: they have stopped storing, and stay in steps to come.
    """
    others = ~(tl.full([], 1, tl.int64) << rank)
    gone &= others
    excluding = lost & ~gone & others
    if gone != 0:
        tl.atomic_and(handle + L.EXPECTED, ~gone)
        record_missing(gone, handle, live, alive, report, L)
    if excluding != 0:
        tl.atomic_or(handle + L.MISSING, excluding)
        tl.atomic_or(report + L.LOST, excluding)


@triton.jit(do_not_specialize=["tokens", "rank", "own_block"])
def _contiguous_layout(
    ids, peers, control, live, handle, hits, within, starts, chosen, experts, sent, routing, report,
    tokens, rank, own_block,
    KNOWN: tl.constexpr, BITS: tl.constexpr, E_PAD: tl.constexpr, SCAN: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    r = tl.arange(0, L.R_PAD)
    bases = tl.load(peers + r, mask=r < L.R, other=0)
    step, view, epoch, gone = next_step(live, control, L)
    too_early = is_taken(live, step, own_block.to(tl.int64), L)
    mask = tl.where(too_early, 0, view & ~gone)
    block = (step & 1) * L.parity_bytes
    blocks = (tokens + L.BLOCK - 1) // L.BLOCK

    if not KNOWN:
        for number in range(pid, blocks, tl.num_programs(0)):
            item = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in Python ints
            _count(item, ids, hits, within, starts, chosen, experts, report, tokens, mask, L)

    if KNOWN:
        last = pid == 0  # there is no other
    else:
        last = is_last(live + (L.FINISHED + L.LAYOUT), tl.num_programs(0))
    if last:
        e = tl.arange(0, E_PAD)
        if KNOWN:
            rows = tl.load(starts + blocks * L.R + r, mask=r < L.R, other=0)
            choices = tl.load(sent + e, mask=e < L.E, other=0)
        else:
            rows = _add_up(starts, blocks, L, SCAN)
            choices = tl.load(experts + e, mask=e < L.E, other=0)
            tl.store(experts + e, choices * 0, mask=e < L.E)
            tl.store(sent + e, choices, mask=e < L.E)
            tl.store(routing + L.ROUTING_STEP, step)
            tl.store(routing + L.ROUTING_MASK, mask)
            tl.store(routing + L.ROUTING_BLOCK, own_block.to(tl.int64))
        followed = step
        missing = view & ~mask
        overwritten = mask < 0
        if KNOWN:
            followed = tl.load(routing + L.ROUTING_STEP)
            missing |= tl.load(routing + L.ROUTING_MASK) ^ mask
            even, odd = tl.load(live + L.TABLES), tl.load(live + (L.TABLES + 1))
            overwritten = tl.where(tl.load(routing + L.ROUTING_BLOCK) == 0, even, odd) != followed
            missing |= tl.where(overwritten, tl.full([], 1, tl.int64) << rank, 0)

        on = (r < L.R) & has_bit(mask, r.to(tl.int64))
        to = bases + block
        row = (to + (L.matrix + rank * (4 * (L.R + 1))))[:, None] + (r * 4)[None, :]
        tl.store(
            row.to(tl.pointer_type(tl.int32)), rows[None, :] + (r * 0)[:, None], mask=on[:, None] & (r < L.R)[None, :]
        )
        wanted = (to + (L.matrix + rank * (4 * (L.R + 1)) + 4 * L.R)).to(tl.pointer_type(tl.int32))
        tl.store(wanted, own_block + r * 0, mask=on)
        SEVERAL: tl.constexpr = L.ROUNDS > 1
        if SEVERAL:
            _tell_bounds(to, on, rank, within, starts, tokens, SCAN, L)
        owner = tl.minimum(e // L.E_L, L.R - 1)
        inside = (e < L.E) & has_bit(mask, owner.to(tl.int64))
        count = tl.load(peers + owner, mask=inside, other=0) + block + L.counts
        count += (rank * L.E_L + e - owner * L.E_L).to(tl.int64) * 4
        tl.store(count.to(tl.pointer_type(tl.int32)), choices, mask=inside)
        header = (to + (L.headers + rank * (8 * L.HEADER_WORDS))).to(tl.pointer_type(tl.int64))
        zero = (r * 0).to(tl.int64)
        tl.store(header + L.HEADER_STEP, step + zero, mask=on)
        tl.store(header + L.HEADER_EPOCH, epoch + zero, mask=on)
        tl.store(header + L.HEADER_INCARNATION, tl.load(control + L.INCARNATION) + zero, mask=on)
        tl.store(header + L.HEADER_TOKENS, tokens + zero, mask=on)
        tl.store(header + L.HEADER_BITS, BITS + zero, mask=on)
        tl.store(header + L.HEADER_ROUTING, followed + zero, mask=on)
        tl.debug_barrier()
        flag = 2 * step + tl.where(missing != 0, 1, 0)
        raise_flags(bases, block + L.flags + L.LAYOUT * L.R * 8, rank, flag + zero, mask, L)

        word = tl.arange(0, L.HANDLE_WORDS)
        value = tl.where((word == L.VIEW_MASK) | (word == L.EXPECTED), mask, 0)
        value = tl.where(word == L.STEP, step, tl.where(word == L.VIEW_EPOCH, epoch, value))
        value = tl.where(word == L.ROWS, 1, tl.where(word == L.MISSING, missing, value))
        tl.store(handle + word, value)
        tl.store(live + L.LIVE_STEP, step)
        if overwritten:
            tl.atomic_or(report + L.MISUSE, tl.full([], L.ROUTING_GONE, tl.int64))
        if too_early:
            tl.atomic_or(report + L.MISUSE, tl.full([], L.STARTED_EARLY, tl.int64))
        else:
            tl.store(live + L.OPEN + (step & 1), step)
            tl.store(live + L.HELD + own_block, step)
            if not KNOWN:
                tl.store(live + L.TABLES + own_block, step)
            if (missing != 0) & (overwritten == 0):
                tl.atomic_or(report + L.LOST, missing)


def contiguous_layout(
    layout: Layout,
    rank: int,
    ids: torch.Tensor | None,
    tokens: int,
    bits: int,
    own_block: int,
    *,
    peers: torch.Tensor,
    control: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    routing: Routing,
    experts: torch.Tensor,
    report: torch.Tensor,
    programs: int,
) -> None:
    """Launch. ids: int32 or int64 [T, K], or None to follow `routing` as an earlier step left it; bits: for the header
    (`formats.header_bits`); own_block: 0 or 1, where this rank wants its rows; experts: int32 [E], zeros before and
    after; programs: the most to launch. The others: `Layout`, `Routing`."""
    known = ids is None
    launch(
        _contiguous_layout,
        1 if known else max(1, min(-(-tokens // layout.BLOCK), programs)),
        (
            routing.chosen if ids is None else ids,
            peers,
            control,
            live,
            handle,
            routing.hits,
            routing.within,
            routing.starts,
            routing.chosen,
            experts,
            routing.sent,
            routing.words,
            report,
            tokens,
            rank,
            own_block,
        ),
        (known, bits, power_of_two_at_least(layout.E), _SCAN, layout),
        (torch.int32 if ids is None else ids.dtype,),
        num_warps=_WARPS,
    )
