"""Permute: tokens to rows that are grouped by expert, each expert's rows padded to an alignment.

Rows of an expert are in (token, k) order, whatever program runs first: places come from counts and prefix sums. Three
launches on one stream, four if there are scales:

    count   a program for CHOICES (token, k) pairs: how many rows it adds to each expert, and which of them each choice
            is. Clears what `move` fills in only where there are tokens.
    scan    one program: the rows before each counting program, each expert's rows, and where they start
    move    a work item is a block of columns of one token: read once, stored once for each of the token's experts
    scales  a program is a tile of neighbouring rows and columns of scales. They are stored column-major, so that the
            words of a token lie far from each other; here a tile is read by rows and stored by columns

An id that is out of range has no row, and is reported. If the rows do not fit, there are none at all, and that is
reported: an expert's rows are never incomplete, and nothing is written outside the outputs.

Memory-ordering contract
    Plain loads and stores of this GPU's memory; the order of launches in the stream is all that is needed. Nothing
    depends on what scratch memory held before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import power_of_two_at_least
from moe_a2a.kernels.launch import launch

_CHOICES = 256  # of one counting program: each is compared with all of them
_COMPARED = 32  # at once
_COUNT_WARPS = 8
_SCAN_TILE = 8192  # counts that are looked at at once
_SCAN_WARPS = 16
_BLOCK_WORDS = 512  # 4-byte words of a row that one work item copies: 2 KiB
_MOVE_WARPS = 2
_PROGRAMS_A_SM = 16
_SCALE_ROWS = 128  # of one tile of scales: 512 neighbouring bytes of each column are stored
_SCALE_COLUMNS = 32  # and 128 of each row are read
_SCALE_WARPS = 4

#: Words of a report, int64: NO_WRONG_ID or the first id that is out of range, as (t * K + k) << 32 | id + 2**31 (ids
#: beyond int32 are limited to it); and the rows that the routing needs.
WRONG_ID, NEEDED, REPORT_WORDS = 0, 1, 2
NO_WRONG_ID = (1 << 63) - 1
_NO_WRONG_ID = tl.constexpr(NO_WRONG_ID)


@triton.jit
def _choices(valid, tokens, K: tl.constexpr, VALID: tl.constexpr):
    """Choices of the tokens that count: the first `valid` ones, or all."""
    if VALID:
        tokens = tl.minimum(tl.maximum(tl.load(valid), 0), tokens)
    return tokens * K


@triton.jit
def _experts(raw, E: tl.constexpr):
    """Ids as they count: int32, -1 for those that are out of range."""
    return tl.where((raw >= 0) & (raw < E), raw, -1).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "rows"])
def _count(
    ids, valid, index, counted, wrong, places, expert_ids, source, row_weights, tokens, rows,
    K: tl.constexpr, E: tl.constexpr, VALID: tl.constexpr, WEIGHTS: tl.constexpr,
    CHOICES: tl.constexpr, COMPARED: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    counters = tl.num_programs(0)
    end = _choices(valid, tokens, K, VALID)
    n = tl.arange(0, CHOICES)
    first = pid * CHOICES
    if first < end:
        raw = tl.load(ids + first + n, mask=first + n < end, other=-1).to(tl.int64)
        expert = _experts(raw, E)
        # The others along the lanes, so that a thread adds up by itself and threads meet once, in the last sum.
        m = tl.arange(0, COMPARED)
        found = n[:, None] * 0 + m[None, :] * 0
        for start in range(0, CHOICES, COMPARED):
            other = _experts(tl.load(ids + first + start + m, mask=first + start + m < end, other=-1), E)
            found += ((other[None, :] == expert[:, None]) & (start + m[None, :] < n[:, None])).to(tl.int32)
        tl.store(index + first + n, tl.sum(found, 1), mask=first + n < end)

        e = tl.arange(0, BINS)
        added = tl.histogram(tl.maximum(expert, 0), BINS, mask=expert >= 0)
        tl.store(counted + e * counters + pid, added, mask=e < E)
        seen = tl.minimum(tl.maximum(raw, -(1 << 31)), (1 << 31) - 1) + (1 << 31)
        word = ((first + n).to(tl.int64) << 32) | seen
        tl.store(wrong + pid, tl.min(tl.where(raw != expert, word, _NO_WRONG_ID), 0))

    tl.store(places + first + n, n * 0 - 1, mask=(first + n >= end) & (first + n < tokens * K))
    for start in range(first, rows, counters * CHOICES):
        row = start + n
        tl.store(expert_ids + row, n * 0 - 1, mask=row < rows)
        tl.store(source + row, n * 0 - 1, mask=row < rows)
        if WEIGHTS:
            tl.store(row_weights + row, (n * 0).to(tl.float32), mask=row < rows)


@triton.jit(do_not_specialize=["tokens", "rows", "counters"])
def _scan(
    valid, counted, wrong, counts, offsets, report, tokens, rows, counters,
    K: tl.constexpr, E: tl.constexpr, ALIGNMENT: tl.constexpr, VALID: tl.constexpr,
    CHOICES: tl.constexpr, COUNTERS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    used = (_choices(valid, tokens, K, VALID) + CHOICES - 1) // CHOICES
    e = tl.arange(0, BINS)
    c = tl.arange(0, COUNTERS)
    total = tl.zeros([BINS], tl.int32)
    first_wrong = tl.zeros([COUNTERS], tl.int64) + _NO_WRONG_ID
    for start in range(0, used, COUNTERS):
        at = e[:, None] * counters + (start + c)[None, :]
        inside = (e < E)[:, None] & (start + c < used)[None, :]
        added = tl.load(counted + at, mask=inside, other=0)
        tl.store(counted + at, total[:, None] + tl.cumsum(added, 1) - added, mask=inside)
        total += tl.sum(added, 1)
        its = tl.load(wrong + start + c, mask=start + c < used, other=_NO_WRONG_ID)
        first_wrong = tl.minimum(first_wrong, its)
    padded = (total + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    needed = tl.sum(padded, 0)
    fits = needed <= rows
    tl.store(counts + e, tl.where(fits, total, 0), mask=e < E)
    tl.store(offsets + e, tl.where(fits, tl.cumsum(padded, 0) - padded, 0), mask=e < E)
    tl.store(offsets + E, tl.where(fits, needed, 0))
    tl.store(report, tl.min(first_wrong, 0))
    tl.store(report + 1, needed.to(tl.int64))


@triton.jit(do_not_specialize=["tokens", "rows", "counters"])
def _move(
    x, x_rows, weights, row_weights, names, ids, valid, index, counted, offsets, report, places, expert_ids, source,
    from_token, tokens, rows, counters,
    K: tl.constexpr, K_PAD: tl.constexpr, E: tl.constexpr, WORDS: tl.constexpr, VALID: tl.constexpr,
    WEIGHTS: tl.constexpr, NAMES: tl.constexpr, SCALES: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    count = _choices(valid, tokens, 1, VALID)
    fits = tl.load(report + 1) <= rows
    w = tl.arange(0, BLOCK)
    k = tl.arange(0, K_PAD)
    for number in range(tl.program_id(0), count * BLOCKS, tl.num_programs(0)):
        item = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in Python ints
        part = item % BLOCKS
        t = item // BLOCKS
        column = part * BLOCK + w
        values = tl.load(x + t.to(tl.int64) * WORDS + column, mask=column < WORDS, other=0)
        choice = t * K + k
        expert = _experts(tl.load(ids + choice, mask=k < K, other=-1), E)
        has_row = (expert >= 0) & fits
        to = tl.load(index + choice, mask=has_row, other=0)
        to += tl.load(counted + expert * counters + choice // CHOICES, mask=has_row, other=0)
        to += tl.load(offsets + expert, mask=has_row, other=0)
        to = tl.where(has_row, to, -1)
        address = (to.to(tl.int64) * WORDS)[:, None] + column[None, :]
        inside = has_row[:, None] & (column < WORDS)[None, :]
        tl.store(x_rows + address, values[None, :] + (to * 0)[:, None], mask=inside)
        if part == 0:
            tl.store(places + choice, to, mask=k < K)
            tl.store(expert_ids + to, expert, mask=has_row)
            tl.store(source + to, to * 0 + (tl.load(names + t) if NAMES else t), mask=has_row)
            if NAMES and SCALES:
                tl.store(from_token + to, to * 0 + t, mask=has_row)
            if WEIGHTS:
                tl.store(row_weights + to, tl.load(weights + choice, mask=has_row, other=0.0), mask=has_row)


@triton.jit(do_not_specialize=["rows", "scale_row", "scale_column"])
def _scales(
    scales, scale_rows, expert_ids, from_token, rows, scale_row, scale_column,
    WIDTH: tl.constexpr, BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // ((WIDTH + COLUMNS - 1) // COLUMNS) * ROWS + tl.arange(0, ROWS)
    g = tl.program_id(0) % ((WIDTH + COLUMNS - 1) // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    has_token = tl.load(expert_ids + row, mask=row < rows, other=-1) >= 0
    if tl.max(has_token.to(tl.int32), 0) > 0:
        t = tl.load(from_token + row, mask=has_token, other=0)
        inside = has_token[:, None] & (g < WIDTH)[None, :]
        column = g[None, :] if BY_ROW else g.to(tl.int64)[None, :] * scale_column
        its = tl.load(scales + (t.to(tl.int64) * scale_row)[:, None] + column, mask=inside)
        tl.store(scale_rows + row[:, None] + (g.to(tl.int64) * rows)[None, :], its, mask=inside)


@dataclass(frozen=True)
class Outputs:
    """What the kernels write. P: rows of storage, E experts, S scales of a row.

    x: [P, H], rows of padding untouched; expert_ids, source: int32 [P], -1 for padding; counts: int32 [E]; offsets:
    int32 [E + 1]; places: int32 [T, K]; topk_weights: fp32 [P], 0 for padding, or None; scales: storage [S, P] of
    4-byte elements, or None; report: int64 [REPORT_WORDS].
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    source: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    places: torch.Tensor
    topk_weights: torch.Tensor | None
    scales: torch.Tensor | None
    report: torch.Tensor


