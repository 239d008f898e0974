"""An elastic group loses ranks in the middle of steps: every survivor's step ends, says who is missing, and is right in
what it has; the steps after it go on without them."""

from __future__ import annotations

import os
import random
import signal

import pytest
from elastic_steps import CASE, MOVES, ElasticFlight, Made, Where, elastic_a2a, new_group, run_out, serve
from ranks import Ctx, host_labels, run_ranks

from moe_a2a import ExcludedFromView

pytestmark = pytest.mark.alone

FATAL_STEP = 9
#: A rank that dies is missed for as long as it takes until the view has masked it, on a busy machine.
SOON_S = 3.0


def _lose(ctx: Ctx, where: Where, deaths: dict[int, tuple[int, str]], case=CASE) -> list[Made]:
    """deaths: rank -> (step, move before which it is killed)."""
    with elastic_a2a(ctx, where, ctx.world, case=case) as a2a:

        def before(number: int, move: str) -> None:
            if deaths.get(ctx.rank) == (number, move):
                os.kill(os.getpid(), signal.SIGKILL)

        survivors = sorted(set(range(ctx.world)) - deaths.keys())
        return serve(ctx, a2a, lambda step: step.members == survivors and not step.missing, before, case)


def _check(results: list[list[Made] | None], deaths: dict[int, tuple[int, str]], hosts: int = 1) -> None:
    """The survivors of `deaths` missed nobody before it died, and nobody at the end. The sums of a host are lost with
    the rail peer that had to send them."""
    labels = host_labels(len(results), hosts)
    first = min(step for step, _ in deaths.values())
    for rank, made in enumerate(results):
        if rank in deaths:
            continue
        survivors = sorted(set(range(len(results))) - deaths.keys())
        assert [step.number for step in made] == list(range(1, len(made) + 1))
        for step in made:
            dead = set(step.missing) & deaths.keys()
            mates = {
                r for r, label in enumerate(labels) if label in [labels[d] for d in dead] and label != labels[rank]
            }
            assert set(step.missing) <= dead | mates, f"rank {rank}: {step}"
            assert step.number >= first or not step.missing, f"rank {rank}: {step}"
            assert step.seconds < SOON_S, f"rank {rank}: {step}"
        assert made[-1].members == survivors and not made[-1].missing


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_group_goes_on_without_a_rank_that_is_killed(hosts, victim, move):
    deaths = {victim: (FATAL_STEP, move)}
    _check(run_ranks(_lose, 4, new_group(), deaths, hosts=hosts, dies=deaths), deaths, hosts)


CASES = {
    "weights at combine": CASE.replace(weights_at="combine", layouts=("masked", "grouped")),
    "FP8": CASE.replace(fp8="ue8m0", experts=8, top_k=2),
}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_lost_at_once(name):
    deaths = {1: (FATAL_STEP, "send_back"), 3: (FATAL_STEP, "receive")}
    _check(run_ranks(_lose, 4, new_group(), deaths, CASES[name], hosts=2, dies=deaths), deaths, 2)


def test_losses_at_random_points_of_random_steps():
    chance = random.Random(7)
    victims = chance.sample(range(6), 3)
    deaths = {victim: (chance.randint(5, 40), chance.choice(MOVES)) for victim in victims}
    case = CASE.replace(experts=24)
    _check(run_ranks(_lose, 6, new_group(), deaths, case, hosts=3, dies=deaths), deaths, 3)


def _stop(ctx: Ctx, where: Where, victim: int, move: str, timeout_s: float) -> list[Made]:
    with elastic_a2a(ctx, where, ctx.world, timeout_s=timeout_s) as a2a:
        others = [rank for rank in range(ctx.world) if rank != victim]

        def before(number: int, now: str) -> None:
            if ctx.rank == victim and (number, now) == (FATAL_STEP, move):
                ctx.store.set("victim", str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)

        def without_it(step: Made) -> bool:
            return step.members == others and not step.missing and ctx.rank != victim

        if ctx.rank == victim:
            with pytest.raises(ExcludedFromView, match=f"rank {victim}"):
                serve(ctx, a2a, without_it, before)
            with pytest.raises(ExcludedFromView):
                run_out(a2a)
            a2a.elastic.rejoin()
        made = serve(ctx, a2a, without_it, before) if ctx.rank != victim else []
        if ctx.rank == others[0]:
            os.kill(int(ctx.store.get("victim")), signal.SIGCONT)
        again = serve(ctx, a2a, lambda step: step.members == list(range(ctx.world)), key="all are back")
        assert again[-1].members == list(range(ctx.world)) and not again[-1].missing
        return made


@pytest.mark.parametrize("hosts, victim, move", [(1, 1, "receive"), (2, 2, "send_back"), (2, 0, "send")])
def test_a_rank_that_hangs_is_left_out_and_comes_back(hosts, victim, move):
    timeout_s = 2.0
    results = run_ranks(_stop, 4, new_group(), victim, move, timeout_s, hosts=hosts)
    for rank, made in enumerate(results):
        assert rank == victim or max(step.seconds for step in made) < 2 * timeout_s + 1
        assert all(not set(step.missing) - {victim} or hosts > 1 for step in made)


def _two_in_flight(ctx: Ctx, where: Where, steps: int) -> int:
    """Pairs of steps in flight together, each after a single one, without a barrier. Returns how many lack somebody."""
    with elastic_a2a(ctx, where, ctx.world) as a2a:
        bad = 0
        for _ in range(steps):
            for together in (1, 2):
                flights = [ElasticFlight(a2a) for _ in range(together)]
                for flight in flights:
                    flight.send()
                for flight in flights:
                    flight.receive()
                    flight.send_back()
                    flight.finish()
                    bad += bool(flight.missing)
        return bad


@pytest.mark.parametrize("hosts", [1, 2])
def test_two_steps_of_a_channel_in_flight_lack_nobody(hosts):
    """A rank that is two dispatches ahead leaves in place the sums that a slow one still reads."""
    assert run_ranks(_two_in_flight, 4, new_group(), 30, hosts=hosts) == [0] * 4
