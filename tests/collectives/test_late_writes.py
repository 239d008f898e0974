"""A process that was given up in the middle of a write to another host wakes up when its slot has another process."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_steps import init
from elastic_steps import new_group
from ranks import Ctx, run_ranks

from moe_a2a import RankLost
from moe_a2a.collectives import ProcessGroupMoeA2A
from moe_a2a.collectives.board import Steps
from moe_a2a.collectives.rounds import Call

#: The last process takes the slot of the victim, whose write goes to the reader.
HOSTS, VICTIM, READER, NEXT = ["a", "a", "b", "b", "b"], 2, 0, 4
SLOTS, TIMEOUT_S = 4, 5.0
#: Much more than sockets take before anybody reads.
CHUNK = 8 << 20


def _write_and_stop(ctx: Ctx, group: ProcessGroupMoeA2A) -> None:
    """Write over all that this rank publishes to the reader, and stop when a part has gone."""
    base = group._group.base
    engine, layout, peer = base.engine, base.layout, base.peers[READER]
    garbage = torch.full((layout.published,), 255, dtype=torch.uint8)
    engine.register(garbage.data_ptr(), garbage.numel())
    reader = int(ctx.store.get(f"pid of {READER}"))
    os.kill(reader, signal.SIGSTOP)
    target = peer.address + layout.mirror(VICTIM)
    batch = engine.submit_write(peer.engine, garbage.data_ptr(), target, garbage.numel())
    time.sleep(0.3)
    assert not engine.is_done(batch, peer.engine)
    ctx.store.set("victim", str(os.getpid()))
    os.kill(reader, signal.SIGCONT)
    os.kill(os.getpid(), signal.SIGSTOP)
    while not engine.is_done(batch, peer.engine):
        time.sleep(1e-3)
    ctx.store.set("the rest has come", "1")
    time.sleep(30)


def _wake_while_reading(ctx: Ctx) -> None:
    """Let the rest of the write come between the entries of a collective and the copy of its data. Those of the second
    turn lie where nothing had been written when the victim was stopped."""
    real = Call.meet

    def meet(call: Call, *given: Any) -> Steps:
        yield from real(call, *given)
        if call._turn == 1:
            Call.meet = real
            os.kill(int(ctx.store.get("victim")), signal.SIGCONT)
            ctx.store.wait(["the rest has come"])

    Call.meet = meet


def _exchange(group: ProcessGroupMoeA2A, number: int) -> None:
    """All ranks take part, and everything is right."""
    rank = group.rank()
    total = torch.full((1 << 16,), 1 << rank, dtype=torch.int64)
    group.allreduce([total]).wait()
    assert bool((total == (1 << SLOTS) - 1).all())
    pieces = [torch.zeros(1 << 16) for _ in range(SLOTS)]
    group.alltoall(pieces, [torch.full((1 << 16,), 10.0 * rank + to + number) for to in range(SLOTS)]).wait()
    for source, piece in enumerate(pieces):
        assert bool((piece == 10.0 * source + rank + number).all()), f"exchange {number}: from rank {source}"


def _replace(ctx: Ctx, store: str, name: str) -> int:
    given = {"slots": SLOTS, "group": name, "chunk_bytes": CHUNK, "collective_timeout_s": TIMEOUT_S}
    number = 0
    if ctx.rank == NEXT:
        ctx.store.wait(["it is out"])
        ctx.rank, ctx.world = VICTIM, SLOTS
        group = init(ctx, store, joining=True, **given)
        group.join()
    else:
        ctx.world = SLOTS
        group = init(ctx, store, **given)
        for number in range(4):
            _exchange(group, number)
        ctx.store.set(f"pid of {ctx.rank}", str(os.getpid()))
        ctx.barrier("nobody reads", SLOTS)
        if ctx.rank == VICTIM:
            _write_and_stop(ctx, group)
        with pytest.raises(RankLost, match=f"rank {VICTIM}"):
            dist.barrier()
        assert not group.active()[VICTIM]
        ctx.store.set("it is out", "1")
        if ctx.rank == READER:
            assert group.activate([VICTIM]).reason == ""
        while not group.active()[VICTIM]:
            time.sleep(1e-3)
    for number in range(10, 20):
        if number == 12 and ctx.rank == READER:
            _wake_while_reading(ctx)
        _exchange(group, number)
    if ctx.rank == READER:
        os.kill(int(ctx.store.get("victim")), signal.SIGKILL)
    dist.destroy_process_group()
    return number


def test_the_rest_of_a_write_does_not_reach_what_the_slot_s_next_process_says():
    where = new_group()
    results = run_ranks(_replace, len(HOSTS), where.store, where.group, hosts=HOSTS, dies=[VICTIM])
    assert results == [19, 19, None, 19, 19]
