"""`active_ranks` of a group of CPU tensors, kept on a GPU."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import Ctx, run_ranks

from moe_a2a.compat.mooncake import pg

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def _lose(ctx: Ctx) -> None:
    """It is written in place before the operation that failed ends, also while this process captures a graph."""
    active = torch.full((4,), 7, dtype=torch.int32, device="cuda")
    dist.init_process_group(
        "mooncake-cpu",
        store=dist.PrefixStore("torch", ctx.store),
        rank=ctx.rank,
        world_size=3,
        timeout=timedelta(seconds=30),
        pg_options=pg.MooncakeBackendOptions(active, False, 3),
    )
    assert pg.get_active_ranks(dist.group.WORLD) is active and active.tolist() == [1, 1, 1, 7]
    dist.barrier()
    x = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    if ctx.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with torch.cuda.graph(graph):
        y = x + 1
        time.sleep(1.0)  # the view changes meanwhile
    graph.replay()
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert work is not None
    work.wait()
    assert active.tolist() == [0, 1, 1, 7] and y.tolist() == [1.0] * 8
    ctx.store.set(f"end/{ctx.rank}", "1")
    ctx.store.wait(["end/1", "end/2"])
    dist.destroy_process_group()


def test_active_ranks_may_live_on_a_gpu():
    run_ranks(_lose, 3, dies=[0], timeout=120)
