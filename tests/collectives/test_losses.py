"""Ranks that die, hang or were never there: every operation ends, and a result that is presented as right is right."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Collection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_steps import CHUNK, group_of, made
from elastic_steps import new_group
from ranks import Ctx, run_ranks

from moe_a2a import ExcludedFromView, RankLost
from moe_a2a.collectives import ProcessGroupMoeA2A

#: What the survivors go on with, and what is checked: (name, size of a piece).
CALLS = [
    (name, size)
    for size in (3, 3 * CHUNK // 4)
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier")
]
#: Operations after the one in which a rank is lost.
LAST = 15


def call(group: ProcessGroupMoeA2A, name: str, size: int, seed: int) -> tuple[Any, torch.Tensor, Any]:
    """(work, output, what it must be given the ranks that took part)."""
    rank, world = dist.get_rank(), group.slots
    inputs = [made(r, (size,), torch.float32, seed) for r in range(world)]
    blank = torch.full((size,), -1.0)
    if name == "all_reduce":
        out = inputs[rank].clone()
        return group.allreduce([out]), out, lambda ranks: sum(inputs[r] for r in ranks)
    if name == "broadcast":
        out = inputs[rank].clone()
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return group.broadcast([out], options), out, lambda ranks: inputs[0]
    if name == "barrier":
        return group.barrier(), blank, lambda ranks: blank
    if name == "reduce_scatter":
        out = blank.clone()
        return (
            group.reduce_scatter([out], [[part + r for r in range(world)] for part in [inputs[rank]]]),
            out,
            (lambda ranks: sum(inputs[r] + rank for r in ranks)),
        )
    pieces = [blank.clone() for _ in range(world)]
    if name == "all_gather":
        work = group.allgather([pieces], [inputs[rank]])
        sent = inputs
    else:
        work = group.alltoall(pieces, [inputs[rank] + r for r in range(world)])
        sent = [part + rank for part in inputs]
    # What slots without a rank have in the output is left as it was.
    return work, _Stacked(pieces), lambda ranks: torch.stack([sent[r] if r in ranks else blank for r in range(world)])


class _Stacked:
    def __init__(self, pieces: list[torch.Tensor]) -> None:
        self.pieces = pieces

    def whole(self) -> torch.Tensor:
        return torch.stack(self.pieces)


def whole(out: Any) -> torch.Tensor:
    return out.whole() if isinstance(out, _Stacked) else out


def serve(
    ctx: Ctx,
    group: ProcessGroupMoeA2A,
    count: int,
    seed: int,
    victim: int,
    when: int,
    how: str,
    gone: Collection[int] = (),
) -> list[Any]:
    """Make `count` operations, with one of the ranks lost in operation `when`, and some lost long before. Returns what
    was seen of each."""
    there = set(range(ctx.world)) - {*gone}
    gone = {*gone, victim}
    chosen = random.Random(seed)
    seen = []
    for number in range(count):
        name, size = chosen.choice(CALLS)
        if name == "broadcast" and 0 in gone:  # its root
            name = "all_reduce"
        before = chosen.random() < 0.5
        started = time.monotonic()
        if ctx.rank == victim and number == when and before:
            lose(ctx, how)
        work, out, expected = call(group, name, size, number)
        if ctx.rank == victim and number == when and not before:
            lose(ctx, how)
        right = work.wait()
        assert work.is_completed() and right == work.succeeded
        if right:
            assert set(work.ranks) in (there, there - {victim})
            assert torch.equal(whole(out), expected(work.ranks)), f"operation {number}: {name} of {size}"
        else:
            assert work.failed_ranks == (victim,) and isinstance(work.exception(), RankLost)
        seen.append((right, work.ranks, time.monotonic() - started, name))
    return seen


def lose(ctx: Ctx, how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    ctx.store.set("victim", str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


def _die(ctx: Ctx, store: str, seeds: list[int], victims: list[int]) -> Any:
    """Several losses one after the other."""
    with group_of(ctx, store, raises=False) as group:
        results = []
        for i, (seed, victim) in enumerate(zip(seeds, victims, strict=True)):
            when = random.Random(seed).randrange(5)
            results.append(serve(ctx, group, when + LAST, seed, victim, when, "die", victims[:i]))
            assert set(results[-1][-1][1]) == set(range(ctx.world)) - set(victims[: i + 1])
        return results


@pytest.mark.parametrize(
    "world, hosts, victims, seed", [(4, 1, [2, 0], 1), (4, 1, [3, 1], 2), (4, 2, [3, 0], 3), (3, 3, [1], 4)]
)
def test_the_survivors_go_on_when_a_rank_dies(world, hosts, victims, seed):
    seeds = [10 * seed + i for i in range(len(victims))]
    results = run_ranks(_die, world, new_group().store, seeds, victims, hosts=hosts, dies=victims)
    survivors = [result for result in results if result is not None]
    assert len(survivors) == world - len(victims)
    for loss in range(len(victims)):
        for number, steps in enumerate(zip(*[result[loss] for result in survivors], strict=True)):
            assert max(seconds for _, _, seconds, _ in steps) < 12, number
        # It failed in what it died in, or in the next one, and for those of other hosts perhaps in both: some of them
        # may have had its data. The last ones are right among those who are left.
        for result in survivors:
            assert sum(not right for right, *_ in result[loss]) <= (1 if hosts == 1 else 2)
            assert all(right for right, *_ in result[loss][-LAST + 2 :])


def _hang(ctx: Ctx, store: str, victim: int) -> Any:
    with group_of(ctx, store, raises=False, collective_timeout_s=2.0, p2p_timeout_s=2.0) as group:
        others = [rank for rank in range(ctx.world) if rank != victim]
        if ctx.rank == victim:
            with pytest.raises(ExcludedFromView, match=f"rank {victim}"):
                serve(ctx, group, 3 + LAST, 5, victim, 3, "stop")
            with pytest.raises(ExcludedFromView):
                dist.barrier()
            group.join()
            seen = None
        else:
            seen = serve(ctx, group, 3 + LAST, 5, victim, 3, "stop")
        if ctx.rank == others[0]:
            os.kill(int(ctx.store.get("victim")), signal.SIGCONT)
            assert group.activate([victim]).epoch > 0
        while len([active for active in group.active() if active]) < ctx.world:
            time.sleep(0.01)
        tensor = torch.ones(5)
        dist.all_reduce(tensor)
        assert bool((tensor == ctx.world).all())
        return seen


@pytest.mark.parametrize("hosts, victim", [(1, 1), (2, 0)])
def test_a_rank_that_hangs_is_left_out_and_comes_back(hosts, victim):
    results = run_ranks(_hang, 4, new_group().store, victim, hosts=hosts)
    for seen in results:
        if seen is not None:
            assert sum(not right for right, *_ in seen) == 1
            assert max(seconds for _, _, seconds, _ in seen) < 12


def _raises(ctx: Ctx, store: str) -> None:
    with group_of(ctx, store):
        dist.barrier()
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RankLost, match=r"all_reduce\(sum\) of 4 float32: .*rank 1") as raised:
            dist.all_reduce(torch.ones(4))
        assert raised.value.ranks == (1,)
        tensor = torch.ones(4)
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        assert bool((tensor == 1).all())
        assert dist.get_world_size() == 3
        with pytest.raises(RankLost, match="rank 1 takes no part") as raised:
            dist.broadcast(torch.ones(1), src=1)
        with pytest.raises(RankLost, match="rank 1 takes no part"):
            dist.send(torch.ones(1), 1)
        pieces = [torch.zeros(1) for _ in range(3)]
        dist.all_gather(pieces, torch.ones(1))
        assert [piece.item() for piece in pieces] == [1, 0, 1]


def test_a_lost_rank_is_an_error_of_whoever_waits_and_then_a_hole():
    run_ranks(_raises, 3, new_group().store, dies=[1])


def _messages(ctx: Ctx, store: str) -> None:
    with group_of(ctx, store, p2p_timeout_s=30.0):
        if ctx.rank == 2:
            dist.send(torch.full((3,), 5.0), 0)
            ctx.barrier("received")
            os.kill(os.getpid(), signal.SIGKILL)
        tensor = torch.zeros(3)
        if ctx.rank == 0:
            dist.recv(tensor, 2)
            assert bool((tensor == 5).all())
        ctx.barrier("received")
        if ctx.rank == 0:
            with pytest.raises(RankLost, match="rank 2"):
                dist.recv(tensor, 2)
            dist.send(tensor, 1)
        else:
            with pytest.raises(RankLost, match="rank 2"):
                dist.send(torch.zeros(10 * CHUNK), 2)
            dist.recv(tensor, 0)
            assert bool((tensor == 5).all())
        ctx.barrier("received once more", 2)  # what lies there unread is lost when its sender leaves


@pytest.mark.parametrize("hosts", [1, 3])
def test_messages_to_and_from_a_rank_that_died(hosts):
    run_ranks(_messages, 3, new_group().store, hosts=hosts, dies=[2])


def _deferred(ctx: Ctx, store: str) -> None:
    with group_of(ctx, store, on_failure="deferred", raises=False) as group:
        dist.barrier()
        if ctx.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(3):
            work = group.allreduce([torch.ones(2)])
            assert not work.wait() and work.failed_ranks == (2,)
        assert group.failure_pending and group.active()[2]
        group.sync_after_failure()
        assert not group.failure_pending and group.active() == (True, True, False)
        ctx.barrier("synced", 2)
        tensor = torch.ones(2)
        assert group.allreduce([tensor]).wait() and bool((tensor == 2).all())


def test_deferred_operations_fail_until_the_caller_takes_the_new_view():
    run_ranks(_deferred, 3, new_group().store, dies=[2])


def _framework(ctx: Ctx, store: str) -> None:
    with group_of(ctx, store, on_failure="framework", raises=False) as group:
        dist.barrier()
        if ctx.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(3):
            work = group.allreduce([torch.ones(2)])
            assert not work.wait() and work.failed_ranks == (0,)
        ctx.store.set(f"failed/{ctx.rank}", "1")
        ctx.store.wait(["failed/1", "failed/2"])
        if ctx.rank == 1:
            group.deactivate([0])
            ctx.store.set("deactivated", "1")
        ctx.store.wait(["deactivated"])
        tensor = torch.ones(2)
        assert group.allreduce([tensor]).wait() and bool((tensor == 2).all())


def test_framework_operations_fail_until_somebody_deactivates_the_rank():
    run_ranks(_framework, 3, new_group().store, dies=[0])
