"""Contiguous dispatch in several rounds, the second launch and each that follows a `round_recv`: store this rank's
tokens of one round into their places on the ranks that they go to.

Rows, scales, ids and weights are those of `contiguous_send`, whose loops this shares; a row lies at

    places of the ranks before this one + tokens of this round before it that go there

Memory-ordering contract
    The first round waits for LAYOUT flags, and a later one for the DRAINED flags of the round before, of every rank in
    the handle's view (acquire). Stores are plain; then the last program meets at a CTA barrier, and raises one flag on
    each rank of the view, with system-scope release: DISPATCH in the first round, then ROUND (see
    `moe_a2a.kernels.rounds`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.gpu.routing import Routing
from moe_a2a.kernels.contiguous_layout import agreed, index_of, report_missing
from moe_a2a.kernels.contiguous_send import (
    SCALES_AT_ONCE,
    send_choices,
    send_quantised,
    send_scales,
    send_words,
    tell_host,
)
from moe_a2a.kernels.formats import QUANTISE, QUANTISE_POW2
from moe_a2a.kernels.launch import launch, warps
from moe_a2a.kernels.rounds import announce, flags_of, forget_wait
from moe_a2a.kernels.signals import has_bit, is_last, wait

_WARPS = 32
_QUANTISING_WARPS = 16  # registers for twice as many elements a thread
_TILE = 8192  # words, or elements that are quantised, of a work item
_PART = 512  # of them, of one row
_META = 128  # tokens whose ids and weights go at once


@triton.jit
def _count_rounds(host, ticket, handle, block, good, EXPERTS: tl.constexpr, L: tl.constexpr):
    """Write how many rounds hold tokens of the sources in `good`: into the handle, and for the host."""
    s = tl.arange(0, L.R_PAD)
    header = (block + L.headers).to(tl.pointer_type(tl.int64)) + s * L.HEADER_WORDS
    tokens = tl.load(header + L.HEADER_TOKENS, mask=(s < L.R) & has_bit(good, s.to(tl.int64)), other=0)
    rounds = tl.maximum((tl.max(tokens, 0) + L.W - 1) // L.W, 1)
    tl.store(handle + L.FILLED, rounds)
    tl.store(host + (L.R + L.E_L), (ticket.to(tl.int64) << 32) | rounds)


@triton.jit(do_not_specialize=["tokens", "rank", "ticket", "turn"])
def _round_send(
    x, weights, scales, region, peers, control, alive, live, handle, hits, within, starts, chosen, routing, host,
    report, tokens, rank, ticket, turn,
    FIRST: tl.constexpr, MODE: tl.constexpr, WEIGHTS: tl.constexpr, LARGEST: tl.constexpr, KNOWN: tl.constexpr,
    BITS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    META: tl.constexpr, SCALES: tl.constexpr, EXPERTS: tl.constexpr, L: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    r = tl.arange(0, L.R_PAD)
    bases = tl.load(peers + r, mask=r < L.R, other=0)
    step = tl.load(handle + L.STEP)
    view = tl.load(handle + L.VIEW_MASK)
    is_void = tl.load(handle + L.MISSING) != 0
    block = (step & 1) * L.parity_bytes
    mine = region.to(tl.int64) + block
    if FIRST:
        want = view
        epoch, followed = tl.load(handle + L.VIEW_EPOCH), tl.load(routing + L.ROUTING_STEP)
        arrived, excluded = wait(pid, mine, handle, control, alive, L.LAYOUT, want, step, L, LANES)
        good, matrix = agreed(mine, arrived & ~excluded, step, epoch, followed, BITS, L)
        if pid == 0:
            tell_host(host, ticket, mine, good, matrix, rank, EXPERTS, L)
            _count_rounds(host, ticket, handle, mine, good, EXPERTS, L)
        is_empty = view < 0
    else:
        is_void |= tl.load(handle + L.RECEIVED) == 0
        is_empty = turn >= tl.load(handle + L.FILLED)
        want = tl.where(is_void | is_empty, view * 0, view)
        flags = flags_of(mine, turn - 1, L)
        arrived, excluded = wait(pid, flags, handle, control, alive, L.DRAINED, want, step, L, LANES)
        good = arrived & ~excluded
    if pid == 0:
        report_missing(want & ~good, want & ~good & ~excluded, rank, handle, live, alive, report, L)
    is_void |= good != want

    begin = turn * L.W
    end = tl.where(is_void | is_empty, begin, tl.maximum(tl.minimum(begin + L.W, tokens), begin))
    count = end - begin
    before = index_of(tl.minimum(begin, tokens) + r * 0, tl.minimum(r, L.R - 1), within, starts, tokens, L)
    first = rank * L.W - before
    wanted = (mine + L.matrix).to(tl.pointer_type(tl.int32)) + r * (L.R + 1) + L.R
    in_block = tl.load(wanted, mask=(r < L.R) & has_bit(view, r.to(tl.int64)), other=0) & 1
    to = bases + in_block.to(tl.int64) * L.parity_bytes
    if not KNOWN:
        for number in range(pid, (count + META - 1) // META, programs):
            t0 = begin + (tl.full([], 0, tl.int32) + number) * META  # the interpreter's loops count in Python ints
            send_choices(
                t0, chosen, weights, hits, within, starts, first, to, end, rank, report, WEIGHTS, LARGEST, META, L
            )  # fmt: skip
    if MODE == 3 or MODE == 4:
        send_scales(
            pid, programs, begin, end, scales, hits, within, starts, first, to, report, MODE == 4, SCALES, L
        )  # fmt: skip
    for number in range(pid, (count + ROWS - 1) // ROWS * PARTS, programs):
        item = tl.full([], 0, tl.int32) + number
        t0, part = begin + item // PARTS * ROWS, item % PARTS
        if MODE == 1 or MODE == 2:
            send_quantised(
                t0, part, x, hits, within, starts, first, to, end, rank, report, MODE == 2, ROWS, PART, L
            )  # fmt: skip
        else:
            send_words(t0, part, x, hits, within, starts, first, to, end, rank, WORDS, ROWS, PART, L)

    if is_last(live + (L.FINISHED + L.DISPATCH), programs):
        excluding = tl.where(is_void, 1, 0) + r * 0
        if FIRST:
            announce(bases, block, L.DISPATCH, rank, step, excluding, view, L)
        else:
            forget_wait(handle, L.DRAINED, L)
            if is_void | ~is_empty:
                announce(bases, flags_of(block, turn, L), L.ROUND, rank, step, excluding, view, L)


def round_send(
    layout: Layout,
    rank: int,
    x: torch.Tensor,
    weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    mode: int,
    bits: int,
    known: bool,
    ticket: int,
    turn: int,
    *,
    largest_weight: float,
    region: torch.Tensor,
    peers: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    routing: Routing,
    host: torch.Tensor,
    report: torch.Tensor,
    programs: int,
) -> None:
    """Launch one round. turn: its number, from 0; host: int64 [R + E_l + 1] of pinned memory. The others as for
    `contiguous_send`."""
    quantise = mode in (QUANTISE, QUANTISE_POW2)
    rows = x if quantise else x.view(torch.int32)
    words = layout.H * x.element_size() // 4
    threads = 32 * warps(_QUANTISING_WARPS if quantise else _WARPS, layout.R)
    columns = layout.H if quantise else words
    part = min(128 * power_of_two_at_least(layout.G) if quantise else power_of_two_at_least(words), _PART, _TILE)
    rows_at_once, parts = _TILE // part, -(-columns // part)
    most = min(max(x.shape[0] - turn * layout.W, 0), layout.W)
    launch(
        _round_send,
        max(1, min(-(-most // rows_at_once) * parts, programs)),
        (
            rows,
            weights if weights is not None else routing.words,
            scales.view(torch.int32) if scales is not None else routing.words,
            region,
            peers,
            control,
            alive,
            live,
            handle,
            routing.hits,
            routing.within,
            routing.starts,
            routing.chosen,
            routing.words,
            host,
            report,
            x.shape[0],
            rank,
            ticket,
            turn,
        ),
        (
            turn == 0,
            mode,
            weights is not None,
            largest_weight,
            known,
            bits,
            words,
            rows_at_once,
            part // 128 if quantise else part,
            parts,
            _META,
            SCALES_AT_ONCE,
            power_of_two_at_least(layout.E_L),
            layout,
            threads,
        ),
        (rows.dtype, torch.float32 if weights is not None else torch.int64),
        num_warps=threads // 32,
    )
