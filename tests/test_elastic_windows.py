"""A process that was given up in the middle of a write to another host wakes up when its slot has another process."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from elastic_steps import CASE, ElasticFlight, Made, Where, elastic_a2a, new_group, serve
from ranks import Ctx, run_ranks

from moe_a2a import AllToAll, Config, ExcludedFromView, cpu_backend
from moe_a2a.transport.region import PAGE, RegionLayout

#: The last rank is the new process; the victim's rail peer is the rank that reads.
HOSTS, VICTIM, READER, LAST = ["a", "a", "b", "b", "b"], 2, 0, 4
FATAL_STEP, TIMEOUT_S = 7, 4.0
#: A lane of 32 MB: much more than sockets take before anybody reads.
WIDE = CASE.replace(max_tokens=32768, layouts=("grouped", "contiguous"))


def _write_and_stop(ctx: Ctx, a2a: AllToAll) -> None:
    """Write all of this rank's lane with bytes that are no rows, and stop when a part has gone."""
    delivery, arena = a2a._backend._group.rail._delivery, a2a._backend._arena
    start, nbytes = arena.layout.lanes[VICTIM]
    first = arena.memory.position(VICTIM, start)
    arena.memory.bytes[first : first + nbytes] = b"\xff" * nbytes
    peer, reader = delivery._peers[READER], int(ctx.store.get(f"pid of {READER}"))
    os.kill(reader, signal.SIGSTOP)
    batch = delivery._engine.submit_write(
        peer.engine, arena.memory.address(VICTIM, start), peer.address + start, nbytes
    )
    time.sleep(0.3)
    assert not delivery._engine.is_done(batch, peer.engine)
    ctx.store.set("victim", str(os.getpid()))
    os.kill(reader, signal.SIGCONT)
    os.kill(os.getpid(), signal.SIGSTOP)
    while not delivery._engine.is_done(batch, peer.engine):
        time.sleep(1e-3)
    ctx.store.set("the rest has come", "1")


def _wake_while_reading(ctx: Ctx, flight: ElasticFlight) -> None:
    """Let the rest of the write come between the records of a step and the copy of its rows."""
    real = cpu_backend.receive

    def wake(*args: object) -> object:
        os.kill(int(ctx.store.get("victim")), signal.SIGCONT)
        ctx.store.wait(["the rest has come"])
        return real(*args)

    cpu_backend.receive = wake
    flight.receive()
    cpu_backend.receive = real


def _replace(ctx: Ctx, where: Where) -> list[list[int]]:
    if ctx.rank == LAST:
        ctx.store.wait(["it is out"])
        a2a = elastic_a2a(ctx, where, 0, case=WIDE, join=VICTIM, timeout_s=TIMEOUT_S)
    else:
        a2a = elastic_a2a(ctx, where, LAST, case=WIDE, timeout_s=TIMEOUT_S)

    def before(number: int, move: str) -> None:
        if (number, move) == (FATAL_STEP, "send") and ctx.rank != LAST:
            ctx.store.set(f"pid of {ctx.rank}", str(os.getpid()))
            ctx.barrier("nobody reads", LAST)
            if ctx.rank == VICTIM:
                _write_and_stop(ctx, a2a)
        if number > FATAL_STEP and VICTIM not in a2a.elastic.ranks:
            ctx.store.set("it is out", "1")

    def all_are_back(step: Made) -> bool:
        return step.number > FATAL_STEP and step.members == list(range(LAST)) and not step.missing

    with a2a:
        if ctx.rank == VICTIM:
            with pytest.raises(ExcludedFromView, match=f"rank {VICTIM}"):
                serve(ctx, a2a, lambda step: False, before, WIDE)
            return []
        serve(ctx, a2a, all_are_back, before, WIDE)
        missing = []
        for move_on in range(8):
            flight = ElasticFlight(a2a, WIDE)
            flight.send()
            # In the half of the lane that had not been written when the victim was stopped.
            if ctx.rank == READER and move_on < 2 and flight.handle.step % 2 == 1:
                _wake_while_reading(ctx, flight)
            else:
                flight.receive()
            flight.send_back()
            flight.finish()
            missing.append(flight.missing)
        return missing


@pytest.mark.parametrize("hidden, dtype", [(128, torch.float32), (7168, torch.bfloat16)])
def test_a_lane_holds_all_that_one_rank_of_another_host_writes_and_nothing_else(hidden, dtype):
    config = Config(32, hidden, 4, 5, dtype, channels=("a", "b"))
    layout = RegionLayout.elastic(config, 4, several_hosts=True)
    blocks = [block for channel in layout.blocks for block in channel]
    end = max(block.publish + 5 * config.row_bytes for block in blocks)
    for rank, (start, nbytes) in enumerate(layout.lanes):
        assert start % PAGE == nbytes % PAGE == 0 and end <= start and start + nbytes <= layout.nbytes
        end = start + nbytes
        for slot in (slots[rank] for block in blocks for slots in (block.host_slots, block.source_slots)):
            assert start <= slot.inbox and slot.rows + 5 * config.row_bytes <= end
            assert slot.rows % config.row_bytes == 0
    assert not RegionLayout.elastic(config, 4, several_hosts=False).lanes


def test_the_rest_of_a_write_does_not_reach_the_rows_of_the_slot_s_next_process():
    results = run_ranks(_replace, len(HOSTS), new_group(), hosts=HOSTS)
    assert all(missing == [[]] * 8 for rank, missing in enumerate(results) if rank != VICTIM), results
