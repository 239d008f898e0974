"""The checks that run on a device beside the steps agree with the oracle, and find what is wrong."""

from __future__ import annotations

import pytest
import torch
from device_oracle import POISON, World, experts

from moe_a2a import Config, Masked
from moe_a2a import reference as ref
from moe_a2a.fp8 import ScaleFormat

CONFIG = Config(12, 256, 3, 7)
SIZES = ref.Sizes(3, 12, 7)
CPU = torch.device("cpu")


def received(world: World, rank: int, fp8: ScaleFormat | None) -> Masked:
    """What the oracle says that a rank receives, on a poisoned ground."""
    x, ids, _ = zip(*[world.of(r) for r in range(3)], strict=True)
    scales = None
    payload = list(x)
    if fp8 is not None:
        payload, scales = map(list, zip(*[ref.quantise(rows, fp8) for rows in x], strict=True))
    want = ref.dispatch_masked(SIZES, payload, ids, rank, scales)
    rows = torch.full_like(want.x.view(torch.uint8), POISON)
    valid = torch.arange(21)[None, :] < want.counts[:, None]
    rows[valid] = want.x.view(torch.uint8)[valid]
    return Masked(rows.view(want.x.dtype), want.counts, want.source, want.scales, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("fp8", [None, "fp32", "ue8m0"])
@pytest.mark.parametrize("tokens", [[7, 7, 7], [0, 5, 1], [0, 0, 0]])
def test_right_rows_and_sums_are_found_right_and_wrong_ones_wrong(fp8: ScaleFormat | None, tokens: list[int]) -> None:
    world = World.make(CONFIG, tokens, sum(tokens), CPU)
    for rank in range(3):
        got = received(world, rank, fp8)
        assert world.wrong_rows(rank, got, fp8).tolist() == [0] * 5
        world.check_against_reference(rank, got, world.sums(rank, fp8), fp8)
    if not any(tokens):
        return
    expert = int(got.counts.argmax())
    got.x.view(torch.uint8)[expert, 0, 3] ^= 1
    got.source[expert, 0] += 1
    got.x.view(torch.uint8)[expert, 20, 5] = 1
    got.counts[expert - 1] += 1
    assert (world.wrong_rows(2, got, fp8) > 0).tolist() == [True, True, True, False, True]
    with pytest.raises(AssertionError):
        world.check_against_reference(2, got, world.sums(2, fp8), fp8)


def test_experts_differ_and_are_exact() -> None:
    rows = torch.randn(4, 2, 128).to(torch.bfloat16)
    assert torch.equal(experts(rows, None, 5).float(), rows.float() * torch.tensor([2, 0.5, 1, 2])[:, None, None])
