"""Who is given up when nothing comes in time: the one that hangs, and not those that wait for it; and all ranks of a
host that is silent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from elastic_steps import Made, Where, elastic_a2a, new_group, serve
from ranks import Ctx, run_ranks

from moe_a2a.elastic.lookout import Lookout
from moe_a2a.elastic.rail import ElasticRail
from moe_a2a.membership.page import _FIRST_HEARD, Page
from moe_a2a.membership.view import Endpoint, View
from moe_a2a.membership.wire import encode_view

pytestmark = pytest.mark.alone

TIMEOUT_S = 10.0
HOSTS = ("a", "a", "b", "b")


class Scene:
    """A lookout of rank 0 with its page, and what it has accused."""

    def __init__(self) -> None:
        view = View.of([Endpoint("127.0.0.1:1", 1 + rank, host) for rank, host in enumerate(HOSTS)], 4)
        self.page = Page()
        self.page.write(view, encode_view(view))
        member = SimpleNamespace(page=self.page, view=view, rank=0, check=lambda: None)
        self.accused: dict[int, str] = {}
        self.lookout = Lookout(member, lambda rank, _, why: self.accused.setdefault(rank, why), None, TIMEOUT_S)
        self.roll = self.lookout.roll(0, 1)

    def hear(self, rank: int, ago: float, waited: float | None = None) -> None:
        """A rank's host was heard of so long ago, and said when it had last waited."""
        now = time.monotonic_ns()
        self.page.hear({rank: 0 if waited is None else now - int(1e9 * waited)})
        self.page.words[_FIRST_HEARD + rank] = now - int(1e9 * ago)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.page.close()


def test_a_rank_that_waits_itself_is_excused_for_a_while(scene: Scene) -> None:
    since = time.monotonic() - 8.0
    assert not scene.lookout.excused(2, since), "nothing was heard of it"
    scene.hear(2, 0.1)
    assert not scene.lookout.excused(2, since), "it has not waited"
    scene.hear(2, 0.1, waited=0.2)
    assert scene.lookout.waits(2) and scene.lookout.excused(2, since)
    assert not scene.lookout.excused(2, time.monotonic() - 12.6), "a call has an end"
    scene.hear(2, 0.1, waited=1.0)
    assert not scene.lookout.waits(2) and not scene.lookout.excused(2, since), "it was stopped while it waited"


def test_who_waits_says_so_in_the_page(scene: Scene) -> None:
    before = time.monotonic_ns()
    scene.lookout.say_that_it_waits()
    assert before <= scene.page.own_wait <= time.monotonic_ns()


@pytest.mark.parametrize("waits", [True, False])
def test_a_rail_peer_does_without_the_sums_of_a_rank_that_waits_and_blames_one_that_hangs(
    scene: Scene, waits: bool
) -> None:
    rail: Any = object.__new__(ElasticRail)
    rail._lookout, rail._timeout = scene.lookout, 0.2
    scene.lookout._timeout = 0.2
    nothing = SimpleNamespace(poll=lambda number: None, passed=lambda number: False)
    found: dict[int, Any] = {}
    started = time.monotonic()
    for _ in rail._collect(SimpleNamespace(roll=scene.roll, number=1), {1: nothing}, found):
        if waits:
            scene.hear(1, 0.0, waited=0.0)
        assert time.monotonic() - started < 10.0, "it waits for ever"
    assert time.monotonic() - started >= (0.25 if waits else 0.16)
    assert found == {} and list(scene.accused) == ([] if waits else [1])


def test_a_host_that_is_silent_is_given_up_as_a_whole_and_others_are_not(scene: Scene) -> None:
    for rank in (2, 3):
        scene.hear(rank, 4.5)
    scene.lookout.accuse(scene.roll, 3, "nothing came")
    assert scene.accused == {3: "nothing came", 2: "its host is silent, and nothing came"}
    assert scene.lookout.lost(scene.roll, 2) and not scene.lookout.lost(scene.roll, 1)


@pytest.mark.parametrize("rank, ago", [(3, 0.5), (3, None), (1, 4.5)])
def test_one_rank_of_a_host_that_is_heard_of_is_given_up_alone(scene: Scene, rank: int, ago: float | None) -> None:
    """Nor is the own host silent, nor one whose watcher says nothing at all."""
    for other in range(4):
        if ago is not None:
            scene.hear(other, ago)
    scene.lookout.accuse(scene.roll, rank, "nothing came")
    assert scene.accused == {rank: "nothing came"}


def _hang(ctx: Ctx, where: Where, victim: int) -> list[Made]:
    """The victim stops with half of what it owes for a step: some have it, and go on to the next step; the others wait
    for the victim, and those for them."""
    with elastic_a2a(ctx, where, ctx.world, timeout_s=3.0) as a2a:
        others = [rank for rank in range(ctx.world) if rank != victim]

        def before(number: int, move: str) -> None:
            if (number, move) == (9, "finish") and ctx.rank == victim:
                ctx.store.set("victim", str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)

        made = serve(ctx, a2a, lambda step: step.members == others and not step.missing, before)
        if ctx.rank == others[0]:
            os.kill(int(ctx.store.get("victim")), signal.SIGKILL)
        return made


def test_only_the_one_that_hangs_is_left_out() -> None:
    victim = 1
    results = run_ranks(_hang, 4, new_group(), victim, hosts=2, dies=[victim])
    others = [rank for rank in range(4) if rank != victim]
    for rank in others:
        assert results[rank][-1].members == others
        assert {len(step.members) for step in results[rank]} == {4, 3}, "somebody else was excluded"
