"""Ranks that one GPU rank leaves out by its own decision, without a view that the group agrees on: DeepEP's mask."""

from __future__ import annotations

import torch

from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.gpu.peers import Peers


class Mask:
    """Ranks that this rank neither sends to nor waits for, from its next step on; waits under way for them end at once.

    Kernels keep it too: a rank that is missing from a step joins it there (GIVEN_UP), and with a mask no RankLost is
    raised. The ranks may have different masks: one that waits in vain for a rank that leaves it out does so for a whole
    budget. To take a rank back, every rank does so between the same two steps, with a barrier before the next: its
    buffers are then nobody's.
    """

    def __init__(self, rank: MaskedRank, peers: Peers) -> None:
        self._rank, self._peers = rank, peers
        first = rank.layout.GIVEN_UP
        #: Of each channel, for even and odd epochs: a mask is no part of a view.
        self._given_up = [channel.live[first : first + 2] for channel in rank._channels]
        peers.tolerate_missing()

    def leave_out(self, ranks: int) -> None:
        """Leave out these ranks, bits of a mask. Stream-ordered, on the stream of the steps."""
        for words in self._given_up:
            words.bitwise_or_(ranks)
        self._peers.leave_out(ranks)

    def take_back(self, ranks: int) -> None:
        """Leave out these ranks, bits of a mask, no longer; those that are gone for good stay out. Waits for the
        device."""
        keep, layout = ~(ranks & ~self._lost()), self._rank.layout
        for words in self._given_up:
            words.bitwise_and_(keep)
        self._rank.report[layout.LOST].bitwise_and_(keep)
        self._rank._alive[layout.TOLD].bitwise_and_(keep)
        if self._rank.device.type == "cuda":
            torch.cuda.synchronize(self._rank.device)
        self._peers.take_back(ranks)

    def to_words(self) -> torch.Tensor:
        """int32 [R] on the device: 1 for each rank that is left out. Does not wait."""
        bits = torch.arange(self._rank.layout.R, device=self._rank.device)
        found = torch.cat(self._given_up)[:, None] | self._lost()
        return ((found >> bits) & 1).amax(0).int()

    def _lost(self) -> int:
        return sum(1 << rank for rank in list(self._peers.lost))
