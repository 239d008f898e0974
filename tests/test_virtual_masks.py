"""Ranks that a rank leaves out by its own decision, and takes back: virtual ranks."""

from __future__ import annotations

import os
import sys
from typing import cast

# Before anything imports Triton, which decides then how it runs kernels.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import triton
from test_virtual_faults import has_waited, step_without
from virtual_steps import Steps, expert_outputs, group_of, make_inputs, send

from moe_a2a import RankLost
from moe_a2a.gpu.mask import Mask
from moe_a2a.gpu.peers import Peers
from moe_a2a.virtual import VirtualGroup

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton was imported to compile in this process; run without tests/gpu"
)


class Words:
    """Stands for `Peers`, without a thread: the ranks of a virtual group share the words in host memory."""

    def __init__(self, group: VirtualGroup) -> None:
        self.lost: dict[int, str] = {}
        self._alive = group.alive

    def tolerate_missing(self) -> None:
        pass

    def leave_out(self, ranks: int) -> None:
        self._alive.bitwise_and_(~ranks)

    def take_back(self, ranks: int) -> None:
        self._alive.bitwise_or_(ranks & ~sum(1 << rank for rank in self.lost))


def masks_of(group: VirtualGroup) -> tuple[Words, list[Mask]]:
    peers = Words(group)
    return peers, [Mask(rank, cast(Peers, peers)) for rank in group.ranks]


def take_back(group: VirtualGroup, masks: list[Mask], rank: int) -> None:
    """All ranks take one back that made no step meanwhile: it joins at the others' step."""
    group.ranks[rank]._channels[0].live[group.layout.LIVE_STEP] = group.ranks[0]._channels[0].live[0]
    for mask in masks:
        mask.take_back(1 << rank)


def test_a_rank_that_is_masked_during_a_wait_ends_it_and_is_out_until_it_is_taken_back() -> None:
    group = group_of(3, timeout_s=1000.0, experts=9)
    layout = group.layout
    Steps(group).step([3, 3, 3])
    _, masks = masks_of(group)
    waiting = {r: send(group, make_inputs(group.config, 1, 0, [3, 2, 3]), r) for r in (0, 1)}
    for r in waiting:
        masks[r].leave_out(0b100)  # it hangs
    y = expert_outputs(group, 0)
    for r, handle in waiting.items():
        group.ranks[r].dispatch_recv(handle)
    for r, handle in waiting.items():
        group.ranks[r].combine_send(y[r], handle)
    for r, handle in waiting.items():
        group.ranks[r].combine_recv(handle)
        assert group.ranks[r].missing(handle) == [2]
        assert masks[r].to_words().tolist() == [0, 0, 1]
    for number in range(3):
        for r, handle in step_without(group, make_inputs(group.config, 2 + number, 0, [1, 3, 3]), 2).items():
            assert group.ranks[r].missing(handle) == [2]
            assert not has_waited(group, handle, layout.DISPATCH) and not has_waited(group, handle, layout.COMBINE)
    take_back(group, masks, 2)
    assert group.alive[0] == 0b111
    assert all(mask.to_words().tolist() == [0, 0, 0] for mask in masks)
    fresh = Steps(group, seed=9)
    for tokens in ([3, 2, 3], [1, 2, 3], [3, 3, 0]):
        fresh.step(tokens)  # and nothing is reported


def test_a_rank_that_kernels_miss_is_masked_and_what_is_done_to_others_leaves_it_so() -> None:
    group = group_of(3, timeout_s=0.05, experts=9)
    Steps(group).step([3, 3, 3])
    peers, masks = masks_of(group)
    step_without(group, make_inputs(group.config, 1, 0, [3, 2, 3]), 2)
    assert [mask.to_words().tolist() for mask in masks] == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert group.told[0] == 0b100
    masks[0].leave_out(0b010)
    assert masks[0].to_words().tolist() == [0, 1, 1]
    masks[0].take_back(0b010)
    assert masks[0].to_words().tolist() == [0, 0, 1] and group.told[0] == 0b100
    with pytest.raises(RankLost, match=r"ranks \[2\] were missing"):
        group.ranks[0].check()
    assert masks[0].to_words().tolist() == [0, 0, 1]
    step_without(group, make_inputs(group.config, 2, 0, [3, 2, 3]), 2)
    take_back(group, masks, 2)
    assert group.told[0] == 0
    fresh = Steps(group, seed=9)
    fresh.step([3, 2, 3])
    fresh.step([1, 2, 3])
    peers.lost[1] = "died"
    assert masks[0].to_words().tolist() == [0, 1, 0]
    masks[0].leave_out(0b110)
    masks[0].take_back(0b111)  # who died stays out
    assert masks[0].to_words().tolist() == [0, 1, 0] and group.alive[0] == 0b101
