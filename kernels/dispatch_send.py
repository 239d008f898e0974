"""Dispatch, sending half: store this rank's tokens into the memory of the ranks that own their experts.

A token goes once to each destination rank. Programs 0 .. n - COUNTERS - 1 take tokens: check the ids, quantise if
asked for, and store row, scales, weights and table word. The table word of a choice holds the local expert and the
index of the row among this rank's rows for that expert: a sender knows its own tokens, so that a receiver only has to
add what the ranks before it sent. The last COUNTERS programs count rows for EXPERTS_A_PROGRAM experts each.

Memory-ordering contract
    Reads `live`, `control` (written before this launch). Stores rows, scales, weights, table, counts and header with
    plain stores; then the last program writes the handle, advances the step in `live` and raises one flag on each
    rank of the view, with system-scope release (`moe_a2a.kernels.signals`). The block that it writes was last used two
    steps ago; this rank's receive of that step's combine proved that all peers are done with it, but for those that
    were given up, which get nothing any more. If that step is still open here, nobody gets anything.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.kernels import casts
from moe_a2a.kernels.bad_input import report_bad, report_bad_weights
from moe_a2a.kernels.formats import GIVEN, GIVEN_POW2, QUANTISE, QUANTISE_POW2, header_bits
from moe_a2a.kernels.launch import Launch
from moe_a2a.kernels.signals import aligned, either, has_bit, is_last, is_taken, next_step, pick, raise_flags

EXPERTS_A_PROGRAM = 32
_WARPS = 4
_SCAN = 128  # tokens whose ids are looked at at once
_CHUNK_WORDS = 4096  # of a row that is copied
_CHUNK_GROUPS = 64  # of a row that is quantised
_MOST_PROGRAMS = 1024


@triton.jit
def _earlier_rows(ids, own, end, L: tl.constexpr, SCAN: tl.constexpr):
    """How many tokens before `end` chose each expert of `own` [n]: int32 [n]. Choices named twice count once."""
    K: tl.constexpr = L.K
    # Tokens along the lanes, so that a thread loads the ids of its own tokens only.
    lane = tl.arange(0, SCAN)
    found = own[:, None] * 0 + lane[None, :] * 0
    for start in range(0, end, SCAN):
        t = start + lane
        hit = found < 0  # all False
        for k in tl.static_range(K):
            chosen = tl.load(ids + t * K + k, mask=t < end, other=-1)
            chosen = tl.where((chosen >= 0) & (chosen < L.E), chosen, -1).to(tl.int32)
            hit |= chosen[None, :] == own[:, None]
        found += hit.to(tl.int32)
    return tl.sum(found, 1)


@triton.jit
def _check(raw, k, token, report, L: tl.constexpr):
    """A token's ids, with -1 in place of those that are wrong: int32 [K_PAD]. The first wrong one is reported."""
    in_row = k < L.K
    wrong = in_row & ((raw < -1) | (raw >= L.E))
    own = tl.where(wrong | (in_row == 0), -1, raw).to(tl.int32)
    same = (own[:, None] == own[None, :]) & (k[None, :] < k[:, None]) & (own[:, None] >= 0)
    twice = tl.max(same.to(tl.int32), 1) > 0
    seen = tl.minimum(tl.maximum(raw, -(1 << 31)), (1 << 31) - 1) + (1 << 31)
    report_bad(wrong | twice, token, k, twice.to(tl.int32), seen, report, L)
    return tl.where(twice, -1, own)


@triton.jit
def _load_words(source, row, start, WORDS: tl.constexpr, CHUNK: tl.constexpr):
    w = start + tl.arange(0, CHUNK)
    return tl.load(source + row * WORDS + w, mask=w < WORDS)


