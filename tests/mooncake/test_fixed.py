"""A group of a fixed size by Mooncake's names."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pg_ranks import init, total, world
from ranks import Ctx, run_ranks

from moe_a2a import ConfigError
from moe_a2a.compat.mooncake import pg


def _collectives(ctx: Ctx) -> None:
    pg.set_collective_timeout_us(20_000_000)
    pg.set_p2p_timeout_us(20_000_000)
    init(ctx, None, ctx.world)
    with pytest.raises(ConfigError, match="set_p2p_timeout_us comes before init_process_group"):
        pg.set_p2p_timeout_us(1)
    rank, size = ctx.rank, ctx.world
    assert dist.get_world_size() == size and dist.get_backend() == "mooncake-cpu"
    assert pg.get_active_ranks(world()).tolist() == [1] * size
    assert pg.get_num_synced_ranks(world()) == size and pg.get_peer_state(world(), [0, size - 1]) == [True, True]

    assert total(2.0**rank) == 2.0**size - 1
    for op, expected in ((dist.ReduceOp.MIN, 1.0), (dist.ReduceOp.MAX, float(size)), (dist.ReduceOp.PRODUCT, 6.0)):
        x = torch.tensor([rank + 1.0])
        dist.all_reduce(x, op)
        assert x.item() == expected
    x = torch.tensor([rank])
    dist.broadcast(x, 1)
    assert x.item() == 1
    parts = [torch.zeros(2, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(parts, torch.tensor([rank, 7]))
    assert torch.stack(parts).tolist() == [[r, 7] for r in range(size)]
    whole = torch.zeros(size, dtype=torch.int64)
    dist.all_gather_into_tensor(whole, torch.tensor([rank]))
    assert whole.tolist() == list(range(size))
    mine = torch.zeros(1)
    dist.reduce_scatter_tensor(mine, torch.arange(size, dtype=torch.float32))
    assert mine.item() == size * rank
    given, taken = list(torch.full((size, 1), rank)), list(torch.zeros(size, 1, dtype=torch.int64))
    dist.all_to_all(taken, given)
    assert torch.cat(taken).tolist() == list(range(size))
    got = list(torch.zeros(3, 2, dtype=torch.int64))
    sends = [dist.P2POp(dist.isend, torch.tensor([rank, i]), (rank + 1) % size) for i in range(3)]
    for work in dist.batch_isend_irecv(sends + [dist.P2POp(dist.irecv, into, (rank - 1) % size) for into in got]):
        work.wait()
        assert pg.get_local_success(work) and pg.get_failed_ranks_hint(work).tolist() == [0] * size
    assert torch.stack(got).tolist() == [[(rank - 1) % size, i] for i in range(3)]
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]
    said = ["a", rank] if rank == 0 else [None, None]
    dist.broadcast_object_list(said, 0)
    assert said == ["a", 0]
    dist.barrier()
    dist.destroy_process_group()
    init(ctx, pg.MooncakeBackendOptions(size), size)  # and once more in the same process
    assert total(1.0) == size
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("hosts", [1, 2])
def test_every_operation_runs(hosts):
    run_ranks(_collectives, 3, hosts=["a", "b", "a"] if hosts == 2 else 1, timeout=90)
