"""Who is given up when nothing comes in time: the one that hangs, and not those that wait for it; and all ranks of a
host that is silent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from elastic_steps import Made, Where, elastic_a2a, new_group, serve
from ranks import Ctx, run_ranks

from moe_a2a.elastic.lookout import Lookout
from moe_a2a.membership.page import _FIRST_HEARD, Page
from moe_a2a.membership.view import Endpoint, View
from moe_a2a.membership.wire import encode_view

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

    def hear(self, rank: int, ago: float, waits: float = 0.0) -> None:
        """A rank's host was heard of so long ago, and said that it has been waiting for so long by now."""
        now = time.monotonic_ns()
        self.page.hear({rank: now - int(1e9 * waits) if waits else 0})
        self.page.words[_FIRST_HEARD + rank] = now - int(1e9 * ago)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.page.close()


def test_a_rank_that_waits_itself_is_excused_until_its_wait_must_have_ended(scene: Scene) -> None:
    since = time.monotonic() - 8.0
    assert not scene.lookout.excused(2, since), "nothing was heard of it"
    scene.hear(2, 0.1)
    assert not scene.lookout.excused(2, since), "it does not wait"
    scene.hear(2, 0.1, waits=7.0)
    assert scene.lookout.excused(2, since)
    assert not scene.lookout.excused(2, time.monotonic() - 12.6), "a call has an end"
    scene.hear(2, 0.1, waits=11.1)
    assert not scene.lookout.excused(2, since), "its own wait must have ended by now"
    scene.hear(2, 5.0, waits=7.0)
    assert not scene.lookout.excused(2, since), "its host has said nothing for long: that is old news"


def test_who_waits_is_told_by_the_page_and_ends_with_the_wait(scene: Scene) -> None:
    now = time.monotonic()
    scene.lookout.begin_wait(now)
    assert scene.page.own_wait == int(1e9 * now)
    scene.lookout.end_wait()
    assert scene.page.own_wait == 0


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
