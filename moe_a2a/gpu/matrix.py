"""Who sends how many rows to whom in a contiguous step of GPU ranks."""

from __future__ import annotations

import torch

from moe_a2a.gpu.contiguous_state import ContiguousHandle
from moe_a2a.gpu.masked import MaskedRank


def rows_between(rank: MaskedRank, handle: ContiguousHandle) -> torch.Tensor:
    """int32 [R, R], rows from each rank to each rank, as all ranks told them at the beginning of the step.

    For the stream of the step, between its sending half and the next dispatch but one. Means nothing where a rank is
    missing.
    """
    layout = rank.layout
    words = rank._channels[rank._index(handle.channel)].region.view(torch.int32)
    both = words.as_strided(
        (2, layout.R, layout.R),
        (layout.parity_bytes // 4, layout.R + 1, 1),
        words.storage_offset() + layout.matrix // 4,
    )
    # The device numbers the steps, so that it alone knows the parity: a replayed graph makes new ones.
    parity = handle.slot.handle[layout.STEP : layout.STEP + 1] & 1
    return both.index_select(0, parity)[0]
