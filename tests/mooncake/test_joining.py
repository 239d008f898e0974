"""Processes that come to a group, leave it in order, and come back."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from pg_ranks import init, run, total, until, world
from ranks import Ctx

from moe_a2a import ExcludedFromView, JoinRefused
from moe_a2a.compat.mooncake import pg


def _finish(ctx: Ctx, *ranks: int) -> None:
    ctx.store.set(f"end/{ctx.rank}", "1")
    ctx.store.wait([f"end/{rank}" for rank in ranks])
    dist.destroy_process_group()


def _alone(ctx: Ctx, slots: int) -> torch.Tensor:
    """A joiner, before it joins: its collectives involve only itself, and it reports its declared size."""
    mirror = torch.full((slots,), 7, dtype=torch.int32)
    init(ctx, pg.MooncakeBackendOptions(mirror, True, slots), ctx.rank + 1)
    assert dist.get_world_size() == ctx.rank + 1 and dist.get_rank() == ctx.rank
    assert mirror.tolist() == [int(slot == ctx.rank) for slot in range(slots)]
    assert pg.get_current_epoch(world()) == 0
    assert total(5.0) == 5.0
    parts = [torch.full((1,), -1) for _ in range(ctx.rank + 1)]
    dist.all_gather(parts, torch.tensor([ctx.rank]))
    assert torch.cat(parts).tolist() == [-1] * ctx.rank + [ctx.rank]
    dist.barrier()
    refused = pg.activate_ranks(world(), [ctx.rank])
    assert refused.status is pg.ProposalStatus.Rejected and "alone" in refused.reject_reason
    return mirror


def _grow(ctx: Ctx) -> None:
    """Two ranks found a group of four slots; slot 3 comes, then slot 2, then slot 3 leaves and comes back."""
    epochs = []
    if ctx.rank < 2:
        mirror = torch.zeros(4, dtype=torch.int32)
        init(ctx, pg.MooncakeBackendOptions(mirror, False, 4), 2)
        assert mirror.tolist() == [1, 1, 0, 0] and dist.get_world_size() == 2 and total(1.0) == 2
        epochs.append(pg.get_current_epoch(world()))
        assert pg.get_peer_state(world(), [1, 2]) == [True, False] and pg.get_num_synced_ranks(world()) == 2
        ctx.barrier("small", 2)
        if ctx.rank == 1:
            early = pg.activate_ranks(world(), [3])  # it waits until 3 is there
            assert early.status is pg.ProposalStatus.Applied and early.dropped_ranks == []
            again = pg.recover_ranks(world(), [3])
            assert again == early and early.new_epoch == pg.get_current_epoch(world())
            ctx.store.set("3 is in", "1")
    else:
        mirror = _alone(ctx, 4)
        ctx.store.wait([f"barrier/small/{r}" for r in (0, 1)])
        if ctx.rank == 2:
            ctx.store.wait(["take 2"])
            epochs.append(pg.get_current_epoch(world()))
        pg.join_group(world())
        pg.join_group(world())  # harmless
        epochs.append(pg.get_current_epoch(world()))
    if ctx.rank != 2:
        ctx.store.wait(["3 is in"])
        until(lambda: mirror.tolist() == [1, 1, 0, 1])
        assert dist.get_world_size() == 4, "one past the highest active slot: a hole is no rank less"
        assert total(2.0**ctx.rank) == 11
        parts = [torch.full((1,), -1) for _ in range(4)]
        dist.all_gather(parts, torch.tensor([ctx.rank]))
        assert torch.cat(parts).tolist() == [0, 1, -1, 3]
        epochs.append(pg.get_current_epoch(world()))
        ctx.store.set(f"sum/{ctx.rank}", "1")
        ctx.store.wait([f"sum/{r}" for r in (0, 1, 3)])
        if ctx.rank == 3:
            ctx.store.set("take 2", "1")
        pg.activate_ranks(world(), [2])  # all of them, as engines do
    assert mirror.tolist() == [1, 1, 1, 1] and total(2.0**ctx.rank) == 15
    epochs.append(pg.get_current_epoch(world()))

    if ctx.rank == 0:
        answer = pg.deactivate_ranks(world(), [3])
        assert answer.status is pg.ProposalStatus.Applied and answer.new_epoch == pg.get_current_epoch(world())
        ctx.store.set("3 is out", "1")
    ctx.store.wait(["3 is out"])
    if ctx.rank == 3:
        with pytest.raises(ExcludedFromView, match="left"):
            total(1.0)
        ctx.store.wait(["sums"])
        pg.join_group(world())
    else:
        assert dist.get_world_size() == 3 and total(1.0) == 3
        ctx.store.set(f"small again/{ctx.rank}", "1")
        ctx.store.wait([f"small again/{r}" for r in range(3)])
        ctx.store.set("sums", "1")
        until(lambda: all(pg.get_peer_state(world(), [3])))
        pg.activate_ranks(world(), [3])
    assert total(2.0**ctx.rank) == 15 and mirror.tolist() == [1, 1, 1, 1]
    epochs.append(pg.get_current_epoch(world()))
    assert epochs == sorted(epochs) and len(set(epochs)) >= 3, epochs
    ctx.barrier("end")
    dist.destroy_process_group()


@pytest.mark.parametrize("hosts", ["aaaa", "abab"])
def test_a_group_grows_shrinks_and_grows(hosts):
    run(_grow, 4, hosts=list(hosts))


def _replace(ctx: Ctx, victim: int) -> None:
    """Process 3 takes the slot of a dead one."""
    if ctx.rank == 3:
        ctx.store.wait(["lost"])
        init(ctx, pg.MooncakeBackendOptions(3, True), 3, rank=victim)
        assert total(1.0) == 1
        pg.join_group(world())
    else:
        init(ctx, pg.MooncakeBackendOptions(3), 3)
        assert total(1.0) == 3
        if ctx.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        work = dist.all_reduce(torch.ones(1), async_op=True)
        work.wait()
        assert not pg.get_local_success(work) and total(1.0) == 2
        ctx.store.set("lost", "1")
        answer = pg.activate_ranks(world(), [victim])
        assert answer.status is pg.ProposalStatus.Applied, answer
    assert pg.get_active_ranks(world()).tolist() == [1, 1, 1] and total(1.0) == 3
    _finish(ctx, *(r for r in range(4) if r != victim))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_new_process_takes_the_slot_of_a_dead_one(victim):
    run(_replace, 4, victim, dies=[victim])


def _cut_off(ctx: Ctx) -> None:
    """A process that was stopped comes back in its process and its group."""
    pg.set_collective_timeout_us(1_500_000)
    init(ctx, None, 2)
    assert total(1.0) == 2
    if ctx.rank == 1:
        ctx.store.set("pid", str(os.getpid()))
        until(lambda: not pg.get_active_ranks(world())[1])
        with pytest.raises(ExcludedFromView):
            total(1.0)
        pg.join_group(world())
    else:
        pid = int(ctx.store.get("pid"))
        os.kill(pid, signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
        assert total(1.0) == 1
        os.kill(pid, signal.SIGCONT)
        assert pg.activate_ranks(world(), [1]).status is pg.ProposalStatus.Applied
    assert total(1.0) == 2
    _finish(ctx, 0, 1)


def test_a_process_that_was_cut_off_comes_back_in_place():
    run(_cut_off, 2)


def _joined() -> bool:
    with contextlib.suppress(JoinRefused):
        pg.join_group(world())
        return True
    return False


def _nobody_left(ctx: Ctx) -> None:
    if ctx.rank == 0:
        init(ctx, pg.MooncakeBackendOptions(2), 1)
        assert total(1.0) == 1
        ctx.store.set("address", "known")
        os.kill(os.getpid(), signal.SIGKILL)
    ctx.store.wait(["address"])
    init(ctx, pg.MooncakeBackendOptions(2, True), 1, rank=0)
    until(_joined)  # refused while the watcher has not seen that the slot's process is gone
    assert total(4.0) == 4 and pg.get_active_ranks(world()).tolist() == [1, 0]
    dist.destroy_process_group()


def test_a_group_that_nobody_is_left_in_goes_on_with_who_comes_back():
    run(_nobody_left, 2, dies=[0])


def _dropped(ctx: Ctx) -> None:
    """The process in slot 1 is ready, and dies before the one in slot 2 comes."""
    if ctx.rank == 0:
        init(ctx, pg.MooncakeBackendOptions(3), 1)
        ctx.store.set("founded", "1")
        until(lambda: all(pg.get_peer_state(world(), [1])))
        pid = int(ctx.store.get("pid"))
        threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL)).start()
        ctx.store.set("soon", "1")
        answer = pg.activate_ranks(world(), [1, 2])
        assert answer.status is pg.ProposalStatus.AppliedWithDroppedRanks and answer.dropped_ranks == [1], answer
        assert answer.new_epoch == pg.get_current_epoch(world())
    else:
        ctx.store.wait(["founded"])
        init(ctx, pg.MooncakeBackendOptions(3, True), 3)
        if ctx.rank == 1:
            ctx.store.set("pid", str(os.getpid()))
        else:
            ctx.store.wait(["soon"])
            time.sleep(1.0)
        pg.join_group(world())
    assert total(1.0) == 2 and pg.get_active_ranks(world()).tolist() == [1, 0, 1]
    _finish(ctx, 0, 2)


def test_a_rank_that_is_lost_before_it_is_activated_is_dropped():
    run(_dropped, 3, dies=[1])


def _refused(ctx: Ctx) -> None:
    if ctx.rank < 2:
        pg.set_fault_reconciliation_window_us(300_000)
        init(ctx, pg.MooncakeBackendOptions(3), 2)
        for ranks, reason in (
            ([2], r"no process is ready in slots \[2\] after 0.3 s"),
            ([3], r"slots \[3\] do not exist; this group has slots 0 to 2"),
            ([], "no ranks were given"),
        ):
            answer = pg.activate_ranks(world(), ranks)
            assert answer.status is pg.ProposalStatus.Rejected and answer.dropped_ranks == []
            assert re.search(reason, answer.reject_reason), answer
        answer = pg.deactivate_ranks(world(), [0, 1])
        assert answer.status is pg.ProposalStatus.Rejected and "would have no rank" in answer.reject_reason
        assert answer.new_epoch == pg.get_current_epoch(world())
    else:
        ctx.store.wait(["go"])
        init(ctx, pg.MooncakeBackendOptions(3, True), 3, rank=1)
        with pytest.raises(JoinRefused, match="slot 1 is taken by a live rank"):
            pg.join_group(world())
        assert total(1.0) == 1 and pg.get_active_ranks(world()).tolist() == [0, 1, 0], "it is alone, as before"
    if ctx.rank == 0:
        ctx.store.set("go", "1")
    if ctx.rank < 2:
        ctx.store.wait(["end/2"])
    _finish(ctx, 0, 1, 2)


def test_what_cannot_be_is_rejected_with_the_reason():
    run(_refused, 3)
