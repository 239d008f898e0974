"""Who takes part in a process group: without any data, so that what is shown is the agreement alone."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from ranks import Ctx, run_ranks

from moe_a2a import ExcludedFromView
from moe_a2a.collectives.address import Address
from moe_a2a.collectives.admission import Admission, Outcome, Roster
from moe_a2a.collectives.options import Options


class Place:
    """An admission, and what it told its data plane."""

    def __init__(self, ctx: Ctx, slots: int, founders: int, **options: Any) -> None:
        self.rosters: list[Roster] = []
        self.prepared: list[int] = []
        given = Options(slots=slots, host=ctx.host, joining=ctx.rank >= founders, **options)
        self.admission = Admission(
            *(Address(ctx.store, "0", given), ctx.rank, founders if ctx.rank < founders else ctx.rank + 1, given),
            timeout_s=20.0,
            prepare=lambda member: self.prepared.append(member.incarnation),
            on_roster=self.rosters.append,
        )

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.admission._peek()
            time.sleep(0.002)

    def until_active(self, *ranks: int) -> None:
        self.until(lambda: [r for r, active in enumerate(self.admission.active()) if active] == list(ranks))


def _grow(ctx: Ctx) -> Any:
    """Two found the group; 2 joins slot 3 of 4... and is activated by rank 1; then it is taken out, and comes back."""
    place = Place(ctx, 4, 2)
    admission = place.admission
    if ctx.rank == 2:
        assert admission.alone and admission.size == 3 and admission.active() == (False, False, True, False)
        assert admission.epoch == 0
        ctx.barrier("alone")
        admission.join()
        assert not admission.alone and admission.size == 3
        assert place.prepared == [admission.member.incarnation]
    else:
        assert admission.size == 2 and admission.active() == (True, True, False, False)
        ctx.barrier("alone")
        if ctx.rank == 1:
            assert admission.peer_ready([0, 1, 2, 3])[::3] == [True, False]
            before = admission.epoch
            done = admission.activate([2])  # early, or not: it waits
            assert done.outcome is Outcome.APPLIED and done.epoch > before
            assert admission.activate([2]) == done and admission.peer_ready([2]) == [True]
    ctx.barrier("activated")
    assert admission.active() == (True, True, True, False)
    epoch = admission.roster().epoch
    ctx.barrier("seen")
    if ctx.rank == 0:
        refused = admission.activate([3], timeout_s=0.2)
        assert refused.outcome is Outcome.REJECTED and "slots [3] after 0.2 s" in refused.reason
        assert admission.activate([4]).reason.startswith("slots [4] do not exist")
        assert "would have no rank" in admission.deactivate([0, 1, 2]).reason
        assert admission.deactivate([2]).outcome is Outcome.APPLIED
    ctx.barrier("taken out")
    assert admission.active() == (True, True, False, False) and admission.size == 2
    if ctx.rank == 2:
        with pytest.raises(ExcludedFromView, match="left"):
            admission.roster()
        admission.join()
        assert len(place.prepared) == 2
    elif ctx.rank == 0:
        assert admission.activate([2]).outcome is Outcome.APPLIED
    ctx.barrier("back")
    assert admission.roster().epoch > epoch and admission.active()[2]
    epochs = [roster.epoch for roster in place.rosters]
    assert epochs == sorted(set(epochs))
    ctx.barrier("end")
    admission.close()
    return epochs[-1]


@pytest.mark.parametrize("hosts", [["a", "a", "a"], ["a", "b", "c"]])
def test_growing_shrinking_and_coming_back(hosts):
    assert len(run_ranks(_grow, 3, hosts=hosts, timeout=60)) == 3


def _lose_rank_0(ctx: Ctx, mode: str) -> Any:
    place = Place(ctx, 3, 3, on_failure=mode)
    admission = place.admission
    ctx.barrier("founded", 3)
    if ctx.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "framework":
        member = admission.member
        place.until(lambda: member.view.ranks == (1, 2))
        assert admission.roster().active == (True, True, True)
        assert admission.peer_ready([0]) == [False]
        if ctx.rank == 1:
            assert admission.deactivate([0]).outcome is Outcome.APPLIED
    place.until_active(1, 2)
    ctx.store.set(f"seen/{ctx.rank}", "1")
    ctx.store.wait(["seen/1", "seen/2"])
    admission.close()


@pytest.mark.parametrize("mode", ["reconcile", "framework"])
def test_rank_0_is_a_rank_like_others(mode):
    run_ranks(_lose_rank_0, 3, mode, dies=[0], timeout=60)
