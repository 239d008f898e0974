"""Between hosts, groups move their bytes through the Transfer Engine that the program made."""

from __future__ import annotations

import torch.distributed as dist
from pg_ranks import init, run, total, world
from ranks import Ctx

from moe_a2a.compat.mooncake import pg
from moe_a2a.transport.engine import Engine, load


def _lent(ctx: Ctx) -> None:
    engine = load().TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    pg.set_transfer_engine(engine)
    pg.set_host_ip("127.0.0.1")
    init(ctx, None, 2)
    base = world()._group.base
    assert base.engine.name == f"127.0.0.1:{engine.get_rpc_port()}" and not Engine._shared
    assert total(2.0**ctx.rank) == 3
    dist.barrier()
    dist.destroy_process_group()


def test_a_given_engine_is_used_and_no_other_made():
    run(_lent, 2, hosts=2)
