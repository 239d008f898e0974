"""The membership store goes away and comes back while a group serves and loses a rank."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from elastic_steps import MOVES, ElasticFlight, Made, Where, elastic_a2a, serve
from ranks import Ctx, run_ranks

from moe_a2a import cpu_backend
from moe_a2a.membership.store import open_store
from moe_a2a.membership.store_process import start_store
from moe_a2a.membership.view import LIFE

sys.path.insert(0, str(Path(__file__).parent / "membership"))
from stores import Etcd, serving, wait_until_it_answers

AWAY, LOST, BACK = 10, 20, 40
TIMEOUT_S = 2.0


def _without_a_store(ctx: Ctx, where: Where, store_pid: int, victim: int, how: int) -> list[Made]:
    with elastic_a2a(ctx, where, ctx.world, timeout_s=TIMEOUT_S) as a2a:
        others = [rank for rank in range(ctx.world) if rank != victim]
        starts: list[threading.Thread] = []

        def before(number: int, move: str) -> None:
            if move != "send":
                return
            if number == AWAY and ctx.rank == others[0]:
                os.kill(store_pid, signal.SIGKILL)
            if number == LOST and ctx.rank == victim:
                ctx.store.set("victim", str(os.getpid()))
                os.kill(os.getpid(), how)
            if number >= BACK and ctx.rank == others[0] and not starts and a2a.elastic.frozen:
                # Beside the steps: it takes longer than the others would wait for this rank.
                starts.append(threading.Thread(target=start_store, args=(where.store.removeprefix("tcp://"),)))
                starts[0].start()

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


def _rows_of_a_dead_rank(ctx: Ctx, where: Where, store_pid: int, victim: int) -> list[Made]:
    """A rank dispatches and dies; the others begin that step only when they know. The view cannot change meanwhile."""
    with elastic_a2a(ctx, where, ctx.world, timeout_s=TIMEOUT_S) as a2a:
        lookout = a2a._backend._group.lookout

        def before(number: int, move: str) -> None:
            if (number, move) == (AWAY, "send") and ctx.rank == 0:
                os.kill(store_pid, signal.SIGKILL)
            if (number, move) == (LOST, "receive") and ctx.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            if (number, move) == (LOST, "send") and ctx.rank != victim:
                roll = lookout.roll(0, LOST)
                while not lookout.lost(roll, victim):
                    time.sleep(0.002)

        return serve(ctx, a2a, lambda step: step.number > LOST, before)


def test_rows_that_a_rank_left_before_it_died_are_not_missing_until_its_sums_are():
    """`ElasticFlight.receive` compares who is missing with whose rows came."""
    where, victim = Where(start_store(), "rows_of_a_dead_rank"), 2
    results = run_ranks(_rows_of_a_dead_rank, 4, where, serving(where.store), victim, dies=[victim])
    for made in (result for rank, result in enumerate(results) if rank != victim):
        assert [step.missing for step in made if step.number >= LOST - 1] == [[]] + [[victim]] * (len(made) - LOST + 1)


def _late(ctx: Ctx, where: Where, store_pid: int, victim: int, read: str) -> list[Made] | tuple[list[int], list[int]]:
    """One rank sleeps between the records of a step and the copy of its tables or rows, until the others have gone on
    without it and have used their memory again."""
    with elastic_a2a(ctx, where, ctx.world, timeout_s=1.0) as a2a:
        others = [rank for rank in range(ctx.world) if rank != victim]

        def before(number: int, move: str) -> None:
            if (number, move) == (AWAY, "send") and ctx.rank == others[0]:
                os.kill(store_pid, signal.SIGKILL)

        if ctx.rank != victim:
            return serve(ctx, a2a, lambda step: step.number > LOST + 20, before)
        for _ in range(LOST):
            flight = ElasticFlight(a2a)
            for move in MOVES:
                getattr(flight, move)()
        flight = ElasticFlight(a2a)
        flight.send()
        place, name = (cpu_backend, "receive") if read == "rows" else (a2a._backend._arena, "arrival")
        real = getattr(place, name)

        def sleepy(*args: object, **more: object) -> object:
            setattr(place, name, real)
            time.sleep(3.0)
            return real(*args, **more)

        setattr(place, name, sleepy)
        flight.receive()
        missing = flight.missing
        flight.send_back()
        flight.finish()
        return missing, flight.missing


@pytest.mark.parametrize("read", ["tables", "rows"])
@pytest.mark.parametrize("hosts, victim, torn", [(1, 1, [0, 2, 3]), (2, 2, [1, 3])])
def test_rows_that_were_overwritten_while_they_were_read_are_left_out(hosts, victim, torn, read):
    """Those of rank 0 are in the late rank's own memory if it is on another host, and nobody has touched them."""
    where = Where(start_store(), "late")
    results = run_ranks(_late, 4, where, serving(where.store), victim, read, hosts=hosts)
    others = [rank for rank in range(4) if rank != victim]
    assert results[victim] == (torn, torn)
    for rank in others:
        # The late rank is rank 0's rail peer: with it goes what its host has for rank 0 in that step.
        with_it = {victim, 3} if hosts > 1 and rank == 0 else {victim}
        assert all(set(step.missing) <= (with_it if step.number == LOST + 1 else {victim}) for step in results[rank])
        assert results[rank][-1].missing == [victim]


