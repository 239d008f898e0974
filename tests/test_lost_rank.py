"""A rank that dies or hangs in the middle of a step: the others raise in time and name it, whoever noticed first."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from ranks import Ctx, run_ranks
from steps import Case, Flight, run_step

from moe_a2a import AllToAll, HandleError, RankLost

pytestmark = pytest.mark.alone

TIMEOUT_S = 3.0
# Only time-outs tell of a hang, each stage's before the next one's: ranks must not differ by more than a stage.
HANG_TIMEOUT_S = 6.0
SLACK_S = 1.5  # for machines with more ranks than cores
CASE = Case(experts=12, hidden=128, tokens=(9, 4, 13, 0))
#: The victim's last deed.
MOVES = ("combine_recv", "dispatch_send", "dispatch_recv", "combine_send")


def _lose(ctx: Ctx, victim: int, last: str, how: str) -> float:
    """Returns the time until this rank was told."""
    timeout_s = HANG_TIMEOUT_S if how == "hangs" else TIMEOUT_S
    a2a = ctx.a2a(CASE.config(), timeout_s=timeout_s)
    for step in range(3):
        run_step(a2a, CASE, step, CASE.layouts[step])
    if ctx.rank == victim:
        ctx.store.set("victim", str(os.getpid()))
    ctx.barrier("all is well")
    started = time.monotonic()
    with pytest.raises(RankLost) as caught:
        _steps(ctx, a2a, victim, last, how)
    took = time.monotonic() - started
    assert caught.value.ranks == (victim,), f"blames {caught.value.ranks}: {caught.value}"
    assert f"rank {victim}" in str(caught.value)
    assert took < timeout_s + SLACK_S, f"took {took} s"
    with pytest.raises(HandleError, match="cannot be used further"):
        run_step(a2a, CASE, 5, "masked")
    ctx.store.set(f"told/{ctx.rank}", "1")
    survivors = [r for r in range(ctx.world) if r != victim]
    ctx.store.wait([f"told/{r}" for r in survivors])
    started = time.monotonic()
    a2a.close()
    assert time.monotonic() - started < timeout_s + SLACK_S
    if ctx.rank == survivors[0] and how == "hangs":
        os.kill(int(ctx.store.get("victim")), signal.SIGKILL)
    return took


def _steps(ctx: Ctx, a2a: AllToAll, victim: int, last: str, how: str) -> None:
    for step in (3, 4):  # what the victim has done already may be enough to end its step
        flight = Flight(a2a, CASE, step)
        _end(ctx, victim, last == "combine_recv", how)
        flight.send()
        _end(ctx, victim, last == "dispatch_send", how)
        flight.receive()
        _end(ctx, victim, last == "dispatch_recv", how)
        flight.send_back()
        _end(ctx, victim, last == "combine_send", how)
        flight.finish()


def _end(ctx: Ctx, victim: int, now: bool, how: str) -> None:
    if not now or ctx.rank != victim:
        return
    if how == "exits":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize("last", MOVES)
@pytest.mark.parametrize("victim", [0, 2])
def test_the_others_of_a_host_are_told_at_once_of_a_death(victim, last):
    times = run_ranks(_lose, 4, victim, last, "exits" if victim else "is killed", dies=[victim])
    assert max(t for t in times if t is not None) < TIMEOUT_S / 2


@pytest.mark.parametrize("last", MOVES)
@pytest.mark.parametrize("victim", [0, 3])
def test_a_death_is_told_on_all_hosts_in_time(victim, last):
    run_ranks(_lose, 4, victim, last, "is killed", hosts=2, dies=[victim])


@pytest.mark.parametrize("last", ["dispatch_send", "dispatch_recv"])
@pytest.mark.parametrize("victim", [1, 2], ids=["a rank that is nobody's rail peer", "the rail peer of all"])
def test_a_death_is_told_in_time_on_uneven_hosts(victim, last):
    run_ranks(_lose, 3, victim, last, "exits", hosts=["a", "a", "b"], dies=[victim])


@pytest.mark.parametrize(
    "hosts, victim, last",
    [(1, 1, "dispatch_recv"), (2, 0, "combine_recv"), (2, 0, "dispatch_send")] + [(2, 3, move) for move in MOVES],
)
def test_a_rank_that_hangs_is_named_in_time(hosts, victim, last):
    run_ranks(_lose, 4, victim, last, "hangs", hosts=hosts, dies=[victim])


def _close_early(ctx: Ctx) -> None:
    a2a = ctx.a2a(CASE.config(), timeout_s=TIMEOUT_S)
    run_step(a2a, CASE, 0, "masked")
    if ctx.rank == 1:
        a2a.close()
        ctx.barrier("end")
        return
    with pytest.raises(RankLost, match="rank 1") as caught:
        run_step(a2a, CASE, 1, "masked")
    assert caught.value.ranks == (1,)
    ctx.barrier("end")
    a2a.close()


def test_a_rank_that_closes_while_it_is_waited_for_is_named():
    run_ranks(_close_early, 3)


def _ask_who_is_missing(ctx: Ctx) -> None:
    a2a = ctx.a2a(CASE.config(), timeout_s=TIMEOUT_S)
    good, bad = Flight(a2a, CASE, 0), Flight(a2a, CASE, 1)
    good.send()
    assert a2a.missing(good.handle) == []
    good.land()
    ctx.barrier("all is well")
    if ctx.rank == 1:
        os._exit(3)
    bad.send()
    with pytest.raises(RankLost):
        bad.land()
    assert a2a.missing(good.handle) == []
    assert a2a.missing(bad.handle) == [1]
    a2a.close()
    with pytest.raises(HandleError, match="is closed"):
        a2a.missing(good.handle)
    with ctx_alone(ctx) as other, pytest.raises(HandleError, match="another AllToAll"):
        other.missing(good.handle)


def ctx_alone(ctx: Ctx) -> AllToAll:
    """An object of this rank only."""
    return AllToAll(CASE.config(), store=dist.HashStore(), rank=0, world_size=1)


def test_a_handle_says_who_is_missing_from_its_step():
    run_ranks(_ask_who_is_missing, 3, dies=[1])
