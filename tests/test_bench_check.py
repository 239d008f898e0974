"""What `moe-a2a bench` takes for correct: nothing that a dispatch returns may differ from the oracle unnoticed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll
from moe_a2a.bench.cases import Case
from moe_a2a.bench.check import _Expected, check_case, dispatch
from moe_a2a.types import LAYOUTS, Layout

#: What differs when each of these is wrong, by layout.
FIELDS = {
    "masked": ("x", "scales", "counts", "source"),
    "contiguous": ("x", "scales", "counts", "source", "topk_ids", "topk_weights", "tokens_per_rank"),
    "grouped": ("x", "scales", "counts", "source", "expert_ids", "offsets", "topk_weights"),
}


@pytest.fixture
def a2a() -> Iterator[AllToAll]:
    with AllToAll(case("masked", "fp8").config("c"), store=dist.HashStore(), rank=0, world_size=1) as made:
        yield made


def case(layout: Layout, dtype: str) -> Case:
    return Case(6, 256, 2, 4, dtype, layout, "uniform", 1, 3)


def spoil(field: torch.Tensor) -> None:
    """Flip the lowest bit of the first element."""
    whole = field.view(torch.uint8) if field.is_contiguous() else field.transpose(-1, -2).view(torch.uint8)
    whole.view(-1)[0] ^= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_wrong_bit_is_found_in_whatever_a_dispatch_returns(layout: Layout, a2a: AllToAll) -> None:
    of = case(layout, "fp8")
    inputs = [of.inputs(0, 0)]
    expected = _Expected.of(of, a2a, inputs)
    for name in FIELDS[layout]:
        got = dispatch(a2a, of, inputs[0], apart=False)
        assert expected.received(got)[0] is None
        spoil(getattr(got, name))
        wrong, y = expected.received(got)
        assert "differ from the oracle" in (wrong or ""), name
        a2a.combine(y, got.handle)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_right_step_passes_in_one_call_and_in_two(layout: Layout, dtype: str, apart: bool, a2a: AllToAll) -> None:
    assert check_case(case(layout, dtype), a2a, 0, apart) is None
