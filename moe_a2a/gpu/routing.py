"""Where the tokens of a contiguous step go, as a rank's own memory holds it; later steps may follow the same
routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_a2a.gpu.layout import Layout


@dataclass
class Routing:
    """Written by `moe_a2a.kernels.contiguous_layout`, T tokens of this rank.

    hits: int64 [M], a bit for each rank that a token goes to. chosen: int32 [M, K], ids with -1 in place of wrong ones.
    within: int32 [BLOCKS * BLOCK, R], tokens of the same block before this one that go to a rank; starts: int32 [BLOCKS
    + 1, R], tokens before a block, and all of them behind the last block. sent: int32 [E], rows for each expert. words:
    int64 [ROUTING_WORDS]. call: the dispatch that wrote it last, as the host counts; 0 for none.
    """

    hits: torch.Tensor
    chosen: torch.Tensor
    within: torch.Tensor
    starts: torch.Tensor
    sent: torch.Tensor
    words: torch.Tensor
    call: int = 0

    @staticmethod
    def empty(layout: Layout, device: torch.device) -> Routing:
        def ints(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return Routing(
            torch.empty(layout.M, dtype=torch.int64, device=device),
            ints(layout.M, layout.K),
            ints(layout.BLOCKS * layout.BLOCK, layout.R),
            ints(layout.BLOCKS + 1, layout.R),
            ints(layout.E),
            torch.empty(layout.ROUTING_WORDS, dtype=torch.int64, device=device),
        )
