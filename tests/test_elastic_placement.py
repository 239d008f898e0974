"""Redundant experts: with two replicas of every expert on different ranks, a lost rank takes no expert along."""

from __future__ import annotations

import os
import signal

import torch
from elastic_steps import CASE, Where, elastic_a2a, new_group
from ranks import Ctx, run_ranks

from moe_a2a import placement

LOGICAL, PHYSICAL, RANKS = 24, 48, 4
FATAL_STEP = 6


def _expert(logical: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * (1 + logical % 3)


def _serve(ctx: Ctx, where: Where, victim: int) -> tuple[int, int]:
    """Returns how many steps lost tokens before the view changed, and how many were made after that."""
    load = torch.ones(1, LOGICAL)
    physical_to_logical = placement.balance(load, PHYSICAL, RANKS)[0]
    chance = torch.Generator().manual_seed(ctx.rank)
    weights = torch.full((8, 2), 0.5)
    lost_steps = good = 0
    with elastic_a2a(ctx, where, RANKS, case=CASE.replace(top_k=2)) as a2a:
        first = ctx.rank * a2a.local_experts
        number, last = 0, 1000
        while number < last:
            number += 1
            if ctx.rank == victim and number == FATAL_STEP:
                os.kill(os.getpid(), signal.SIGKILL)
            if last == 1000 and ctx.store.check(["enough"]):
                last = int(ctx.store.get("enough"))
            logical = torch.stack([torch.randperm(LOGICAL, generator=chance)[:2] for _ in range(8)])
            x = torch.randint(-4, 5, (8, CASE.hidden), generator=chance).to(CASE.dtype)
            active = torch.tensor(a2a.elastic.active)
            replicas, counts = placement.routable(physical_to_logical, LOGICAL, active)
            assert not placement.lost_experts(counts).numel()
            ids, lost = placement.route(logical, replicas, counts, ctx.rank * CASE.max_tokens)
            assert not lost.any()
            got = a2a.dispatch(x, ids, weights, layout="grouped")
            y = torch.zeros(got.x.shape, dtype=CASE.dtype)
            real = got.expert_ids >= 0
            y[real] = _expert(physical_to_logical[first + got.expert_ids[real].long()][:, None], got.x[real])
            out = a2a.combine(y, got.handle)
            missed = a2a.elastic.lost(got.handle)
            if not missed.tokens:
                want = sum(0.5 * _expert(logical[:, k, None], x).float() for k in range(2))
                assert torch.equal(out, want.to(CASE.dtype))
            if active.all():
                lost_steps += missed.tokens > 0
            else:
                assert not missed.tokens and not a2a.missing(got.handle)
                good += 1
                if last == 1000 and good == 5:
                    last = int(ctx.store.compare_set("enough", "", str(number + 5)))
    return lost_steps, good


def test_routing_avoids_the_replicas_of_a_lost_rank_as_soon_as_the_view_tells():
    results = run_ranks(_serve, RANKS, new_group(), 2, dies=[2])
    assert any(result[0] for result in results if result)
