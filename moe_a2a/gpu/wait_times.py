"""Measuring how long a GPU rank's receive waits for each rank: a kernel in front of it that only watches flags."""

from __future__ import annotations

import torch

from moe_a2a.gpu import inputs
from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.kernels.wait_times import wait_times
from moe_a2a.step import Phase
from moe_a2a.types import Handle


def add_wait_times(rank: MaskedRank, handle: Handle, into: torch.Tensor) -> None:
    """Launch the watching of the step's coming receive. into: int64 [R]. Raises InputError, HandleError."""
    layout = rank.layout
    combining = isinstance(handle, GpuHandle) and handle.phase is Phase.COMBINING
    mine, state = rank._step(handle, Phase.COMBINING if combining else Phase.SENT)
    inputs.check_tensor("into", into, (layout.R,), (torch.int64,), rank.device)
    wait_times(
        layout,
        into,
        layout.COMBINE if combining else layout.DISPATCH,
        region=state.region,
        control=rank.control,
        alive=rank._alive,
        handle=mine.slot.handle,
    )
