"""Runs a function on CPU ranks that have SGLang: `ranks.run_ranks`, whose server process has imported SGLang already,
with a gloo group in place of SGLang's TP group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import ranks
import sglang_env  # noqa: F401  first: what a rank is given to do imports SGLang
import torch
import torch.distributed as dist
from ranks import Ctx, run_ranks

_PRELOAD = ["torch", "torch.distributed", "moe_a2a", "ranks", "sglang_steps", "sglang_ranks"]


def on_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0, dies: Any = ()) -> list[Any]:
    """Run `fn(ctx, *args)` on so many ranks, in inference mode as SGLang runs models. Returns results in rank order."""
    # These take effect if this is the first test that starts ranks; otherwise each rank imports SGLang by itself, which
    # takes seconds. The server looks for modules where PYTHONPATH says, and not where this process does.
    ranks._server.set_forkserver_preload(_PRELOAD)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        return run_ranks(_in_group, world, fn, args, timeout=timeout, dies=dies)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _in_group(ctx: Ctx, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from moe_a2a.sglang_plugin import buffers

    store = dist.PrefixStore("group", ctx.store)
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=ctx.world)
    buffers.TIMEOUT_S = ctx.timeout_s
    with torch.inference_mode():
        result = fn(ctx, *args)
    ctx.barrier("done")
    buffers.close_all()
    dist.destroy_process_group()
    return result
