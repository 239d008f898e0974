"""Processes that come to an elastic group and leave it while it serves."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist
from elastic_steps import CASE, Made, Where, elastic_a2a, new_group, run_out, serve
from ranks import Ctx, run_ranks

from moe_a2a import AllToAll, ConfigError, Elastic, ExcludedFromView, JoinRefused, Options
from moe_a2a.elastic import keeper, meeting
from moe_a2a.membership import MemberOptions, State, join_group

FATAL_STEP = 9


def _all_of(ranks: int) -> Any:
    return lambda step: step.members == list(range(ranks)) and not step.missing


def _replace(ctx: Ctx, where: Where, victim: int) -> tuple[list[Made], float]:
    """The last process of the test takes the slot of a rank that is killed. Returns its steps, and how long joining
    took."""
    joins = ctx.rank == ctx.world - 1
    if joins:
        ctx.store.wait(["somebody is missing"])
        started = time.monotonic()
        a2a = elastic_a2a(ctx, where, 0, join=victim)
        run_out(a2a)
        took = time.monotonic() - started
    else:
        a2a, took = elastic_a2a(ctx, where, ctx.world - 1), 0.0

    def before(number: int, move: str) -> None:
        if ctx.rank == victim and number == FATAL_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        tells = number > FATAL_STEP and ctx.rank == (victim + 1) % (ctx.world - 1)
        if tells and a2a.elastic.ranks != tuple(range(ctx.world - 1)):
            ctx.store.set("somebody is missing", "1")

    with a2a:
        assert a2a.rank == (victim if joins else ctx.rank)
        made = serve(ctx, a2a, lambda step: step.number > FATAL_STEP + 1 and _all_of(ctx.world - 1)(step), before)
        return made, took


@pytest.mark.parametrize("hosts, victim", [(["a"] * 5, 0), (["a", "a", "b", "b", "b"], 2), (["a", "b", "c", "a"], 1)])
def test_a_new_process_takes_the_slot_of_a_dead_one(hosts, victim):
    """On its host, as its rail peer, and on a host that the group did not know."""
    results = run_ranks(_replace, len(hosts), new_group(), victim, hosts=hosts, dies=[victim])
    assert results[-1][1] < 3.0
    for rank, (made, _) in ((r, result) for r, result in enumerate(results) if r != victim):
        assert made[-1].members == list(range(len(hosts) - 1)) and not made[-1].missing
        came = [step for step in made if step.number > FATAL_STEP + 1 and len(step.members) == len(hosts) - 1]
        after = [step for step in came if step.missing and rank != len(hosts) - 1]
        assert not [step for step in after if victim not in step.missing], after


def _scale(ctx: Ctx, where: Where, few: int) -> list[Made]:
    """The first few ranks found, the others come, stay for some steps, and leave."""
    joins = ctx.rank >= few
    if joins:
        # Who asks for a slot comes before those that take whichever is free.
        ctx.store.wait(["come" if ctx.rank == 4 else "rank 4 came"])
        a2a = elastic_a2a(ctx, where, 0, join=ctx.rank if ctx.rank == 4 else -1)
        if ctx.rank == 4:
            ctx.store.set("rank 4 came", "1")
    else:
        a2a = elastic_a2a(ctx, where, few, max_ranks=ctx.world)
    with a2a:
        if not joins:
            for _ in range(5):
                run_out(a2a)
            if ctx.rank == 0:
                ctx.store.set("come", "1")
        made = serve(ctx, a2a, _all_of(ctx.world), key="all are there")
        if joins:
            a2a.elastic.leave(steps=ctx.rank)
            for _ in range(ctx.rank):
                run_out(a2a)
            with pytest.raises(ExcludedFromView, match="has left"):
                run_out(a2a)
            return made
        return made + serve(ctx, a2a, _all_of(few), key="they have left")


@pytest.mark.parametrize(
    "few, hosts", [(3, ["a"] * 6), (3, ["a", "b", "a", "b", "b", "c"]), (4, ["a", "a", "b", "b", "a", "b", "c", "c"])]
)
def test_a_group_grows_and_shrinks_without_a_bad_step(few, hosts):
    results = run_ranks(_scale, len(hosts), new_group(), few, hosts=hosts)
    for rank, made in enumerate(results):
        assert not [step for step in made if step.missing], [step for step in made if step.missing]
        if rank < few:
            assert [step.number for step in made] == list(range(6, 6 + len(made)))
            assert made[-1].members == list(range(few))


def _refused(ctx: Ctx, where: Where) -> list[Made]:
    if ctx.rank < 2:
        with elastic_a2a(ctx, where, 2, max_ranks=4) as a2a:
            ctx.store.set("founded", "1")
            return serve(ctx, a2a, lambda step: ctx.store.check(["refused"]))

    def join(match: str, case: Any = CASE, rank: int | None = None, host: str | None = None, **elastic: Any) -> None:
        given = Elastic(where.store, **{"group": where.group, "join": True, **elastic})
        with pytest.raises(JoinRefused, match=match):
            AllToAll(case.config(), rank=rank, options=Options(timeout_s=10.0, host=host or ctx.host), elastic=given)

    ctx.store.wait(["founded"])
    join("hidden_size differs", CASE.replace(hidden=256))
    join("slot 1 is taken", rank=1)
    join("slot 4 does not exist", rank=4)
    join("max_ranks differs", max_ranks=8)
    join("founded on one host", host="elsewhere")
    join("knows no group", group="nobody")
    meeting.FORMAT_VERSION += 1
    join("another version of moe-a2a")
    ctx.store.set("refused", "1")
    return []


def test_who_does_not_fit_is_refused_and_the_group_does_not_notice():
    results = run_ranks(_refused, 3, new_group())
    for made in results[:2]:
        assert all(step.members == [0, 1] and not step.missing for step in made)


def test_elastic_groups_are_refused_where_they_cannot_be():
    with pytest.raises(ConfigError, match="elastic= is for CPU ranks"):
        AllToAll(CASE.config(), store=dist.HashStore(), rank=0, world_size=1, device="cuda", elastic=Elastic())
    with pytest.raises(ConfigError, match="needs store="):
        Elastic(join=True)
    with pytest.raises(ConfigError, match="1 to 64"):
        Elastic(max_ranks=65)
    with pytest.raises(ConfigError, match="leave group, store, world_size out"):
        AllToAll(CASE.config(), world_size=2, elastic=Elastic("tcp://127.0.0.1:1", join=True))


def _come_together(ctx: Ctx, where: Where) -> list[Made]:
    """The last two processes come to one host at the same time. Neither waits for the search of the other one."""
    joins = ctx.rank >= 2
    if joins:
        search = keeper.Keeper._search
        keeper.Keeper._search = lambda self: (time.sleep(0.5), search(self))
        ctx.store.wait(["come"])
    a2a = elastic_a2a(ctx, where, 2, join=ctx.rank if joins else None, **({} if joins else {"max_ranks": 4}))
    with a2a:
        if ctx.rank == 0:
            ctx.store.set("come", "1")
        return serve(ctx, a2a, _all_of(4))


@pytest.mark.parametrize("hosts", [["a", "b", "b", "b"], ["a"] * 4])
def test_two_that_come_together_find_each_other_before_their_first_step(hosts):
    results = run_ranks(_come_together, 4, new_group(), hosts=hosts)
    assert not [step for made in results for step in made if step.missing]


def _stopped_while_it_joins(ctx: Ctx, where: Where) -> float | None:
    """A process that holds a slot never says where it is; meanwhile a rank hangs, and has to be left out."""
    if ctx.rank == 3:
        options = MemberOptions(where.store, where.group, "a")
        ctx.store.wait(["come"])
        charter = json.loads(ctx.store.get("come"))
        member = join_group(options, rank=3, charter=charter)
        ctx.store.set("joins", "1")
        ctx.store.wait(["over"])
        member.close()
        return None
    with elastic_a2a(ctx, where, 3, max_ranks=4, timeout_s=1.0) as a2a:
        run_out(a2a)
        if ctx.rank == 0:
            ctx.store.set("come", json.dumps(meeting._charter(CASE.config(), Options(timeout_s=1.0))))
        ctx.store.wait(["joins"])
        a2a._backend.member.wait(lambda view: view.slots[3].state is State.READY)
        time.sleep(0.2)  # all are looking for it now
        if ctx.rank == 2:
            ctx.store.wait(["over"])
            return None
        started = time.monotonic()
        # The view reaches one of them first; both end with one step.
        serve(ctx, a2a, lambda step: step.members == [0, 1])
        took = time.monotonic() - started
        ctx.barrier("both have masked it", 2)
        ctx.store.set("over", "1")
        return took


def test_a_process_that_hangs_while_it_joins_keeps_nobody_from_leaving_others_out():
    results = run_ranks(_stopped_while_it_joins, 4, new_group())
    assert max(results[:2]) < 12, "accusations waited for the search, which gives up after 30 s"
