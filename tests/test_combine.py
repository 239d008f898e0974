"""Combine against the oracle and by hand: what is summed, in which precision, and where it goes."""

from __future__ import annotations

import pytest
import torch
from ranks import Ctx, run_ranks
from steps import (
    DTYPES,
    TOPOLOGIES,
    Case,
    check_sum,
    combine_weights,
    dispatch_args,
    expert_output,
    run_cases,
    world_of,
)

#: The first whole number whose successor the dtype cannot hold.
LARGE = {torch.bfloat16: 2.0**8, torch.float16: 2.0**11, torch.float32: 2.0**24}


@pytest.mark.parametrize("labels", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_sums_are_within_the_tolerance_of_their_dtype(labels):
    ranks = len(labels)
    cases = [
        Case(
            experts=8 * ranks,
            top_k=8,
            dtype=dtype,
            exact=False,
            weights_at=at,
            seed=seed,
            layouts=("masked", "grouped"),
        )
        for dtype in DTYPES
        for seed, at in enumerate(("dispatch", "combine"))
    ]
    run_ranks(run_cases, ranks, cases, hosts=labels)


@pytest.mark.parametrize("labels", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_whole_numbers_are_summed_exactly_in_every_dtype(labels):
    ranks = len(labels)
    cases = [Case(experts=8 * ranks, top_k=8, dtype=dtype, routing="zipf", hidden=128) for dtype in DTYPES]
    run_ranks(run_cases, ranks, cases, hosts=labels)


def _by_hand(ctx: Ctx, dtype: torch.dtype, weights: list[float], ids: list[int], at: str) -> float:
    """What rank `ctx.rank` gets for a token with these experts and weights if every expert returns ones. 8 experts."""
    case = Case(experts=8, hidden=128, top_k=len(ids), dtype=dtype, max_tokens=2)
    x, late = torch.zeros(1, 128, dtype=dtype), torch.tensor([weights])
    with ctx.a2a(case.config()) as a2a:
        got = a2a.dispatch(x, torch.tensor([ids]), late if at == "dispatch" else None)
        out = a2a.combine(torch.ones_like(got.x), got.handle, late if at == "combine" else None)
        assert (out == out[0, 0]).all() and out.shape == (1, 128)
        return float(out[0, 0])


def by_hand(dtype, weights, ids, at="dispatch", world=4, hosts=1) -> list[float]:
    return run_ranks(_by_hand, world, dtype, weights, ids, at, hosts=hosts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", ["dispatch", "combine"])
def test_a_rank_sums_its_experts_before_it_rounds(dtype, at):
    large = LARGE[dtype]
    # Experts 0 and 1 are on rank 0. Rounded one by one, or summed in the dtype, the small weight would be lost.
    assert by_hand(dtype, [large, 0.75, -large / 2, -large / 2], [0, 1, 4, 6], at) == [0.0] * 4
    if dtype != torch.float32:
        assert by_hand(dtype, [large, 0.75, -large], [0, 1, 2], at, world=1) == [0.75]
        assert by_hand(dtype, [large, 0.75, 0.75], [0, 1, 2], at, world=1) == [large + 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_rounded_once_per_rank_and_a_remote_hosts_once_more(dtype):
    large = LARGE[dtype]
    weights, ids = [large, 0.75, -large], [0, 2, 4]  # on ranks 0, 1 and 2
    in_fp32 = 0.75 if dtype != torch.float32 else 0.0
    assert by_hand(dtype, weights, ids) == [in_fp32] * 4
    # Two hosts: the sum of ranks 0 and 1 is rounded where it crosses, so for ranks 2 and 3 only.
    assert by_hand(dtype, weights, ids, hosts=2) == [in_fp32, in_fp32, 0.0, 0.0]


def test_router_weights_keep_their_precision():
    """A weight is fp32; rounded to bf16 before it multiplies, it would be wrong in the third digit."""
    weight = 1.0 + 2.0**-8 + 2.0**-9  # bf16's neighbours are 1 and 1 + 2**-7
    for world in (1, 2):
        got = by_hand(torch.bfloat16, [64 * weight, -64.0], [0, 1], world=world)
        assert got == [64 * (2.0**-8 + 2.0**-9)] * world


@pytest.mark.parametrize("hosts", [1, 2])
def test_tokens_without_experts_give_zeros_and_given_storage_is_used(hosts):
    run_ranks(_zeros, 4, hosts=hosts)


def _zeros(ctx: Ctx) -> None:
    for dtype in DTYPES:
        case = Case(experts=8, hidden=128, dtype=dtype, tokens=(7, 0, 13, 1), padding=0.5)
        with ctx.a2a(case.config()) as a2a:
            for step, layout in enumerate(case.layouts * 2):
                world = world_of(case, ctx.world, step)
                args, keywords = dispatch_args(case, world, ctx.rank)
                got = a2a.dispatch(*args, layout=layout, **keywords)
                y = expert_output(case, world, ctx.rank, got)
                out = torch.full((len(args[0]), 128), torch.nan, dtype=dtype)
                if step % 2:
                    result = a2a.combine(y, got.handle, out=out)
                else:
                    a2a.combine_send(y, got.handle)
                    result = a2a.combine_recv(got.handle, out=out)
                assert result.data_ptr() == out.data_ptr()
                check_sum(case, world, ctx.rank, a2a.hosts, out)
                none = (world.ids[ctx.rank] < 0).all(dim=1)
                assert not out[none].any() and not out.isnan().any()


def test_the_expert_output_may_be_changed_as_soon_as_it_was_sent():
    run_ranks(_reuse_y, 4, hosts=2)


def _reuse_y(ctx: Ctx) -> None:
    case = Case(experts=8, hidden=128, weights_at="combine", tokens=(13, 7))
    with ctx.a2a(case.config()) as a2a:
        for step in range(12):
            layout = case.layouts[step % 3]
            world = world_of(case, ctx.world, step)
            args, keywords = dispatch_args(case, world, ctx.rank)
            got = a2a.dispatch(*args, layout=layout, alignment=case.alignment, **keywords)
            y = expert_output(case, world, ctx.rank, got)
            weights = combine_weights(case, world, ctx.rank, got)
            a2a.combine_send(y, got.handle, weights)
            y.fill_(torch.nan)
            if weights is not None:
                weights.clone()
            check_sum(case, world, ctx.rank, a2a.hosts, a2a.combine_recv(got.handle))
