"""Calls that cannot work: an error before anything is sent, or one on all ranks that names who called what; the group
stays usable."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from collective_steps import kept
from elastic_steps import new_group
from ranks import Ctx, RankPool, host_labels

from moe_a2a import ConfigError, InputError
from moe_a2a.collectives import Options
from moe_a2a.collectives.options import MOST_SLOTS
from moe_a2a.collectives.signature import Kind, Reduction, Signature, describe


@pytest.fixture(scope="module", params=[1, 2], ids=["one-host", "two-hosts"])
def ranks(request):
    store = new_group().store
    with RankPool(host_labels(3, request.param)) as pool:
        yield lambda fn, *args: pool.call(functools.partial(fn, store=store), *args, timeout=90.0)


def still_works(ctx: Ctx) -> None:
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert bool((tensor == ctx.world).all())


def _locally(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    one = torch.ones(3)
    wrong = [
        (lambda: dist.all_reduce(torch.ones(3, device="meta")), "CPU tensors"),
        (lambda: dist.all_reduce(torch.eye(3).to_sparse()), "dense"),
        (lambda: dist.all_reduce(torch.ones(3).to(torch.float8_e5m2)), "cast"),
        (lambda: dist.all_reduce(torch.ones(3), op=dist.ReduceOp.BAND), "integers"),
        (lambda: dist.all_reduce(torch.ones(1).expand(4)), "expanded"),
        (lambda: dist.all_gather([one.clone()] * 2, one), "2 tensors for 3 ranks"),
        (lambda: dist.all_gather([torch.zeros(2)] * 3, one), "2 and 3 elements"),
        (lambda: dist.all_gather_into_tensor(torch.zeros(8), one), "give 9"),
        (lambda: dist.reduce_scatter(torch.zeros(2), [one] * 3), "3 and 2 elements"),
        (lambda: dist.all_to_all_single(torch.zeros(4), torch.zeros(4)), "4 rows of output for 3 ranks"),
        (lambda: dist.all_to_all_single(torch.zeros(3), torch.zeros(3), [1, 1, 1], [1, 1, 2]), "input_split_sizes"),
        (lambda: dist.all_to_all_single(torch.zeros(6), torch.zeros(3)), "6 elements and input 3"),
        (lambda: dist.group.WORLD.broadcast([one], _root(7)), "root=7"),
        (lambda: dist.group.WORLD.send([one], 3, 0), "dst=3"),
        (lambda: dist.isend(one, (ctx.rank + 1) % 3, tag=-1), "tag=-1"),
    ]
    for call, said in wrong:
        with pytest.raises(InputError, match=said):
            call()
    still_works(ctx)


def _root(rank: int) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = rank
    return options


def test_arguments_are_checked_before_anything_is_sent(ranks):
    ranks(_locally)


def _apart(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    odd = ctx.rank == 1
    differences = [
        (lambda: dist.all_reduce(torch.ones(4 if odd else 5)), "all_reduce(sum) of 4 float32", "of 5 float32"),
        (lambda: dist.all_reduce(torch.ones(4).to(torch.int32 if odd else torch.int64)), "4 int32", "4 int64"),
        (lambda: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX if odd else dist.ReduceOp.MIN), "(max)", "(min)"),
        (lambda: dist.broadcast(torch.ones(4), src=1 if odd else 0), "root 1", "root 0"),
        (lambda: dist.barrier() if odd else dist.all_reduce(torch.ones(200000)), "barrier", "all_reduce"),
    ]
    for call, odd_one, others in differences:
        with pytest.raises(InputError, match="ranks call different things") as raised:
            call()
        text = str(raised.value)
        assert odd_one in text and others in text and "rank 1" in text
        still_works(ctx)
    rows, takes = ([2, 0, 1], [1, 0, 1]) if odd else ([1, 1, 1], [1, 1, 1])
    with pytest.raises(InputError, match="rank 1 sends 2 rows to rank 0, which expects 1"):
        dist.all_to_all_single(torch.zeros(sum(takes), 4), torch.zeros(3, 4), takes, rows)
    still_works(ctx)


def test_ranks_that_call_different_things_all_hear_of_it(ranks):
    ranks(_apart)


def _destroyed(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    group = dist.new_group()
    work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
    work.wait()
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="destroyed"):
        group.allreduce([torch.ones(3)])
    still_works(ctx)


def test_a_group_that_was_destroyed_says_so(ranks):
    ranks(_destroyed)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"slots": 0}, "slots=0"),
        ({"slots": MOST_SLOTS + 1}, f"1 to {MOST_SLOTS}"),
        ({"on_failure": "hope"}, "reconcile, deferred, framework"),
        ({"collective_timeout_s": 0.0}, "collective_timeout_s"),
        ({"reconcile_s": -1.0}, "reconcile_s"),
        ({"chunk_bytes": 5000}, "multiples of 4096"),
        ({"store": "http://x:1"}, "tcp://HOST:PORT"),
    ],
)
def test_options_are_checked(given, said):
    with pytest.raises(ConfigError, match=said):
        Options(**given)


def _other_options(ctx: Ctx) -> None:
    given = Options(chunk_bytes=4096 * (1 + ctx.rank), host=ctx.host)
    with pytest.raises(ConfigError, match="chunk_bytes"):
        dist.init_process_group("moe_a2a", store=ctx.store, rank=ctx.rank, world_size=ctx.world, pg_options=given)
    with pytest.raises(ConfigError, match="pg_options is a dict"):
        dist.init_process_group("moe_a2a", store=ctx.store, rank=ctx.rank, world_size=ctx.world, pg_options={})


def test_ranks_with_other_options_are_refused_on_all_ranks():
    from ranks import run_ranks

    run_ranks(_other_options, 2)


def test_whatever_another_rank_sent_can_be_described():
    given = Signature(Kind.REDUCE, 3, torch.bfloat16, Reduction.AVG, root=2)
    assert str(given) == "reduce(avg) of 3 bfloat16, root 2"
    for word in (0, (1 << 64) - 1, 77 << 56, 0x01EE05F0 << 32):
        assert describe((word, (1 << 64) - 1))


@pytest.mark.parametrize("order", ["torch.distributed, moe_a2a", "moe_a2a, torch.distributed"])
def test_the_backend_is_registered_in_either_order_of_imports(order):
    program = f"import {order}\nassert torch.distributed.Backend('moe_a2a') == 'moe_a2a'\n"
    program += "assert 'moe_a2a' in torch.distributed.Backend.backend_list\n"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_importing_the_package_imports_no_torch():
    program = "import sys, moe_a2a\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
