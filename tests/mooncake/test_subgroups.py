"""Subgroups have slots of their own; and nothing hangs on rank 0, nor on the store that it holds for torch."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pg_ranks import PATIENCE_S, init, run, total, until, world
from ranks import Ctx, run_ranks

from moe_a2a.compat.mooncake import pg


def _subgroup(ranks: list[int], slots: int, joins: bool, mirror: torch.Tensor | None = None) -> Any:
    options = pg.MooncakeBackendOptions(slots, joins)
    if mirror is not None:
        options = pg.MooncakeBackendOptions(mirror, joins, slots)
    return dist.new_group(ranks, backend="mooncake-cpu", pg_options=options, timeout=timedelta(seconds=PATIENCE_S))


def _own_slots(ctx: Ctx) -> None:
    """Ranks 0 and 1 found the world, one subgroup of both, and one of rank 1; rank 2 comes to all three."""
    joins, mirror = ctx.rank == 2, torch.zeros(3, dtype=torch.int32)
    if joins:
        ctx.store.wait(["founded"])
    init(ctx, pg.MooncakeBackendOptions(3, joins), 3 if joins else 2)
    both = _subgroup([0, 1, 2] if joins else [0, 1], 3, joins, mirror)
    last = _subgroup([1, 2] if joins else [1], 2, joins)
    assert mirror.tolist() == ([0, 0, 1] if joins else [1, 1, 0])
    if joins:
        for group in (world(), both, last):
            pg.join_group(group)
    else:
        assert total(1.0, both) == 2
        ctx.barrier("both", 2)
        ctx.store.set("founded", "1")
        groups = [(world(), [2]), (both, [2])] + ([(last, [1])] if ctx.rank == 1 else [])
        for group, slots in groups:
            until(lambda group=group, slots=slots: all(pg.get_peer_state(group, slots)))
            assert pg.recover_ranks(group, slots).status is pg.ProposalStatus.Applied
            if group is world():
                assert mirror.tolist() == [1, 1, 0], "each group is asked for itself"
    assert total(2.0**ctx.rank) == 7 and total(2.0**ctx.rank, both) == 7 and mirror.tolist() == [1, 1, 1]
    if ctx.rank > 0:
        assert dist.get_world_size(last) == 2 and total(2.0**ctx.rank, last) == 6
        x = torch.tensor([ctx.rank])
        dist.broadcast(x, group=last, group_src=1)
        assert x.item() == 2
    later = dist.new_group([0, 2], backend="mooncake-cpu") if ctx.rank != 1 else dist.new_group([0, 2])
    if ctx.rank != 1:
        assert total(1.0, later) == 2
    ctx.barrier("end")
    if ctx.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    until(lambda: mirror.tolist() == [1, 1, 0])
    if ctx.rank == 1:
        until(lambda: pg.get_active_ranks(last).tolist() == [1, 0])
        assert total(1.0, last) == 1
    dist.all_reduce(torch.ones(1), group=both)  # fails, if the view is older than this
    assert total(1.0, both) == 2
    ctx.barrier("over", 2)
    dist.destroy_process_group()


def test_a_joiner_comes_to_each_subgroup_for_itself_and_is_lost_in_all():
    run(_own_slots, 3, dies=[2])


def _among_themselves(ctx: Ctx) -> None:
    """Two that have come, and do not belong to the world yet, have a group of their own."""
    init(ctx, pg.MooncakeBackendOptions(4, True), 4, rank=2 + ctx.rank)
    own = dist.new_group([2, 3], backend="mooncake-cpu", use_local_synchronization=True)
    assert total(1.0) == 1 and total(2.0**ctx.rank, own) == 3
    ctx.barrier("end")
    dist.destroy_process_group()


def test_those_who_come_may_have_groups_among_themselves_before_they_belong_to_the_world():
    run(_among_themselves, 2)


def _without_rank_0(ctx: Ctx) -> None:
    """Rank 0 holds torch's store, and dies with it. The others go on, make a group, and take a new rank 0 in."""
    os.environ["MOE_A2A_GROUP"] = "no-rank-0"
    new = ctx.rank == 3
    if new:
        ctx.store.wait(["store"])
        os.environ["MOE_A2A_STORE"] = ctx.store.get("store").decode()
    rank = 0 if new else ctx.rank
    if rank != 0:
        ctx.store.wait(["port"])
    port = 0 if rank == 0 else int(ctx.store.get("port"))
    torchs = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    if not new:
        ctx.store.set("port", str(torchs.port))
    timeout = timedelta(seconds=PATIENCE_S)
    options = pg.MooncakeBackendOptions(3, new)
    dist.init_process_group("mooncake-cpu", store=torchs, rank=rank, world_size=3, timeout=timeout, pg_options=options)
    if not new:
        assert total(1.0) == 3
        if ctx.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        until(lambda: pg.get_active_ranks(world()).tolist() == [0, 1, 1])
        dist.all_reduce(torch.ones(1))
        assert total(1.0) == 2
        pair = dist.new_group([1, 2], backend="mooncake-cpu")
        assert total(1.0, pair) == 2
        ctx.store.set("store", world().member.options.store)
        assert pg.recover_ranks(world(), [0]).status is pg.ProposalStatus.Applied
    else:
        pg.join_group(world())
    assert total(1.0) == 3
    ctx.store.set(f"end/{ctx.rank}", "1")
    ctx.store.wait([f"end/{r}" for r in (1, 2, 3)])
    dist.destroy_process_group()


def test_the_death_of_rank_0_takes_nothing_along():
    run_ranks(_without_rank_0, 4, dies=[0], timeout=60)
