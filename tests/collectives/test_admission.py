"""Who takes part in a process group: without any data, so that what is shown is the agreement alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from ranks import Ctx, run_ranks

from moe_a2a.bootstrap import StoreBootstrap
from moe_a2a.collectives.admission import Admission, Outcome, Proposal
from moe_a2a.collectives.options import Options
from moe_a2a.collectives.subgroups import SubgroupStore, within
from moe_a2a.membership import Member, MemberOptions, State, found_group, join_group

SLOTS = 4


def found(ctx: Ctx, founders: int) -> Member:
    member = found_group(StoreBootstrap(ctx.store, ctx.rank, founders), MemberOptions(host=ctx.host), SLOTS)
    ctx.store.set("address", member.options.store)
    return member


def come(ctx: Ctx, slot: int) -> Member:
    return join_group(MemberOptions(ctx.store.get("address").decode(), host=ctx.host), slot)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _grow(ctx: Ctx) -> Any:
    """Two found the group; the third comes, is taken out, and comes back."""
    joins = ctx.rank == 2
    member: Member | None = None if joins else found(ctx, 2)
    admission = Admission(SLOTS, 20.0, lambda: member)
    if joins:
        assert admission.peer_ready([0, 2]) == [False, False] and "alone" in admission.activate([0]).reason
        ctx.store.wait(["nobody yet"])
        member = come(ctx, 2)
        member.wait_active()
    elif ctx.rank == 1:
        assert admission.peer_ready([0, 1, 2, 3, 9]) == [True, True, False, False, False] and admission.held() == 2
        ctx.store.set("nobody yet", "1")
        before = member.page.epoch
        done = admission.activate([2])  # early: it waits
        assert done.outcome is Outcome.APPLIED and done.epoch > before
        assert admission.activate([2]) == done and admission.peer_ready([2]) == [True]
        ctx.store.set("activated", "1")
    ctx.store.wait(["activated"])
    assert member.view.ranks == (0, 1, 2), "no member begins anything without the new rank from here on"
    ctx.barrier("seen")
    if ctx.rank == 0:
        assert "slots [3] after 0.1 s" in admission.activate([2, 3], patience_s=0.1).reason
        assert admission.activate([4]).reason.startswith("slots [4] do not exist")
        assert admission.activate([]) == Proposal(Outcome.REJECTED, member.page.epoch, reason="no ranks were given")
        assert "would have no rank" in admission.deactivate([0, 1, 2]).reason
        assert admission.deactivate([2, 3]).outcome is Outcome.APPLIED
        ctx.store.set("taken out", "1")
    ctx.store.wait(["taken out"])
    assert member.view.ranks == (0, 1)
    ctx.barrier("seen again")
    if joins:
        refused = admission.activate([0])
        assert refused.outcome is Outcome.REJECTED and "rank 2 is left" in refused.reason
        member.rejoin()
        member.wait_active()
    elif ctx.rank == 0:
        until(lambda: admission.peer_ready([2]) == [True])
        assert admission.activate([2]).outcome is Outcome.APPLIED
    member.wait(lambda view: view.ranks == (0, 1, 2))
    ctx.barrier("end")
    member.close()


@pytest.mark.parametrize("hosts", [["a", "a", "a"], ["a", "b", "c"]])
def test_growing_shrinking_and_coming_back(hosts):
    run_ranks(_grow, 3, hosts=hosts, timeout=60)


def _drop(ctx: Ctx) -> Any:
    """A rank that was ready dies before another one is."""
    if ctx.rank == 0:
        member = found(ctx, 1)
        admission = Admission(SLOTS, 20.0, lambda: member)
        until(lambda: admission.peer_ready([1]) == [True])
        ctx.store.set("go on", "1")
        done = admission.activate([1, 2])
        assert done.outcome is Outcome.DROPPED and done.dropped == (1,)
        assert member.view.ranks == (0, 2) and member.view.slots[1].state is State.FAILED
        ctx.store.set("end", "1")
    elif ctx.rank == 1:
        ctx.store.wait(["address"])
        come(ctx, 1)
        ctx.store.wait(["go on"])
        time.sleep(0.3)  # so that it has been seen
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        ctx.store.wait(["go on"])
        time.sleep(1.0)
        member = come(ctx, 2)
        ctx.store.wait(["end"])
    member.close()


def test_a_rank_that_is_lost_before_it_is_activated_is_dropped():
    run_ranks(_drop, 3, dies=[1], timeout=60)


def _revive(ctx: Ctx) -> Any:
    """All ranks of a group are gone; the next one that comes goes on with it, and lets another one in."""
    if ctx.rank == 0:
        found(ctx, 1)
        ctx.store.wait(["go on"])
        os.kill(os.getpid(), signal.SIGKILL)
    ctx.store.wait(["address"])
    member: Member | None = None
    admission = Admission(SLOTS, 20.0, lambda: member)
    assert not admission.revive()
    if ctx.rank == 1:
        member = come(ctx, 1)
        assert not admission.revive()
        assert member.view.slots[1].state is State.READY, "there is somebody who can activate it"
        ctx.store.set("go on", "1")
        member.wait(lambda view: not view.ranks)
        assert admission.revive()
        assert member.wait_active().ranks == (1,)
        ctx.store.set("revived", "1")
        assert admission.activate([0]).outcome is Outcome.APPLIED
    else:
        ctx.store.wait(["revived"])
        member = come(ctx, 0)
        assert not admission.revive()
        assert member.wait_active().ranks == (0, 1)
    ctx.store.set(f"end/{ctx.rank}", "1")
    ctx.store.wait(["end/1", "end/2"])
    member.close()


def test_a_group_that_nobody_is_left_in_goes_on_with_who_comes_back():
    run_ranks(_revive, 3, dies=[0], timeout=60)


def _deactivate_the_dead(ctx: Ctx) -> None:
    member = found(ctx, 3)
    admission = Admission(SLOTS, 20.0, lambda: member)
    ctx.barrier("founded")
    if ctx.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    member.wait(lambda view: view.slots[0].state in (State.FAILED, State.LEFT))  # the other may be faster
    assert admission.peer_ready([0]) == [False]
    if ctx.rank == 1:
        assert admission.deactivate([0]).outcome is Outcome.APPLIED
    member.wait(lambda view: view.slots[0].state is State.LEFT)
    ctx.store.set(f"end/{ctx.rank}", "1")
    ctx.store.wait(["end/1", "end/2"])
    member.close()


def test_rank_0_is_a_rank_like_others():
    """Those who count on lost ranks until they are taken out in order can see in the view when that was."""
    run_ranks(_deactivate_the_dead, 3, dies=[0], timeout=60)


def _meet(ctx: Ctx) -> None:
    member: Member | None = None
    store, options = within(lambda: member, ctx.store, "early", Options())
    assert isinstance(store, SubgroupStore) and options.store == ""
    store.set(f"torch/{ctx.rank}", "x")
    assert ctx.store.get(f"torch/{ctx.rank}") == b"x"
    member = found(ctx, 2)
    store, options = within(lambda: member, None, "late", Options())  # torch's store is gone
    assert options.store == member.options.store
    assert within(lambda: member, None, "own", Options(store="tcp://127.0.0.1:9"))[1].store == "tcp://127.0.0.1:9"
    said = StoreBootstrap(store, ctx.rank, 2).all_gather({"rank": ctx.rank}, 10.0)
    assert said == [{"rank": 0}, {"rank": 1}] and not store.check(["nothing"])
    ctx.barrier("end")
    member.close()


def test_founders_of_a_subgroup_need_no_store_of_torch():
    run_ranks(_meet, 2, timeout=60)
