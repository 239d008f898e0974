"""Every collective against plain torch on inputs that each rank makes for all ranks: no communication is needed to know
what must come out."""

from __future__ import annotations

import functools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from collective_steps import CHUNK, FLOATS, INTEGERS, kept, made, strided
from elastic_steps import new_group
from ranks import Ctx, RankPool, host_labels

WORLDS = [(3, 1), (4, 2)]
#: Nothing, one, some that do not divide by anything, several rounds.
SHAPES = [(0,), (), (5, 3), (3 * CHUNK // 4 + 1,)]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]}-ranks-{world[1]}-hosts")
def ranks(request):
    store = new_group().store
    with RankPool(host_labels(*request.param)) as pool:
        yield lambda fn, *args: pool.call(functools.partial(fn, store=store), *args, timeout=90.0)


def inputs(ctx: Ctx, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    return [made(rank, shape, dtype, seed) for rank in range(ctx.world)]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def reduced(op: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """What a reduction must give: calculated in int64 or fp64, where all of it is exact."""
    dtype = parts[0].dtype
    whole = torch.stack([part.double() if dtype.is_floating_point else part.long() for part in parts])
    if op == "avg":
        mean = whole.sum(0) / len(parts)
        return (mean if dtype.is_floating_point else mean.trunc()).to(dtype)
    if op in ("sum", "product"):
        return (whole.sum(0) if op == "sum" else whole.prod(0)).to(dtype)
    return (whole.amin(0) if op == "min" else whole.amax(0)).to(dtype)


OPS = {op: getattr(dist.ReduceOp, op.upper()) for op in ("sum", "avg", "product", "min", "max")}


def _reductions(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    for dtype in (*INTEGERS, *FLOATS, torch.bool):
        for op, torch_op in OPS.items():
            if dtype == torch.bool and op == "avg":
                continue
            for shape in SHAPES:
                if dtype not in (torch.float32, torch.bfloat16, torch.int64) and shape == SHAPES[-1]:
                    continue
                parts = inputs(ctx, shape, dtype)
                tensor = parts[ctx.rank].clone()
                dist.all_reduce(tensor, op=torch_op)
                torch.testing.assert_close(tensor, reduced(op, parts), rtol=0, atol=0, msg=f"{dtype} {op} {shape}")
    for op, python in ((dist.ReduceOp.BAND, torch.bitwise_and), (dist.ReduceOp.BXOR, torch.bitwise_xor)):
        parts = inputs(ctx, (9,), torch.int32)
        tensor = parts[ctx.rank].clone()
        dist.all_reduce(tensor, op=op)
        assert torch.equal(tensor, functools.reduce(python, parts))


def test_all_reduce(ranks):
    ranks(_reductions)


def _same_bits(ctx: Ctx, store: str) -> list[bytes]:
    kept(ctx, store)
    said = []
    for count in (100, 3 * CHUNK):
        tensor = torch.randn(count, generator=torch.Generator().manual_seed(ctx.rank))
        dist.all_reduce(tensor)
        said.append(bytes(tensor.view(torch.uint8).numpy().tobytes()))
    return said


def test_sums_are_the_same_bits_on_all_ranks(ranks):
    results = ranks(_same_bits)
    assert all(result == results[0] for result in results)


def _rooted(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    for root in range(ctx.world):
        for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
            for shape in SHAPES:
                parts = inputs(ctx, shape, dtype, root)
                mine = parts[ctx.rank].clone()
                dist.broadcast(mine, src=root)
                assert torch.equal(mine, parts[root])

                mine = parts[ctx.rank].clone()
                dist.reduce(mine, dst=root, op=dist.ReduceOp.MAX)
                assert torch.equal(mine, reduced("max", parts) if ctx.rank == root else parts[ctx.rank])

                pieces = [torch.zeros(shape, dtype=dtype) for _ in parts] if ctx.rank == root else None
                dist.gather(parts[ctx.rank], pieces, dst=root)
                assert pieces is None or all(map(torch.equal, pieces, parts))

                out = torch.zeros(shape, dtype=dtype)
                dist.scatter(out, parts if ctx.rank == root else None, src=root)
                assert torch.equal(out, parts[ctx.rank])


def test_broadcast_reduce_gather_and_scatter(ranks):
    ranks(_rooted)


def _gathered(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    for dtype in (torch.float32, torch.float16, torch.uint8, torch.complex64, torch.float8_e4m3fn):
        for shape in SHAPES:
            parts = inputs(ctx, shape, dtype)
            pieces = [torch.zeros(shape, dtype=dtype) for _ in parts]
            dist.all_gather(pieces, parts[ctx.rank])
            assert all(map(torch.equal, map(raw, pieces), map(raw, parts)))
            if shape and not dtype.is_complex:
                whole = torch.zeros((ctx.world * shape[0], *shape[1:]), dtype=dtype)
                dist.all_gather_into_tensor(whole, parts[ctx.rank])
                assert torch.equal(whole.view(torch.uint8), torch.cat([p.view(torch.uint8) for p in parts]))
    for op, torch_op in OPS.items():
        for shape in ((0,), (5, 3), (CHUNK,)):
            parts = [inputs(ctx, shape, torch.float32, seed) for seed in range(ctx.world)]  # [to][from]
            expected = reduced(op, parts[ctx.rank])
            out = torch.zeros(shape)
            dist.reduce_scatter(out, [parts[to][ctx.rank] for to in range(ctx.world)], op=torch_op)
            assert torch.equal(out, expected)
            out.zero_()
            dist.reduce_scatter_tensor(out, torch.cat([parts[to][ctx.rank] for to in range(ctx.world)]), op=torch_op)
            assert torch.equal(out, expected)


def test_all_gather_and_reduce_scatter(ranks):
    ranks(_gathered)


def _exchanged(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    everyone = range(ctx.world)
    for width in (1, 7, CHUNK // 8):
        sent = [[made(to, (2, width), torch.float32, source) for to in everyone] for source in everyone]
        out = torch.zeros(2 * ctx.world, width)
        dist.all_to_all_single(out, torch.cat(sent[ctx.rank]))
        assert torch.equal(out, torch.cat([sent[source][ctx.rank] for source in everyone]))

        rows = [[(3 * source + to) % 4 for to in everyone] for source in everyone]
        uneven = [
            [made(to, (rows[source][to], width), torch.float32, source) for to in everyone] for source in everyone
        ]
        takes = [rows[source][ctx.rank] for source in everyone]
        out = torch.zeros(sum(takes), width)
        dist.all_to_all_single(out, torch.cat(uneven[ctx.rank]), takes, rows[ctx.rank])
        assert torch.equal(out, torch.cat([uneven[source][ctx.rank] for source in everyone]))

        pieces = [torch.zeros(count, width) for count in takes]
        dist.all_to_all(pieces, uneven[ctx.rank])
        assert all(torch.equal(piece, uneven[source][ctx.rank]) for source, piece in enumerate(pieces))


def test_all_to_all(ranks):
    ranks(_exchanged)


def _gaps(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    parts = inputs(ctx, (6, 4), torch.float32)
    total = reduced("sum", parts)
    tensor = strided(parts[ctx.rank])
    dist.all_reduce(tensor)
    assert not tensor.is_contiguous() and torch.equal(tensor, total)
    pieces = [strided(torch.zeros(6, 4)) for _ in parts]
    dist.all_gather(pieces, strided(parts[ctx.rank]))
    assert all(map(torch.equal, pieces, parts))
    tensor = parts[ctx.rank].clone().t()
    dist.broadcast(tensor, src=1)
    assert torch.equal(tensor, parts[1].t())
    out = strided(torch.zeros(6, 4))
    dist.reduce_scatter(out, [strided(parts[ctx.rank])] * ctx.world)
    assert torch.equal(out, total)
    out = strided(torch.zeros(ctx.world, 4))
    dist.all_to_all_single(out, strided(parts[ctx.rank][: ctx.world]))
    assert torch.equal(out, torch.stack([part[ctx.rank] for part in parts]))


def test_tensors_with_gaps(ranks):
    ranks(_gaps)


def _later(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    tensors = [torch.full((size,), float(ctx.rank + size)) for size in (1, 100, CHUNK, 3, 2 * CHUNK)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    total = sum(range(ctx.world))
    future = works[2].get_future()
    assert torch.equal(future.wait()[0], tensors[2])
    for work in reversed(works):
        assert work.wait() and work.is_completed() and work.is_success() and work.exception() is None
    for tensor in tensors:
        assert bool((tensor == total + ctx.world * len(tensor)).all())
    done = []
    barrier = dist.barrier(async_op=True)
    barrier.get_future().then(lambda _: done.append(1))
    barrier.wait(timedelta(seconds=30))
    assert done == [1]


def test_async_operations_end_in_any_order_of_waiting(ranks):
    ranks(_later)


def _chained(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    tensor, more = torch.ones(4), []
    work = dist.all_reduce(tensor, async_op=True)
    chained = work.get_future().then(lambda _: more.append(dist.all_reduce(tensor, async_op=True)))
    chained.wait()
    more[0].wait()
    assert bool((tensor == ctx.world**2).all())


def test_what_is_called_at_the_end_may_begin_the_next(ranks):
    ranks(_chained)


def _alone_in_the_background(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    tensor = torch.ones(2 * CHUNK)
    work = dist.all_reduce(tensor, async_op=True)
    while not work.is_completed():  # nobody waits: a thread sees to it
        pass
    assert bool((tensor == ctx.world).all())


def test_an_async_operation_needs_nobody_to_wait_for_it(ranks):
    ranks(_alone_in_the_background)


def _objects(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    found = [None] * ctx.world
    dist.all_gather_object(found, {"rank": ctx.rank, "pad": "x" * (100 * ctx.rank)})
    assert [item["rank"] for item in found] == list(range(ctx.world))
    said = [("from", ctx.rank)]
    dist.broadcast_object_list(said, src=1)
    assert said == [("from", 1)]
    gathered = [None] * ctx.world if ctx.rank == 0 else None
    dist.gather_object(ctx.rank, gathered, dst=0)
    assert gathered in (None, list(range(ctx.world)))
    out = [None]
    dist.scatter_object_list(out, [f"to {r}" for r in range(ctx.world)], src=0)
    assert out == [f"to {ctx.rank}"]
    if ctx.rank == 0:
        dist.send_object_list(["a", 1], dst=1)
    if ctx.rank == 1:
        received = [None, None]
        dist.recv_object_list(received, src=0)
        assert received == ["a", 1]


def test_object_collectives(ranks):
    ranks(_objects)


def _coalesced(ctx: Ctx, store: str) -> None:
    group = kept(ctx, store)
    tensors = [torch.full((size,), float(ctx.rank)) for size in (3, CHUNK)]
    with dist._coalescing_manager(group=group, async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    assert all(bool((tensor == sum(range(ctx.world))).all()) for tensor in tensors)
    outs = [torch.zeros(ctx.world * 2), torch.zeros(ctx.world * 5)]
    with dist._coalescing_manager(group=group, async_ops=True) as manager:
        for out in outs:
            dist.all_gather_into_tensor(out, torch.full((len(out) // ctx.world,), float(ctx.rank)))
    manager.wait()
    for out in outs:
        assert torch.equal(out, torch.arange(ctx.world).repeat_interleave(len(out) // ctx.world).float())


def test_coalesced_collectives(ranks):
    ranks(_coalesced)


def _functional(ctx: Ctx, store: str) -> None:
    import torch.distributed._functional_collectives as functional

    group = kept(ctx, store)
    out = functional.all_reduce(torch.ones(4), "sum", group)
    assert bool((out + 0 == ctx.world).all())
    out = functional.all_gather_tensor(torch.full((2,), float(ctx.rank)), 0, group)
    assert torch.equal(out + 0, torch.arange(ctx.world).repeat_interleave(2).float())


def test_functional_collectives(ranks):
    ranks(_functional)


def _parts(ctx: Ctx, store: str) -> None:
    kept(ctx, store)
    members = [ctx.world - 1, 0]
    some = dist.new_group(sorted(members))
    everyone = dist.new_group()
    if ctx.rank in members:
        assert dist.get_world_size(some) == 2 and dist.get_rank(some) == sorted(members).index(ctx.rank)
        tensor = torch.tensor([float(ctx.rank)])
        dist.all_reduce(tensor, group=some)
        assert tensor.item() == sum(members)
        dist.broadcast(tensor, src=ctx.world - 1, group=some)
        dist.destroy_process_group(some)
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=everyone)
    assert tensor.item() == ctx.world
    dist.destroy_process_group(everyone)


def test_subgroups(ranks):
    ranks(_parts)
