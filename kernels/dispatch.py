"""Dispatch in one launch: the first programs do what `dispatch_send` does, the others what `dispatch_recv` does.

For steps that are launched one by one, where the host's time counts. In a captured graph two launches are quicker:
programs that wait take room, and the memory's attention, from those that send.

Memory-ordering contract
    That of the two kernels. Programs start in the order of their numbers, and those that send wait for nobody: they
    end, whatever the others do. Those that receive first wait for SENT in the handle, which the last sending program
    sets (release) when the handle is written, and the end of combine's sending half clears.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout
from moe_a2a.kernels.dispatch_recv import receive_tokens, recv_constants
from moe_a2a.kernels.dispatch_send import send_constants, send_tokens, send_views, senders
from moe_a2a.kernels.launch import Launch
from moe_a2a.kernels.signals import until_sent

_WARPS = 4
_RECEIVERS_A_SM = 4


@triton.jit(do_not_specialize=["tokens", "rank", "senders"])
def _dispatch(
    rows, ids, weights, given, x, scales, counts, source, ranges, region, peers, control, alive, live, handle, hits,
    places, report, tokens, rank, senders,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, LARGEST: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    COUNTERS: tl.constexpr, COUNTED: tl.constexpr, SCAN: tl.constexpr, CHUNK_WORDS: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr, SCALES: tl.constexpr, BY_SOURCE: tl.constexpr, OUT_WORDS: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < senders:
        send_tokens(
            pid, senders, rows, ids, weights, given, peers, control, live, handle, hits, report, tokens, rank,
            MODE, WEIGHTS, LARGEST, BITS, WORDS, COUNTERS, COUNTED, SCAN, CHUNK_WORDS, CHUNK_GROUPS, L,
        )  # fmt: skip
    else:
        until_sent(handle, L, LANES)
        receive_tokens(
            pid - senders, tl.num_programs(0) - senders, x, scales, counts, source, ranges, region, control,
            alive, live, handle, places, report, BITS, SCALES, BY_SOURCE, OUT_WORDS, BLOCK, EXPERTS, L, LANES,
        )  # fmt: skip


def dispatch(
    layout: Layout,
    rank: int,
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    given: torch.Tensor | None,
    mode: int,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    counts: torch.Tensor,
    source: torch.Tensor,
    ranges: torch.Tensor | None,
    *,
    largest_weight: float,
    region: torch.Tensor,
    peers: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    hits: torch.Tensor,
    places: torch.Tensor,
    report: torch.Tensor,
    processors: int,
) -> None:
    """Launch. rows, ids, weights, given (scales): `dispatch_send`'s x, ids, weights, scales; largest_weight: its too;
    x, scales, counts, source, ranges: `dispatch_recv`'s. The others: `Layout`."""
    form = None if scales is None else scales.dtype
    by_source = ranges is not None
    launch, counters, receivers = _prepare(
        layout, mode, weights is not None, largest_weight, rows.dtype, ids.dtype, x.dtype, form, by_source, processors
    )
    tokens = rows.shape[0]
    first = senders(tokens, counters)
    launch(
        first + receivers,
        (
            rows,
            ids,
            weights if weights is not None else ids,
            given if given is not None else ids,
            x,
            scales if scales is not None else counts,
            counts,
            source,
            ranges if ranges is not None else handle,
            region,
            peers,
            control,
            alive,
            live,
            handle,
            hits,
            places,
            report,
            tokens,
            rank,
            first,
        ),
    )


@functools.cache
def _prepare(
    layout: Layout,
    mode: int,
    weights: bool,
    largest_weight: float,
    rows: torch.dtype,
    ids: torch.dtype,
    x: torch.dtype,
    scales: torch.dtype | None,
    by_source: bool,
    processors: int,
) -> tuple[Launch, int, int]:
    """The launch, how many of the sending programs count, and programs that receive."""
    sent, counters = send_constants(layout, mode, weights, largest_weight, rows)
    received, items = recv_constants(layout, x, scales, by_source)
    views = dict.fromkeys([*send_views(mode), 4, 5], torch.int32)
    launch = Launch(_dispatch, (*sent, *received, layout, 32 * _WARPS), views, num_warps=_WARPS)
    return launch, counters, min(items, processors * _RECEIVERS_A_SM)
