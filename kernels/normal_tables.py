"""What DeepEP's normal mode says about a routing, on a GPU: `moe_a2a.compat.normal_tables` in a launch or two.

No rank waits for another here. `handle_tables` runs after contiguous_recv on the same stream and reads what that has
waited for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.kernels.launch import launch
from moe_a2a.kernels.signals import has_bit

_WARPS = 4
_TOKENS = 128  # of a program of dispatch_layout
_BLOCK = 1024  # tokens or rows that a program of handle_tables reads at once


@triton.jit(do_not_specialize=["tokens"])
def _dispatch_layout(
    ids, counts, hit, tokens, E: tl.constexpr, R: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr,
    R_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, R_PAD)
    one = tl.full([], 1, tl.int64)
    hits = (t * 0).to(tl.int64)
    for k in tl.static_range(K):
        expert = tl.load(ids + t.to(tl.int64) * K + k, mask=t < tokens, other=-1)
        known = (expert >= 0) & (expert < E)
        expert = tl.where(known, expert, 0).to(tl.int32)
        tl.atomic_add(counts + FIRST + expert, 1, mask=known, sem="relaxed", scope="gpu")
        hits |= tl.where(known, one << (expert // (E // R)).to(tl.int64), 0)
    goes = has_bit(hits[:, None], r.to(tl.int64)[None, :]).to(tl.int32)
    inside = (t < tokens)[:, None] & (r < R)[None, :]
    tl.store(hit + t.to(tl.int64)[:, None] * R + r[None, :], goes.to(tl.uint8), mask=inside)
    tl.atomic_add(counts + r, tl.sum(goes, 0), mask=r < R, sem="relaxed", scope="gpu")


def dispatch_layout(
    topk_idx: torch.Tensor, ranks: int, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens for each rank int32 [R], tokens for each expert int32 [E], does a token go to a rank bool [T, R]).

    topk_idx: int64 [T, K]; what is no expert's number counts for nothing.
    """
    tokens, top_k = topk_idx.shape
    first = -(-ranks // 4) * 4  # experts' counts start at a multiple of 16 bytes
    counts = torch.zeros(first + experts, dtype=torch.int32, device=topk_idx.device)
    hit = torch.empty((tokens, ranks), dtype=torch.bool, device=topk_idx.device)
    if tokens:
        launch(
            _dispatch_layout,
            -(-tokens // _TOKENS),
            (_aligned(topk_idx), counts, hit.view(torch.uint8), tokens),
            (experts, ranks, top_k, first, power_of_two_at_least(ranks), _TOKENS),
            (),
            num_warps=_WARPS,
        )
    return counts[:ranks], counts[first:], hit


@triton.jit
def _count_channel(hit, prefix, unused, head, tokens, width, channels, pid, R: tl.constexpr, BLOCK: tl.constexpr):
    """One channel's tokens for one rank."""
    rank = pid % R
    channel = pid // R
    start = tl.minimum(channel * width, tokens)
    end = tl.minimum(start + width, tokens)
    before = pid * 0
    for number in range(0, start, BLOCK):
        t = tl.full([], 0, tl.int32) + number + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(hit + t.to(tl.int64) * R + rank, mask=t < start, other=0).to(tl.int32), 0)
    own = pid * 0
    for number in range(start, end, BLOCK):
        t = tl.full([], 0, tl.int32) + number + tl.arange(0, BLOCK)
        at = t.to(tl.int64) * R + rank
        goes = tl.load(hit + at, mask=t < end, other=0).to(tl.int32)
        tl.store(head + at, tl.where(goes > 0, own + tl.cumsum(goes, 0) - 1, -1), mask=t < end)
        own += tl.sum(goes, 0)
    tl.store(prefix + rank * channels + channel, before + own)
    tl.store(unused + rank * channels + channel, 0)


@triton.jit(do_not_specialize=["tokens", "width", "channels", "rows"])
def _handle_tables(
    hit, prefix, unused, head, source, numbers, region, handle, ranks, tokens, width, channels, rows,
    BLOCK: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    R: tl.constexpr = L.R
    if pid == 0:
        i = tl.arange(0, L.R_PAD)
        block = region.to(tl.int64) + (tl.load(handle + L.STEP) & 1) * L.parity_bytes
        inside = (i < R)[:, None] & (i < R)[None, :]
        matrix = (block + L.matrix).to(tl.pointer_type(tl.int32)) + i[:, None] * (R + 1) + i[None, :]
        sums = tl.cumsum(tl.load(matrix, mask=inside, other=0), 0)
        tl.store(ranks + i[:, None] * R + i[None, :], sums, mask=inside)
    elif pid <= R * channels:
        _count_channel(hit, prefix, unused, head, tokens, width, channels, pid - 1, R, BLOCK)
    else:
        row = (pid - 1 - R * channels) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(source + row, mask=row < rows, other=0)
        tl.store(numbers + row, tl.where(token < 0, -1, token % L.M), mask=row < rows)


def handle_tables(
    layout: Layout, hit: torch.Tensor, source: torch.Tensor, channels: int, region: torch.Tensor, handle: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rank_prefix_matrix int32 [R, R], channel_prefix_matrix int32 [R, C], zeros int32 [R, C], token numbers int32
    [N], send_head int32 [T, R]).

    hit: bool [T, R]; source: int32 [N], source rank * M + token, or -1; region, handle: of the step, see `Layout`.
    """
    tokens, rows, ranks = len(hit), len(source), layout.R

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=hit.device)

    made = ints(ranks, ranks), ints(ranks, channels), ints(ranks, channels), ints(rows), ints(tokens, ranks)
    between, prefix, unused, numbers, head = made
    width = max(1, -(-tokens // channels))
    launch(
        _handle_tables,
        1 + ranks * channels + -(-rows // _BLOCK),
        (
            _aligned(hit).view(torch.uint8),
            prefix,
            unused,
            head,
            source,
            numbers,
            region,
            handle,
            between,
            tokens,
            width,
            channels,
            rows,
        ),
        (_BLOCK, layout),
        (),
        num_warps=_WARPS,
    )
    return made


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """At a multiple of 16 bytes, as compiled kernels expect."""
    return tensor.clone() if tensor.data_ptr() & 15 else tensor
