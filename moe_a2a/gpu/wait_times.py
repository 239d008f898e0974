"""Measuring how long a GPU rank waits for each rank: a kernel that watches flags, in front of the one that waits."""

from __future__ import annotations

import torch

from moe_a2a.errors import HandleError
from moe_a2a.gpu import inputs
from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.kernels.wait_times import wait_times
from moe_a2a.step import Phase
from moe_a2a.types import Handle


def add_wait_times(rank: MaskedRank, handle: Handle, into: torch.Tensor) -> None:
    """Ask for the times of the dispatch's wait, if it is still to come, else of the combine's. into: int64 [R].

    Launches nothing. Raises InputError, HandleError.
    """
    if not isinstance(handle, GpuHandle) or handle.phase is Phase.DONE:
        raise HandleError(f"{handle!r}; this call needs a step that has still to wait")
    handle.wait_times = inputs.check_tensor("into", into, (rank.layout.R,), (torch.int64,), rank.device)


def watch(rank: MaskedRank, handle: GpuHandle, phase: int) -> None:
    """Launch the watching of a wait. phase: DISPATCH, WEIGHTS or COMBINE, as `Layout` numbers them. Raises
    HandleError."""
    layout = rank.layout
    needed = {layout.DISPATCH: Phase.SENT, layout.WEIGHTS: Phase.RECEIVED, layout.COMBINE: Phase.COMBINING}
    mine, state = rank._step(handle, needed[phase])
    assert mine.wait_times is not None
    wait_times(
        layout,
        mine.wait_times,
        phase,
        region=state.region,
        control=rank.control,
        alive=rank._alive,
        handle=mine.slot.handle,
    )
    if phase != layout.WEIGHTS:
        mine.wait_times = None
