"""Groups that grow and shrink while their ranks go on making collectives: none of those fails."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_steps import CHUNK, init
from elastic_steps import new_group
from ranks import Ctx, run_ranks

from moe_a2a import ExcludedFromView, JoinRefused
from moe_a2a.collectives import Options, ProcessGroupMoeA2A

FOUNDERS, SLOTS = 2, 4


def make(group: ProcessGroupMoeA2A, number: int) -> list[int]:
    """One operation, checked. Returns who took part, as its result tells."""
    bits = torch.full((1 if number % 2 else CHUNK,), 1 << group.rank())
    work = group.allreduce([bits])
    work.wait()
    assert work.succeeded and bool((bits == bits[0]).all())
    pieces = [torch.full((3,), -1.0) for _ in range(SLOTS)]
    group.allgather([pieces], [torch.full((3,), float(group.rank()))]).wait()
    there = [rank for rank, piece in enumerate(pieces) if piece[0] >= 0]
    assert all(bool((pieces[rank] == rank).all()) for rank in there)
    return [rank for rank in range(SLOTS) if int(bits[0]) >> rank & 1]


def serve_until(group: ProcessGroupMoeA2A, ranks: list[int]) -> None:
    """Go on until these ranks take part, and all of them know."""
    number = 0
    deadline = time.monotonic() + 60
    while True:
        seen = make(group, number)
        enough = torch.tensor([int(seen == ranks)])
        group.allreduce([enough], _min()).wait()
        if int(enough):
            return
        assert time.monotonic() < deadline, f"{seen} instead of {ranks}"
        number += 1


def _min() -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MIN
    return options


def _grow(ctx: Ctx, store: str, name: str) -> None:
    everyone = list(range(SLOTS))
    if ctx.rank < FOUNDERS:
        ctx.world = FOUNDERS
        group = init(ctx, store, slots=SLOTS, group=name)
        assert (dist.get_world_size(), group.slots) == (FOUNDERS, SLOTS)
        ctx.barrier("founded", FOUNDERS)
        if ctx.rank == 0:
            ctx.store.set("founded", "1")
            while group.peer_ready([2, 3]) != [True, True]:
                make_alone = group.peer_ready([1])
                assert make_alone == [True]
                time.sleep(0.01)
            group.activate([2])
            group.activate([2, 3])
    else:
        ctx.store.wait(["founded"])
        group = init(ctx, store, slots=SLOTS, group=name, joining=True)
        assert group.alone and make(group, 0) == [ctx.rank]
        group.join()
        assert not group.alone
    serve_until(group, everyone)
    assert dist.get_world_size() == 4
    ctx.barrier("grown", 4)
    if ctx.rank == 1:
        group.deactivate([3])
    if ctx.rank == 3:
        with pytest.raises(ExcludedFromView):
            serve_until(group, everyone[:3])
        group.join()
    else:
        serve_until(group, everyone[:3])
        if ctx.rank == 2:
            assert dist.get_world_size() == 3
            assert group.activate([3]).reason == ""
    serve_until(group, everyone)
    dist.destroy_process_group()


@pytest.mark.parametrize("hosts", [1, ["a", "b", "a", "b"]], ids=["one-host", "two-hosts"])
def test_no_operation_fails_while_ranks_come_and_go(hosts):
    where = new_group()
    run_ranks(_grow, 4, where.store, where.group, hosts=hosts)


def _refused(ctx: Ctx, store: str, name: str) -> Any:
    if ctx.rank == 0:
        ctx.world = 1
        init(ctx, store, slots=2, group=name)
        ctx.store.set("founded", "1")
        ctx.store.wait(["done"])
        return
    ctx.store.wait(["founded"])
    given = Options(store=store, group=name, joining=True, host=ctx.host)
    dist.init_process_group("moe_a2a", store=ctx.store, rank=1, world_size=2, pg_options=given)
    group = dist.group.WORLD
    assert isinstance(group, ProcessGroupMoeA2A)
    with pytest.raises(JoinRefused, match="chunk_bytes"):
        group.join()
    tensor = torch.ones(3)
    dist.all_reduce(tensor)  # still alone, and usable
    assert group.alone and bool((tensor == 1).all())
    ctx.store.set("done", "1")


def test_a_process_with_other_options_is_refused_and_stays_alone():
    where = new_group()
    run_ranks(_refused, 2, where.store, where.group)
