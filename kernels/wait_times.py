"""Wait times: how long a rank waits for each source of a phase, for finding out who is slow. Moves nothing.

One program a source watches its flag and adds the nanoseconds until it is there. Launched in front of a receive, when
somebody asks; the receive then finds the flags set.

Memory-ordering contract
    None: nothing that a source stored is read here. What ends a receive's wait ends this one: whoever waits starts the
    clock that the receive shares (DEADLINE in the handle), so that a missing rank costs one budget, not two. The vote
    on who is missing is the receive's alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout
from moe_a2a.kernels.launch import launch
from moe_a2a.kernels.signals import has_bit, now, watch

_WARPS = 2


@triton.jit
def _wait_times(
    times, region, handle, control, alive, PHASE: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    source = tl.program_id(0)
    step = tl.load(handle + L.STEP)
    # As the kernels that wait: for tokens from all of the view; for weights from ranks whose tokens came; for sums from
    # ranks that are not missing so far.
    want = tl.load(handle + (L.VIEW_MASK if PHASE == L.DISPATCH else L.RECEIVED if PHASE == L.WEIGHTS else L.EXPECTED))
    began = now()
    if has_bit(want, source.to(tl.int64)):
        block = region.to(tl.int64) + (step & 1) * L.parity_bytes
        watch(block, handle, control, alive, PHASE, source, step, L, LANES)
        tl.store(times + source, tl.load(times + source) + now() - began)


def wait_times(
    layout: Layout,
    times: torch.Tensor,
    phase: int,
    *,
    region: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    handle: torch.Tensor,
) -> None:
    """Launch. times: int64 [R], added to; phase: DISPATCH, WEIGHTS or COMBINE. The others: `Layout`."""
    launch(
        _wait_times,
        layout.R,
        (times, region, handle, control, alive),
        (phase, layout, 32 * _WARPS),
        (),
        num_warps=_WARPS,
    )
