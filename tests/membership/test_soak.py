"""Ranks, watchers and the store killed at random, several at a time: always one agreed view, and everybody back in it.

MOE_A2A_SOAK_EVENTS=500 makes it long.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import members as m
import pytest
from members import Group, Refused
from stores import serving

pytestmark = pytest.mark.alone

EVENTS = int(os.environ.get("MOE_A2A_SOAK_EVENTS", "12"))
RANKS, HOSTS = 6, 3


def strike(choose: random.Random, group: Group, live: dict[int, m.Process]) -> set[int]:
    """Kill one or two things. Returns the ranks among them."""
    dead: set[int] = set()
    for kind in choose.sample(["rank", "rank", "two ranks", "watcher", "store"], choose.choice([1, 1, 2])):
        if kind == "watcher":
            pid = live[choose.choice(sorted(set(live) - dead))].call(m.watcher_pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif kind == "store":
            with contextlib.suppress(LookupError, ProcessLookupError):
                os.kill(serving(group.url), signal.SIGKILL)
        else:
            for rank in choose.sample(sorted(set(live) - dead), 1 if kind == "rank" else 2):
                os.kill(live[rank].process.pid, signal.SIGKILL)
                dead.add(rank)
    return dead


def settle(live: dict[int, m.Process], alive: tuple[int, ...], dead: dict[int, int]) -> None:
    """All survivors have the view of the survivors. If a host lost its watcher and all its ranks, nobody sees that but
    one who waits for them: then that one says so."""
    try:
        live[alive[0]].call(m.wait_ranks, alive, 6.0)
    except Refused:
        deadline = time.monotonic() + 20.0
        while True:
            try:
                live[alive[0]].call(m.propose, dead)
                break
            except Refused:  # the store is on its way back
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
    for rank in alive:
        live[rank].call(m.wait_ranks, alive, 20.0)


def test_whatever_is_killed_the_survivors_agree_and_the_dead_come_back() -> None:
    choose = random.Random(7)
    with Group("", RANKS, HOSTS) as group:
        group.url = group[0].call(m.store_url)
        live = dict(enumerate(group.members))
        for event in range(EVENTS):
            dead = strike(choose, group, live)
            alive = tuple(sorted(set(live) - dead))
            settle(live, alive, {rank: live[rank].incarnation for rank in dead})
            newest = max(live[rank].call(m.active)[0] for rank in alive)
            assert {live[rank].call(m.wait_epoch, newest) for rank in alive} == {alive}
            assert len({live[rank].call(m.view) for rank in alive}) == 1
            for rank in sorted(dead):
                live[rank] = group.join(f"host-{rank * HOSTS // RANKS}", rank).ready()
                live[rank].tell(m.wait_active)
                live[alive[0]].call(m.activate, {rank: live[rank].incarnation}, [event])
                live[rank].hear()
            for member in live.values():
                member.call(m.wait_ranks, tuple(range(RANKS)), 20.0)