def permute(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    out: Outputs,
    alignment: int,
    *,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    names: torch.Tensor | None,
    valid: torch.Tensor | None,
    processors: int,
) -> None:
    """Launch. x: [T, H], rows of a multiple of 16 bytes; topk_ids: int32 or int64 [T, K]; topk_weights: fp32 [T, K];
    scales: [T, S] of 4-byte elements, any strides; names: int32 [T], what `source` says instead of t; valid: int32
    [1], tokens that count; processors: SMs of the device."""
    tokens, top_k = topk_ids.shape
    rows, experts = out.x.shape[0], out.counts.shape[0]
    counters = max(1, -(-tokens * top_k // _CHOICES))
    bins = power_of_two_at_least(max(experts, 32))
    index = torch.empty(tokens * top_k, dtype=torch.int32, device=x.device)
    counted = torch.empty(experts * counters, dtype=torch.int32, device=x.device)
    wrong = torch.empty(counters, dtype=torch.int64, device=x.device)
    has_valid, has_weights = valid is not None, topk_weights is not None
    valid = out.counts if valid is None else valid
    row_weights = out.expert_ids if out.topk_weights is None else out.topk_weights
    launch(
        _count,
        counters,
        (topk_ids, valid, index, counted, wrong, out.places, out.expert_ids, out.source, row_weights, tokens, rows),
        (top_k, experts, has_valid, has_weights, _CHOICES, _COMPARED, bins),
        (topk_ids.dtype,),
        num_warps=_COUNT_WARPS,
    )
    launch(
        _scan,
        1,
        (valid, counted, wrong, out.counts, out.offsets, out.report, tokens, rows, counters),
        (
            *(top_k, experts, alignment, has_valid, _CHOICES),
            min(_SCAN_TILE // bins, power_of_two_at_least(counters)),
            bins,
        ),
        (),
        num_warps=_SCAN_WARPS,
    )
    words = x.shape[1] * x.element_size() // 4
    block = min(_BLOCK_WORDS, power_of_two_at_least(words))
    blocks = -(-words // block)
    has_names, has_scales = names is not None, scales is not None
    from_token = out.source
    if names is not None and has_scales:
        from_token = torch.empty_like(out.source)
    launch(
        _move,
        max(1, min(tokens * blocks, processors * _PROGRAMS_A_SM)),
        (
            x.view(torch.int32),
            out.x.view(torch.int32),
            out.counts if topk_weights is None else topk_weights,
            row_weights,
            out.counts if names is None else names,
            *(topk_ids, valid, index, counted, out.offsets, out.report, out.places, out.expert_ids, out.source),
            *(from_token, tokens, rows, counters),
        ),
        (
            *(top_k, power_of_two_at_least(top_k), experts, words),
            *(has_valid, has_weights, has_names, has_scales, _CHOICES, block),
        ),
        (topk_ids.dtype,),
        num_warps=_MOVE_WARPS,
    )
    if scales is not None and out.scales is not None:
        columns = min(_SCALE_COLUMNS, power_of_two_at_least(scales.shape[1]))
        launch(
            _scales,
            max(1, -(-rows // _SCALE_ROWS) * -(-scales.shape[1] // columns)),
            (
                scales.view(torch.int32),
                out.scales.view(torch.int32),
                out.expert_ids,
                from_token,
                rows,
                *scales.stride(),
            ),
            (scales.shape[1], scales.stride(1) == 1, _SCALE_ROWS, columns),
            (),
            num_warps=_SCALE_WARPS,
        )
