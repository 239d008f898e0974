"""The three ways in which a group takes the loss of a rank."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pg_ranks import init, run, total, until, world
from ranks import Ctx

from moe_a2a import ExcludedFromView
from moe_a2a.compat.mooncake import pg

pytestmark = pytest.mark.alone


def _sum(value: float) -> tuple[float, Any]:
    tensor = torch.tensor([value])
    work = dist.all_reduce(tensor, async_op=True)
    work.wait()
    return tensor.item(), work


def _fail(ctx: Ctx, victim: int) -> Any:
    """The victim is gone; operations until one fails."""
    assert total(1.0) == ctx.world
    if ctx.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    _, work = _sum(1.0)
    assert not pg.get_local_success(work)
    assert pg.get_failed_ranks_hint(work).tolist() == [int(r == victim) for r in range(ctx.world)]
    assert pg.get_failed_ranks_hint(work).dtype == torch.int32
    return work


def _end(ctx: Ctx, victim: int) -> None:
    """All survivors leave together, so that none of them loses another one."""
    ctx.store.set(f"end/{ctx.rank}", "1")
    ctx.store.wait([f"end/{r}" for r in range(ctx.world) if r != victim])
    dist.destroy_process_group()


def _reconcile(ctx: Ctx, victim: int, given: bool) -> None:
    mirror = torch.full((ctx.world + 2,), 7, dtype=torch.int32)
    init(ctx, pg.MooncakeBackendOptions(mirror, False, ctx.world) if given else None, ctx.world)
    if given:
        assert pg.get_active_ranks(world()) is mirror and mirror.tolist() == [1] * ctx.world + [7, 7]
    epoch = pg.get_current_epoch(world())
    _fail(ctx, victim)
    left = [int(r != victim) for r in range(ctx.world)]
    seen = mirror.tolist()
    assert seen == ([*left, 7, 7] if given else [7] * 5), "it has completed in the new view"
    assert pg.get_active_ranks(world())[: ctx.world].tolist() == left
    assert pg.get_current_epoch(world()) > epoch
    assert pg.sync_after_failure(world()).status is pg.SyncAfterFailureStatus.NoPending
    assert total(1.0) == ctx.world - 1, "the next one runs among the survivors"
    assert dist.get_world_size() == max(r for r in range(ctx.world) if left[r]) + 1
    if given:
        assert mirror.tolist() == [*left, 7, 7]
    _end(ctx, victim)


@pytest.mark.parametrize("victim, given, hosts", [(0, True, "aaa"), (2, False, "aab")])
def test_the_failed_operation_waits_for_the_new_view(victim, given, hosts):
    """Rank 0 takes nothing along; the highest slot's loss makes the group smaller, another one's leaves a hole."""
    run(_reconcile, 3, victim, given, hosts=list(hosts), dies=[victim])


def _deferred(ctx: Ctx) -> None:
    init(ctx, pg.MooncakeBackendOptions(3, False, True, False), 3)
    assert pg.sync_after_failure(world()).status is pg.SyncAfterFailureStatus.NoPending
    _fail(ctx, 1)
    assert pg.get_active_ranks(world()).tolist() == [1, 1, 1], "nothing has changed here yet"
    assert not pg.get_local_success(_sum(1.0)[1]), "nor does it by waiting"
    answer = pg.sync_after_failure(world())
    assert answer.status is pg.SyncAfterFailureStatus.Reconciled and answer.reject_reason == ""
    assert pg.get_active_ranks(world()).tolist() == [1, 0, 1]
    ctx.store.set(f"synced/{ctx.rank}", "1")
    ctx.store.wait(["synced/0", "synced/2"])
    assert total(1.0) == 2
    _end(ctx, 1)


def test_a_deferred_failure_completes_at_once_and_is_synced_by_the_application():
    run(_deferred, 3, dies=[1])


def _framework(ctx: Ctx) -> None:
    init(ctx, pg.MooncakeBackendOptions(3, False, False, False), 3)
    _fail(ctx, 0)
    assert not pg.get_local_success(_sum(1.0)[1])
    assert pg.get_active_ranks(world()).tolist() == [1, 1, 1] and dist.get_world_size() == 3
    answer = pg.sync_after_failure(world())
    assert answer.status is pg.SyncAfterFailureStatus.Rejected and "deactivate_ranks" in answer.reject_reason
    ctx.store.set(f"failed/{ctx.rank}", "1")
    ctx.store.wait(["failed/1", "failed/2"])
    if ctx.rank == 2:
        answer = pg.deactivate_ranks(world(), [0])
        assert answer.status is pg.ProposalStatus.Applied and answer.new_epoch == pg.get_current_epoch(world())
        ctx.store.set("deactivated", "1")
    ctx.store.wait(["deactivated"])
    until(lambda: pg.get_active_ranks(world()).tolist() == [0, 1, 1])
    assert total(1.0) == 2
    _end(ctx, 0)


def test_with_framework_failures_nothing_changes_until_ranks_are_deactivated():
    run(_framework, 3, dies=[0])


def _stop(ctx: Ctx) -> None:
    """A rank that hangs is found by who waits for it, and finds itself outside when it goes on."""
    pg.set_collective_timeout_us(1_500_000)
    pg.set_p2p_timeout_us(1_500_000)
    init(ctx, None, 2)
    assert total(1.0) == 2
    if ctx.rank == 1:
        ctx.store.set("pid", str(os.getpid()))
        until(lambda: not pg.get_active_ranks(world())[1])
        with pytest.raises(ExcludedFromView, match="rank 1 is failed in the group's view"):
            _sum(1.0)
        ctx.store.set("outside", "1")
    else:
        pid = int(ctx.store.get("pid"))
        os.kill(pid, signal.SIGSTOP)
        _, work = _sum(1.0)
        os.kill(pid, signal.SIGCONT)
        assert not pg.get_local_success(work) and pg.get_failed_ranks_hint(work).tolist() == [0, 1]
        assert pg.get_active_ranks(world()).tolist() == [1, 0] and total(1.0) == 1
        ctx.store.wait(["outside"])
    dist.destroy_process_group()


def test_a_rank_that_hangs_is_left_out():
    run(_stop, 2)