@triton.jit
def _send_words(
    head, source, row, offset, hits, bases, WORDS: tl.constexpr, L: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Copy a row of 4-byte words to every rank in `hits`. head: its first CHUNK words, loaded long before."""
    R: tl.constexpr = L.R
    for start in tl.static_range(0, WORDS, CHUNK):
        w = start + tl.arange(0, CHUNK)
        words = head if start == 0 else _load_words(source, row, start, WORDS, CHUNK)
        for r in tl.static_range(R):
            if has_bit(hits, r):
                to = aligned(pick(bases, r, L) + offset, tl.int32)
                tl.store(to + w, words, mask=w < WORDS)


@triton.jit
def _send_scales(source, row, offset, hits, bases, token, report, POW2: tl.constexpr, L: tl.constexpr):
    """Copy a row of given fp32 scales to every rank in `hits`. Scales that cannot be used are reported."""
    R: tl.constexpr = L.R
    g = tl.arange(0, L.G_PAD)
    bits = tl.load(source + row * L.G + g, mask=g < L.G, other=0x3F800000)
    wrong = (bits <= 0) | (bits >= 0x7F800000)
    if POW2:
        wrong |= (bits & 0x7FFFFF) != 0
    report_bad(wrong, token, g, 2, bits, report, L)
    for r in tl.static_range(R):
        if has_bit(hits, r):
            to = aligned(pick(bases, r, L) + offset + L.H, tl.int32)
            tl.store(to + g, bits, mask=g < L.G)


@triton.jit
def _load_tiles(x, row, start, L: tl.constexpr, CHUNK: tl.constexpr):
    g = start + tl.arange(0, CHUNK)
    columns = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    return tl.load(x + row * L.H + columns, mask=(g < L.G)[:, None], other=0.0)


@triton.jit
def _send_quantised(
    head, x, row, offset, hits, bases, token, report, POW2: tl.constexpr, L: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Quantise a row per 128 columns, as moe_a2a.fp8 does, and store it with its scales to every rank in `hits`. Scales
    that are not finite are reported."""
    R: tl.constexpr = L.R
    G: tl.constexpr = L.G
    for start in tl.static_range(0, G, CHUNK):
        g = start + tl.arange(0, CHUNK)
        columns = g[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = (g < L.G)[:, None]
        value = (head if start == 0 else _load_tiles(x, row, start, L, CHUNK)).to(tl.float32)
        q, scale = casts.quantise(value, POW2)
        for r in tl.static_range(R):
            if has_bit(hits, r):
                to = pick(bases, r, L) + offset
                tl.store(aligned(to, tl.uint8) + columns, q, mask=inside)
                tl.store(aligned(to + L.H, tl.float32) + g, scale, mask=g < L.G)
        # Last, while the stores are on their way.
        found = scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        report_bad((found >= 0x7F800000) & (hits != 0), token, g, 3, found, report, L)


@triton.jit
def _send_token(
    t, x, ids, weights, scales, bases, block, mask, hits_out, report, rank,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, LARGEST: tl.constexpr, WORDS: tl.constexpr, L: tl.constexpr,
    SCAN: tl.constexpr, CHUNK_WORDS: tl.constexpr, CHUNK_GROUPS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = L.R
    QUANTISED: tl.constexpr = MODE == 1 or MODE == 2
    k = tl.arange(0, L.K_PAD)
    row = t.to(tl.int64)
    # Loads first, and all of them: what follows waits for memory only once.
    raw = tl.load(ids + t * L.K + k, mask=k < L.K, other=-1).to(tl.int64)
    if QUANTISED:
        head = _load_tiles(x, row, 0, L, CHUNK_GROUPS)
    else:
        head = _load_words(x, row, 0, WORDS, CHUNK_WORDS)
    if WEIGHTS:
        weight = tl.load(weights + t * L.K + k, mask=k < L.K, other=0.0)

    own = _check(raw, k, t, report, L)
    if WEIGHTS:
        report_bad_weights(weight, k < L.K, t, k, report, LARGEST, L)
    owner = tl.where(own >= 0, own // L.E_L, -1)
    one = tl.full([], 1, tl.int64)
    hits = tl.reduce(tl.where(own >= 0, one << tl.maximum(owner, 0).to(tl.int64), 0), 0, either) & mask
    tl.store(hits_out + t, hits)
    place = rank * L.W + t
    offset = block + L.rows + place.to(tl.int64) * L.row_stride
    if QUANTISED:
        _send_quantised(head, x, row, offset, hits, bases, t, report, MODE == 2, L, CHUNK_GROUPS)
    else:
        _send_words(head, x, row, offset, hits, bases, WORDS, L, CHUNK_WORDS)
    if MODE == 3 or MODE == 4:
        _send_scales(scales, row, offset, hits, bases, t, report, MODE == 4, L)
    index = _earlier_rows(ids, own, t, L, SCAN)
    word = (index << L.EXPERT_BITS) | (own - owner * L.E_L)
    for r in tl.static_range(R):
        if has_bit(mask, r):
            to = pick(bases, r, L) + block + place.to(tl.int64) * (L.K * 4)
            here = tl.where(owner == r, word, -1)
            tl.store((to + L.table).to(tl.pointer_type(tl.int32)) + k, here, mask=k < L.K)
            if WEIGHTS:
                tl.store((to + L.weights).to(tl.pointer_type(tl.float32)) + k, weight, mask=k < L.K)


@triton.jit
def send_tokens(
    pid, programs, x, ids, weights, scales, peers, control, live, handle, hits, report, tokens, rank,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, LARGEST: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    COUNTERS: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr, CHUNK_WORDS: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """What program `pid` of `programs` does."""
    senders = programs - COUNTERS
    r = tl.arange(0, L.R_PAD)
    bases = tl.load(peers + r, mask=r < L.R, other=0)
    step, view, epoch, gone = next_step(live, control, L)
    too_early = is_taken(live, step, step & 1, L)
    mask = tl.where(too_early, 0, view & ~gone)
    block = (step & 1) * L.parity_bytes

    if pid < senders:
        for t in range(pid, tokens, senders):
            _send_token(
                tl.full([], 0, tl.int32) + t, x, ids, weights, scales, bases, block, mask, hits, report, rank,
                MODE, WEIGHTS, LARGEST, WORDS, L, SCAN, CHUNK_WORDS, CHUNK_GROUPS,
            )  # fmt: skip
    else:
        e = (pid - senders) * EXPERTS + tl.arange(0, EXPERTS)
        owner = tl.minimum(e // L.E_L, L.R - 1)
        on = (e < L.E) & has_bit(mask, owner.to(tl.int64))
        to = tl.load(peers + owner, mask=on, other=0) + block + L.counts
        to += (rank * L.E_L + e - owner * L.E_L).to(tl.int64) * 4
        tl.store(to.to(tl.pointer_type(tl.int32)), _earlier_rows(ids, e, tokens, L, SCAN), mask=on)

    if pid == senders:
        on = (r < L.R) & has_bit(mask, r.to(tl.int64))
        header = (bases + block + L.headers + rank * (8 * L.HEADER_WORDS)).to(tl.pointer_type(tl.int64))
        zero = (r * 0).to(tl.int64)
        tl.store(header + L.HEADER_STEP, step + zero, mask=on)
        tl.store(header + L.HEADER_EPOCH, epoch + zero, mask=on)
        tl.store(header + L.HEADER_INCARNATION, tl.load(control + L.INCARNATION) + zero, mask=on)
        tl.store(header + L.HEADER_TOKENS, tokens + zero, mask=on)
        tl.store(header + L.HEADER_BITS, BITS + zero, mask=on)

    if is_last(live + (L.FINISHED + L.DISPATCH), programs):
        flags = block + L.flags + L.DISPATCH * L.R * 8
        raise_flags(bases, flags, rank, 2 * step + (r * 0).to(tl.int64), mask, L)
        word = tl.arange(0, L.HANDLE_WORDS)
        value = tl.where((word == L.VIEW_MASK) | (word == L.EXPECTED), mask, 0)
        value = tl.where(word == L.STEP, step, tl.where(word == L.VIEW_EPOCH, epoch, value))
        value = tl.where(word == L.ROWS, 1, tl.where(word == L.MISSING, view & ~mask, value))
        tl.store(handle + word, value)
        tl.store(live + L.LIVE_STEP, step)
        if too_early:
            tl.atomic_or(report + L.MISUSE, tl.full([], L.STARTED_EARLY, tl.int64))
        else:
            tl.store(live + L.OPEN + (step & 1), step)
            tl.store(live + L.TABLES + (step & 1), step)
            if mask != view:
                tl.atomic_or(report + L.LOST, view & ~mask)
        tl.debug_barrier()
        tl.atomic_xchg(handle + L.SENT, tl.full([], 1, tl.int64), sem="release", scope="gpu")


@triton.jit(do_not_specialize=["tokens", "rank"])
def _dispatch_send(
    x, ids, weights, scales, peers, control, live, handle, hits, report, tokens, rank,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, LARGEST: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    COUNTERS: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr, CHUNK_WORDS: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    send_tokens(
        tl.program_id(0), tl.num_programs(0), x, ids, weights, scales, peers, control, live, handle, hits, report,
        tokens, rank, MODE, WEIGHTS, LARGEST, BITS, WORDS, COUNTERS, EXPERTS, SCAN, CHUNK_WORDS, CHUNK_GROUPS, L,
    )  # fmt: skip


def dispatch_send(
    layout: Layout,
    rank: int,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    mode: int,
    *,
    largest_weight: float,
    peers: torch.Tensor,
    control: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    hits: torch.Tensor,
    report: torch.Tensor,
) -> None:
    """Launch. x: [T, H], payload dtype, or FP8 for GIVEN; ids: int32 or int64 [T, K]; weights: fp32 [T, K] or None;
    scales: fp32 [T, H/128] for GIVEN. largest_weight: beyond it weights are reported; peers: int64 [R], addresses of
    all ranks' regions. The others: `Layout`."""
    launch, counters = _prepare(layout, mode, weights is not None, largest_weight, x.dtype, ids.dtype)
    tokens = x.shape[0]
    launch(
        senders(tokens, counters),
        (
            x,
            ids,
            weights if weights is not None else ids,
            scales if scales is not None else ids,
            peers,
            control,
            live,
            handle,
            hits,
            report,
            tokens,
            rank,
        ),
    )


@functools.cache
def _prepare(
    layout: Layout, mode: int, weights: bool, largest_weight: float, x_dtype: torch.dtype, ids_dtype: torch.dtype
) -> tuple[Launch, int]:
    """The launch, and how many of its programs count."""
    constants, counters = send_constants(layout, mode, weights, largest_weight, x_dtype)
    views = dict.fromkeys(send_views(mode), torch.int32)
    return Launch(_dispatch_send, (*constants, layout), views, num_warps=_WARPS), counters


def senders(tokens: int, counters: int) -> int:
    """Programs that send `tokens` tokens."""
    return min(tokens, _MOST_PROGRAMS) + counters


def send_views(mode: int) -> list[int]:
    """Which of (x, ids, weights, scales) are read as 4-byte words, whatever they hold."""
    rows = [] if mode in (QUANTISE, QUANTISE_POW2) else [0]
    return [*rows, 3] if mode in (GIVEN, GIVEN_POW2) else rows


def send_constants(
    layout: Layout, mode: int, weights: bool, largest_weight: float, x_dtype: torch.dtype
) -> tuple[tuple[float, ...], int]:
    """`send_tokens`' constants, from MODE to CHUNK_GROUPS, and how many programs count."""
    words = layout.H * x_dtype.itemsize // 4
    counters = -(-layout.E // EXPERTS_A_PROGRAM)
    constants = (
        mode,
        weights,
        largest_weight,
        header_bits(mode, weights),
        words,
        counters,
        EXPERTS_A_PROGRAM,
        _SCAN,
        min(_CHUNK_WORDS, power_of_two_at_least(words)),
        min(_CHUNK_GROUPS, power_of_two_at_least(layout.G)),
    )
    return constants, counters
