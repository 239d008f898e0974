"""What tests of the drop-in share: a process comes to a group by Mooncake's names, and waits for what it is told."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ctx, run_ranks

from moe_a2a.compat.mooncake import pg
from moe_a2a.membership import open_store, start_store
from moe_a2a.membership.store import Store

PATIENCE_S = 20.0


@functools.cache
def _store() -> Store:
    """It ends soon after its last user, of whom this process is one."""
    client = open_store(start_store(idle_s=10), "tests")
    client.get()
    return client


def run(fn: Callable[..., Any], world: int, *args: Any, **more: Any) -> list[Any]:
    """As `run_ranks`; all tests have one membership store, so that none has to wait until one has started."""
    return run_ranks(_run, world, _store().url, fn, *args, timeout=60, **more)


def _run(ctx: Ctx, url: str, fn: Callable[..., Any], *args: Any) -> Any:
    os.environ["MOE_A2A_STORE"] = url
    return fn(ctx, *args)


def init(ctx: Ctx, options: pg.MooncakeBackendOptions | None, size: int, **more: Any) -> None:
    os.environ["MOE_A2A_HOST"] = ctx.host
    dist.init_process_group(
        "mooncake-cpu",
        store=dist.PrefixStore("torch", ctx.store),
        rank=more.pop("rank", ctx.rank),
        world_size=size,
        timeout=timedelta(seconds=PATIENCE_S),
        pg_options=options,
        **more,
    )


def world() -> Any:
    return dist.group.WORLD


def total(value: float, group: Any = None) -> float:
    """A sum over the ranks of a group, which must be right."""
    tensor = torch.full((5,), value)
    work = dist.all_reduce(tensor, group=group, async_op=True)
    work.wait()
    assert pg.get_local_success(work), work.exception()
    assert (tensor == tensor[0]).all()
    return float(tensor[0])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
