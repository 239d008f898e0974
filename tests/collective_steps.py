"""Process groups of backend moe_a2a for tests, and inputs of every rank that every rank can make by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ctx

from moe_a2a.collectives import Options, ProcessGroupMoeA2A

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Small, so that ordinary tensors take several rounds.
CHUNK = 16384


def init(ctx: Ctx, store: str = "", **options: Any) -> ProcessGroupMoeA2A:
    """The default group of all ranks of a test."""
    options.setdefault("collective_timeout_s", ctx.timeout_s)
    options.setdefault("chunk_bytes", CHUNK)
    given = Options(store=store, host=ctx.host, **options)
    dist.init_process_group(
        "moe_a2a", store=dist.PrefixStore("group", ctx.store), rank=ctx.rank, world_size=ctx.world, pg_options=given
    )
    group = dist.group.WORLD
    assert isinstance(group, ProcessGroupMoeA2A)
    return group


def kept(ctx: Ctx, store: str) -> ProcessGroupMoeA2A:
    """The default group of ranks that stay from test to test (RankPool)."""
    if not dist.is_initialized():
        return init(ctx, store)
    group = dist.group.WORLD
    assert isinstance(group, ProcessGroupMoeA2A)
    return group


@contextlib.contextmanager
def group_of(ctx: Ctx, store: str = "", **options: Any) -> Iterator[ProcessGroupMoeA2A]:
    yield init(ctx, store, **options)
    dist.destroy_process_group()


def made(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rank `rank`'s input. Small values: sums and products of a few ranks are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + rank + 7)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(1, 4, shape, generator=generator).to(dtype)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory with gaps."""
    wide = torch.zeros((*tensor.shape, 3), dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide[..., 1]
