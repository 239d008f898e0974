"""Ending a GPU rank's step without a combine: flags go around, no rows do."""

from __future__ import annotations

import torch

from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.kernels.combine_recv import combine_recv
from moe_a2a.kernels.combine_send import combine_send
from moe_a2a.step import Phase
from moe_a2a.types import Handle


def discard(rank: MaskedRank, handle: Handle) -> None:
    """Launch the end of a step that is sent or received. Collective, as a combine is. Raises HandleError.

    Every rank gets "excluded" from this one, so that a rank that combines the step instead sums nothing stale, and
    reports this rank as missing. What these launches report themselves goes nowhere: here, excluded is what was asked.
    The flags are waited for all the same, because they make the step's buffers free again.
    """
    received = isinstance(handle, GpuHandle) and handle.phase is Phase.RECEIVED
    mine, state = rank._step(handle, Phase.RECEIVED if received else Phase.SENT)
    layout, slot = rank.layout, mine.slot
    unheard = torch.zeros(layout.REPORT_WORDS, dtype=torch.int64, device=rank.device)
    rows = torch.empty((0, layout.H), dtype=rank.config.dtype, device=rank.device)
    slot.handle[layout.RECEIVED : layout.LONGEST + 1].zero_()
    combine_send(
        layout,
        rank.rank,
        rows,
        False,
        region=state.region,
        peers=state.peers,
        control=rank.control,
        alive=rank._alive,
        live=state.live,
        handle=slot.handle,
        places=slot.places,
        report=unheard,
        processors=rank._processors,
    )
    combine_recv(
        layout,
        rows,
        region=state.region,
        control=rank.control,
        alive=rank._alive,
        handle=slot.handle,
        hits=slot.hits,
        report=unheard,
        processors=rank._processors,
    )
    mine.phase = Phase.DONE
    state.open.remove(mine)
