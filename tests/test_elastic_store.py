"""The membership store goes away and comes back while a group serves and loses a rank."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from elastic_steps import Made, Where, elastic_a2a, serve
from ranks import Ctx, run_ranks

from moe_a2a.membership.store_process import start_store

sys.path.insert(0, str(Path(__file__).parent / "membership"))
from stores import serving

AWAY, LOST, BACK = 10, 20, 40
TIMEOUT_S = 2.0


def _without_a_store(ctx: Ctx, where: Where, store_pid: int, victim: int, how: int) -> list[Made]:
    with elastic_a2a(ctx, where, ctx.world, timeout_s=TIMEOUT_S) as a2a:
        others = [rank for rank in range(ctx.world) if rank != victim]

        def before(number: int, move: str) -> None:
            if move != "send":
                return
            if number == AWAY and ctx.rank == others[0]:
                os.kill(store_pid, signal.SIGKILL)
            if number == LOST and ctx.rank == victim:
                ctx.store.set("victim", str(os.getpid()))
                os.kill(os.getpid(), how)
            if number == BACK and ctx.rank == others[0]:
                assert a2a.elastic.frozen
                assert start_store(where.store.removeprefix("tcp://")) == where.store

        made = serve(ctx, a2a, lambda step: step.members == others and not step.missing, before)
        if ctx.rank == others[0] and how == signal.SIGSTOP:
            os.kill(int(ctx.store.get("victim")), signal.SIGKILL)
        return made


@pytest.mark.parametrize("hosts, victim, how", [(1, 1, signal.SIGKILL), (2, 3, signal.SIGSTOP)])
def test_steps_go_on_while_the_store_is_away_and_say_who_is_missing(hosts, victim, how):
    where = Where(start_store(), "without_a_store")
    results = run_ranks(_without_a_store, 4, where, serving(where.store), victim, how, hosts=hosts, dies=[victim])
    for made in (result for rank, result in enumerate(results) if rank != victim):
        assert all(not step.missing for step in made if step.number < LOST)
        assert all(step.missing == [victim] for step in made if LOST < step.number < BACK)
        assert all(step.seconds < 1.0 for step in made if LOST < step.number < BACK), "each step waits anew"
        assert not made[-1].missing and victim not in made[-1].members