def _after_the_founder(ctx: Ctx, where: Where, store_pid: int) -> Made:
    """Rank 0 and its host's watcher die, then the store, which comes back without data; then a process joins."""
    if ctx.rank == 3:
        ctx.store.wait(["come"])
        a2a = elastic_a2a(ctx, where, 0, join=0, timeout_s=TIMEOUT_S)
    else:
        a2a = elastic_a2a(ctx, where, 3, timeout_s=TIMEOUT_S)
    with a2a:
        if ctx.rank == 0:
            os.kill(a2a._backend.member.watcher_pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        starts: list[threading.Thread] = []

        def before(number: int, move: str) -> None:
            if ctx.rank != 1 or move != "send":
                return
            if not starts and a2a.elastic.ranks == (1, 2):
                os.kill(store_pid, signal.SIGKILL)
                starts.append(threading.Thread(target=start_store, args=(where.store.removeprefix("tcp://"),)))
                starts[0].start()
            elif starts and a2a.elastic.view.epoch >= LIFE:
                ctx.store.set("come", "1")

        def all_are_there(step: Made) -> bool:
            return step.members == [0, 1, 2] and not step.missing and bool(starts or ctx.rank == 0)

        return serve(ctx, a2a, all_are_there, before)[-1]


def test_who_joins_learns_what_the_founders_settled_when_they_and_the_store_have_died():
    where = Where(start_store(), "after_the_founder")
    results = run_ranks(_after_the_founder, 4, where, serving(where.store), hosts=["a", "b", "b", "a"], dies=[0])
    assert all(step.members == [0, 1, 2] and not step.missing for step in results[1:])


def _on_etcd(ctx: Ctx, where: Where) -> list[Made]:
    """Rank 0 dies and is replaced; then etcd dies and comes back."""
    joins = ctx.rank == ctx.world - 1
    if joins:
        ctx.store.wait(["rank 0 is gone"])
    a2a = elastic_a2a(ctx, where, ctx.world - 1, join=0 if joins else None)
    with a2a:

        def before(number: int, move: str) -> None:
            if ctx.rank == 0 and (number, move) == (LOST, "receive"):
                os.kill(os.getpid(), signal.SIGKILL)
            if ctx.rank == 1 and a2a.elastic.ranks == (1, 2):
                ctx.store.set("rank 0 is gone", "1")

        def all_are_back(step: Made) -> bool:
            return step.number > LOST and step.members == [0, 1, 2] and not step.missing

        made = serve(ctx, a2a, all_are_back, before, key="rank 0 is back")
        frozen: list[bool] = []

        def seen(number: int, move: str) -> None:
            frozen.append(a2a.elastic.frozen)

        return made + serve(
            ctx, a2a, lambda step: any(frozen) and not frozen[-1], seen, key="etcd is back", most=20_000
        )


def test_a_group_on_etcd_goes_on_through_the_death_of_rank_0_and_of_etcd(tmp_path):
    etcd = Etcd(tmp_path)
    pauses = threading.Thread(target=_restart, args=(etcd,))
    try:
        wait_until_it_answers(etcd.url)
        pauses.start()
        hosts = ["a", "b", "b", "a"]
        results = run_ranks(_on_etcd, 4, Where(etcd.url, "steps"), hosts=hosts, dies=[0])
    finally:
        _over.set()
        pauses.join()
        etcd.close()
    for made in results[1:]:
        assert made[-1].members == [0, 1, 2] and not made[-1].missing
        assert not [step for step in made if step.missing and step.number > LOST + 50]


_over = threading.Event()


def _restart(etcd: Etcd) -> None:
    """Kill etcd some time after the group has got over the death of rank 0, and start it again."""
    group = open_store(etcd.url, "steps")
    while not _over.wait(0.1):
        view = group.get()
        if view is not None and view.ranks == (0, 1, 2) and view.epoch > 2:
            _over.wait(1.0)
            etcd.kill()
            _over.wait(2.0)
            etcd.start()
            return
