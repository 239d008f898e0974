"""Ending a GPU rank's step without a combine: flags go around, no rows do."""

from __future__ import annotations

import torch

from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.kernels.combine_send import combine_send
from moe_a2a.step import Phase
from moe_a2a.types import Handle


def discard_send(rank: MaskedRank, handle: Handle) -> None:
    """Launch the sending half of the end of a step that is sent or received. Collective, as a combine is. Raises
    HandleError.

    Every rank gets "excluded" from this one, so that a rank that combines the step instead sums nothing stale, and
    reports this rank as missing.
    """
    received = isinstance(handle, GpuHandle) and handle.phase is Phase.RECEIVED
    mine, state = rank._step(handle, Phase.RECEIVED if received else Phase.SENT)
    layout = rank.layout
    mine.slot.handle[layout.RECEIVED : layout.ROWS + 1].zero_()
    rank.before_launch(mine, "discard")
    combine_send(
        layout,
        rank.rank,
        torch.empty((0, layout.H), dtype=rank.config.dtype, device=rank.device),
        False,
        peers=state.peers,
        places=mine.slot.places,
        **rank._waiting(mine, state),
    )
    mine.tokens, mine.phase = 0, Phase.COMBINING


def discard_recv(rank: MaskedRank, handle: Handle) -> None:
    """Launch the receiving half, which ends the step. Raises HandleError.

    The flags are waited for, because they make the step's buffers free again; and a rank that does not come is missing
    here as anywhere.
    """
    rank.combine_recv(handle)
