"""Ten thousand steps through AllToAll, eager and replayed, of changing sizes, every row checked on the device."""

from __future__ import annotations

import time

import pytest
import torch
from ranks import Ctx, run_ranks

from moe_a2a import AllToAll, Config, Options

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU"),
    pytest.mark.timeout(400),
]
LIMIT_S = 180


def _many_steps(ctx: Ctx, gpus: tuple[int, ...], steps: int) -> dict[str, float]:
    from many_steps import SIZES, Rank

    torch.cuda.set_device(gpus[ctx.rank])
    config = Config(64, 256, 4, max(SIZES))
    options = Options(timeout_s=60.0)
    with AllToAll(config, store=ctx.store, rank=ctx.rank, world_size=ctx.world, device="cuda", options=options) as a2a:
        rank = Rank(a2a, config, ctx.world, with_graphs=True)
        ctx.barrier("captured")
        began = time.monotonic()
        # up to a fifth of a millisecond, several times what a step takes
        rank.run(steps, 200, 7, lambda part: torch.cuda._sleep(int(4e5 * part)))
        took = time.monotonic() - began
        ctx.barrier("done")
    return {"steps": rank.steps, "replays": rank.replays, "nested replays": rank.nested, "seconds": took}


def _run(gpus: tuple[int, ...], steps: int) -> None:
    reports = run_ranks(_many_steps, len(gpus), gpus, steps, timeout=LIMIT_S + 120)
    print(reports)
    for report in reports:
        assert report["steps"] >= steps and report["replays"] > steps / 4 and report["nested replays"] > steps / 50
        assert report["seconds"] < LIMIT_S


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
def test_ten_thousand_steps_on_two_gpus_without_a_wrong_row() -> None:
    _run((0, 1), 10_000)


def test_steps_of_two_ranks_that_share_a_gpu_without_a_wrong_row() -> None:
    _run((0, 0), 300)
