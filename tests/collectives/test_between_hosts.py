"""The view changes while a collective begins, and word of it and of the others' entries comes to each host at its own
time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_steps import init
from elastic_steps import new_group
from ranks import Ctx, run_ranks

from moe_a2a import ExcludedFromView
from moe_a2a.collectives import ProcessGroupMoeA2A
from moe_a2a.collectives.board import Steps

FIRST, MIDDLE, LAST, JOINS = range(4)
#: A large one takes two exchanges in a round.
SIZES = {"small": 5, "large": 6000}


def _went_on(board: Any, places: Any, turn: int, index: int, stamp: int) -> bool:
    """Whether a rank has shown a second part, or entered the next collective."""
    second, later = board.words[places.seconds[turn][index][0]], board.words[places.entries[1 - turn][index][0]]
    return int(second) == stamp or stamp < int(later) < 1 << 63


def _enter_late(group: ProcessGroupMoeA2A) -> None:
    """The next entry of this rank reaches the first rank at once, and the middle one when that has moved on to a view
    with one rank more."""
    board = group._group._board
    real = board.push_entry

    def push_entry(roll: Any, places: Any, turn: int) -> Steps:
        board.push_entry = real
        away, places.away = places.away, [FIRST]
        yield from real(roll, places, turn)
        first, stamp = places.others.index(FIRST), int(board.words[(board._own + board.base.layout.entry(turn)) // 8])
        deadline = time.monotonic() + 20
        while not _went_on(board, places, turn, first, stamp):
            assert time.monotonic() < deadline, "the first rank does not go on"
            yield
        assert group.activate([JOINS]).reason == ""
        middle = places.entries[turn][places.others.index(MIDDLE)]
        deadline = time.monotonic() + 20
        while int(board.words[middle[1]]) <= roll.epoch:
            assert time.monotonic() < deadline, "the middle rank stays in the old view"
            yield
        places.away = away
        yield from real(roll, places, turn)

    board.push_entry = push_entry


def _sum(group: ProcessGroupMoeA2A, size: int) -> tuple[int, tuple[int, ...]]:
    tensor = torch.full((size,), 1 << group.rank())
    work = group.allreduce([tensor])
    assert work.wait() and bool((tensor == tensor[0]).all())
    return int(tensor[0]), work.ranks


def _join(ctx: Ctx, store: str, name: str, size: int) -> list[tuple[int, tuple[int, ...]]]:
    given = {"slots": 4, "group": name, "collective_timeout_s": 10.0}
    if ctx.rank == JOINS:
        ctx.store.wait(["founded"])
        group = init(ctx, store, joining=True, **given)
        group.join()
        seen = [_sum(group, size)]
    else:
        ctx.world = JOINS
        group = init(ctx, store, **given)
        for _ in range(3):
            assert _sum(group, size) == (7, (0, 1, 2))
        ctx.barrier("founded", JOINS)
        ctx.store.set("founded", "1")
        while not all(group.peer_ready([JOINS])):
            time.sleep(0.01)
        ctx.barrier("it is ready", JOINS)
        if ctx.rank == LAST:
            _enter_late(group)
        seen = [_sum(group, size), _sum(group, size)]
    seen += [_sum(group, size) for _ in range(5)]
    ctx.barrier("seen")
    dist.destroy_process_group()
    return seen


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_end_in_one_view_if_one_has_gone_on_before_another_one_has_seen_everybody(size):
    where = new_group()
    results = run_ranks(_join, 4, where.store, where.group, SIZES[size], hosts=["a", "b", "c", "d"])
    everybody = (15, (0, 1, 2, 3))
    assert results[JOINS] == [everybody] * 6
    for rank in (FIRST, MIDDLE, LAST):
        assert results[rank] == [(7, (0, 1, 2)), *[everybody] * 6]


def _take_out(ctx: Ctx, store: str, name: str) -> list[tuple[int, tuple[int, ...]]]:
    """The first rank sees all entries and takes the last rank out; only then does the third one's entry come to the
    other host."""
    group = init(ctx, store, group=name, collective_timeout_s=10.0)
    for _ in range(3):
        assert _sum(group, 5) == (15, (0, 1, 2, 3))
    ctx.barrier("begin")
    if ctx.rank == 2:
        board = group._group._board
        real = board.push_entry

        def push_entry(roll: Any, places: Any, turn: int) -> Steps:
            board.push_entry = real
            while not ctx.store.check(["it is out"]):
                yield
            time.sleep(0.05)
            yield from real(roll, places, turn)

        board.push_entry = push_entry
    seen = [_sum(group, 5)]
    if ctx.rank == 0:
        assert group.deactivate([3]).reason == ""
        ctx.store.set("it is out", "1")
    if ctx.rank == 3:
        with pytest.raises(ExcludedFromView, match="left"):
            _sum(group, 5)
    else:
        seen += [_sum(group, 5) for _ in range(3)]
    ctx.barrier("end")
    dist.destroy_process_group()
    return seen


def test_who_is_taken_out_after_a_collective_ends_it_though_entries_of_other_hosts_come_late():
    where = new_group()
    results = run_ranks(_take_out, 4, where.store, where.group, hosts=["a", "b", "a", "b"])
    everybody = (15, (0, 1, 2, 3))
    assert results == [[everybody, *[(7, (0, 1, 2))] * 3]] * 3 + [[everybody]]
