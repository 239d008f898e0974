"""Combine in one launch: the first programs do what `combine_send` does, the others what `combine_recv` does.

Memory-ordering contract
    That of the two kernels. Programs start in the order of their numbers, and those that send wait for nobody but, if
    the weights come on their own, the peers' weights: they end, whatever the others do. The halves meet in two words
    only. OPEN: the receiving half closes the step when it has this rank's own flag, which the sending half raises after
    its last look. EXPECTED: it loses ranks whose weights did not come, perhaps after some receiving programs have read
    it; the step is faulted then, and what these ranks still send may be in parts of its result.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout
from moe_a2a.kernels.combine_recv import add_sums, recv_block
from moe_a2a.kernels.combine_send import send_block, send_sums
from moe_a2a.kernels.launch import Launch

_WARPS = 4
_PROGRAMS_A_SM = 8  # of each half


@triton.jit(do_not_specialize=["tokens", "rank", "senders"])
def _combine(
    y, out, region, peers, control, alive, live, handle, hits, places, report, tokens, rank, senders,
    PUSHED: tl.constexpr, BLOCK: tl.constexpr, OUT_BLOCK: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < senders:
        send_sums(
            pid, senders, y, region, peers, control, alive, live, handle, places, report, rank,
            PUSHED, BLOCK, L, LANES,
        )  # fmt: skip
    else:
        add_sums(
            pid - senders, tl.num_programs(0) - senders, out, region, control, alive, live, handle, hits, report,
            tokens, OUT_BLOCK, L, LANES,
        )  # fmt: skip


def combine(
    layout: Layout,
    rank: int,
    y: torch.Tensor,
    pushed: bool,
    out: torch.Tensor,
    *,
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
    """Launch. y, pushed: as for `combine_send`; out: as for `combine_recv`. The others: `Layout`."""
    launch, senders, blocks = _prepare(layout, pushed, y.dtype, processors)
    tokens = out.shape[0]
    launch(
        senders + max(1, min(tokens * blocks, processors * _PROGRAMS_A_SM)),
        (y, out, region, peers, control, alive, live, handle, hits, places, report, tokens, rank, senders),
    )


@functools.cache
def _prepare(layout: Layout, pushed: bool, dtype: torch.dtype, processors: int) -> tuple[Launch, int, int]:
    """The launch, programs that send, and work items of a token for those that receive."""
    block, out_block = send_block(layout), recv_block(layout)
    items = layout.CAP * -(-layout.H // block)
    constants = (pushed, block, out_block, layout, 32 * _WARPS)
    # As in combine_send: the bits of a sum are the same everywhere.
    launch = Launch(_combine, constants, num_warps=_WARPS, enable_fp_fusion=False)
    return launch, min(items, processors * _PROGRAMS_A_SM), -(-layout.H // out_block)
