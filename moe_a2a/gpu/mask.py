"""Ranks that one GPU rank leaves out by its own decision, without a view that the group agrees on: DeepEP's mask."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.gpu.peers import Peers
from moe_a2a.gpu.report import ranks_of


class Mask:
    """Ranks that this rank neither sends to nor waits for, from its next step on; waits under way for them end at once.

    With a mask, a rank that is missing from a step joins it, and no RankLost is raised. The ranks may have different
    masks: one that waits in vain for a rank that leaves it out does so for a whole budget. To take a rank back, every
    rank does so between the same two steps, with a barrier before the next: its buffers are then nobody's.
    """

    def __init__(self, rank: MaskedRank, peers: Peers) -> None:
        self._rank, self._peers = rank, peers
        self._everyone = (1 << rank.layout.R) - 1
        self.ranks = 0  #: bits, as far as the host knows

    def set(self, ranks: int) -> None:
        """Leave out exactly these, bits of a mask, and the ranks that are gone for good. Stream-ordered."""
        self.ranks = ranks | sum(1 << rank for rank in list(self._peers.lost))
        layout = self._rank.layout
        self._rank.control[layout.MASK].fill_(self._everyone & ~self.ranks)
        self._rank.report[layout.LOST].bitwise_and_(self.ranks)
        self._peers.leave_out(self.ranks)

    def add(self, ranks: Iterable[int]) -> None:
        """Leave out these ranks too."""
        more = self.ranks | sum(1 << rank for rank in list(ranks))
        if more != self.ranks:
            self.set(more)

    def news(self) -> bool:
        """Is a rank gone that is not left out yet?"""
        return any(not self.ranks >> rank & 1 for rank in list(self._peers.lost))

    def to_words(self) -> torch.Tensor:
        """int32 [R] on the device: 1 for each rank that is left out, or was missing from a step. Does not wait."""
        layout = self._rank.layout
        found = self._everyone ^ self._rank.control[layout.MASK] | self._rank.report[layout.LOST]
        for rank in ranks_of(self.ranks):
            found = found | (1 << rank)
        bits = torch.arange(layout.R, device=self._rank.device)
        return ((found >> bits) & 1).int()
