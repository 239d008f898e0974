"""Messages between ranks: they arrive whole, and in the order of their pair."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from collective_steps import CHUNK, kept, made, strided
from elastic_steps import new_group
from ranks import Ctx, RankPool, host_labels

from moe_a2a import InputError


@pytest.fixture(scope="module", params=[(3, 1), (4, 2)], ids=["one-host", "two-hosts"])
def ranks(request):
    store = new_group().store
    with RankPool(host_labels(*request.param)) as pool:
        yield lambda fn, *args: pool.call(functools.partial(fn, store=store), *args, timeout=90.0)


def _ring(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    after, before = (ctx.rank + 1) % ctx.world, (ctx.rank - 1) % ctx.world
    for shape in ((0,), (), (7, 3), (5 * CHUNK + 1,)):
        for dtype in (torch.float32, torch.bfloat16, torch.bool):
            got = torch.zeros(shape, dtype=dtype)
            work = dist.isend(made(ctx.rank, shape, dtype), after)
            dist.recv(got, before)
            work.wait()
            assert torch.equal(got, made(before, shape, dtype))
    got = strided(torch.zeros(4, 2))
    work = dist.isend(made(ctx.rank, (4, 2), torch.float32).t().contiguous().t(), after)
    dist.recv(got, before)
    work.wait()
    assert torch.equal(got, made(before, (4, 2), torch.float32))


def test_a_ring(ranks):
    ranks(_ring)


def _in_order(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    sizes = [1, CHUNK, 3, 0, 2 * CHUNK, 5]
    ops = []
    inbox = {}
    for other in range(ctx.world):
        for i, size in enumerate(sizes):
            if other == ctx.rank:
                continue
            ops.append(dist.P2POp(dist.isend, torch.full((size,), float(100 * ctx.rank + i)), other))
            inbox[other, i] = torch.zeros(size)
            ops.append(dist.P2POp(dist.irecv, inbox[other, i], other))
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    for (other, i), tensor in inbox.items():
        assert bool((tensor == 100 * other + i).all())


def test_messages_of_a_pair_are_in_order_and_pairs_do_not_wait_for_each_other(ranks):
    ranks(_in_order)


def _anyone(ctx: Ctx, store: str) -> list[int]:
    kept(ctx, store)
    heard = []
    if ctx.rank == 0:
        for _ in range(ctx.world - 1):
            tensor = torch.zeros(2)
            source = dist.recv(tensor)
            assert bool((tensor == source).all())
            heard.append(source)
    else:
        dist.send(torch.full((2,), float(ctx.rank)), 0)
    return heard


def test_from_any_source(ranks):
    heard = ranks(_anyone)[0]
    assert sorted(heard) == list(range(1, len(heard) + 1))


def _mistaken(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    if ctx.rank == 0:
        dist.send(torch.ones(3), 1)
        dist.send(torch.ones(4), 1, tag=5)
        dist.send(torch.full((2,), 9.0), 1)
    if ctx.rank == 1:
        with pytest.raises(InputError, match=r"rank 0 sent 12 bytes of float32 .* 16 bytes"):
            dist.recv(torch.zeros(4), 0)
        with pytest.raises(InputError, match="tag 5"):
            dist.recv(torch.zeros(4), 0, tag=4)
        tensor = torch.zeros(2)
        dist.recv(tensor, 0)
        assert bool((tensor == 9).all())


def test_a_receive_that_does_not_fit_says_what_came_and_the_next_one_is_right(ranks):
    ranks(_mistaken)


def _with_collectives(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    other = (ctx.rank + 1) % ctx.world
    big = torch.full((6 * CHUNK,), float(ctx.rank))
    work = dist.isend(big, other)  # cannot end before it is received
    tensor = torch.ones(CHUNK)
    dist.all_reduce(tensor)
    got = torch.zeros(6 * CHUNK)
    dist.recv(got, (ctx.rank - 1) % ctx.world)
    work.wait()
    assert bool((got == (ctx.rank - 1) % ctx.world).all()) and bool((tensor == ctx.world).all())


def test_messages_and_collectives_do_not_wait_for_each_other(ranks):
    ranks(_with_collectives)
