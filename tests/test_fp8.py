"""Quantising: bit for bit what the oracle says, next to powers of two as well."""

from __future__ import annotations

import pytest
import torch
from steps import DTYPES, same

from moe_a2a import fp8
from moe_a2a import reference as ref


def rows_with_amax(amax: torch.Tensor) -> torch.Tensor:
    """[n] -> [n, 128]: rows whose largest magnitude is amax."""
    spread = torch.linspace(-1, 1, 128)
    return amax[:, None] * spread


def quantised(x: torch.Tensor, kind: fp8.ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    q, scales = fp8.quantize(x, power_of_two=kind != "fp32")
    return q, fp8.convert_scales(scales, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", fp8.SCALE_FORMATS)
@pytest.mark.parametrize("hidden", [128, 512, 640])
def test_rows_of_every_size_are_quantised_as_the_oracle_says(dtype, kind, hidden):
    x = torch.randn(33, hidden, generator=torch.Generator().manual_seed(hidden))
    x = (x * torch.logspace(-7, 4, 33)[:, None]).to(dtype)
    x[5] = 0
    q, scales = quantised(x, kind)
    want_q, want_scales = ref.quantise(x, kind)
    same("scales", scales, want_scales)
    same("q", q, want_q)


@pytest.mark.parametrize("kind", ["pow2", "ue8m0"])
def test_scales_next_to_a_power_of_two_are_rounded_up_only_if_they_are_above_it(kind):
    powers = 448.0 * 2.0 ** torch.arange(-20, 100).float()
    below, above = torch.nextafter(powers, torch.tensor(0.0)), torch.nextafter(powers, torch.tensor(torch.inf))
    for amax in (powers, below, above, torch.nextafter(above, torch.tensor(torch.inf))):
        q, scales = quantised(rows_with_amax(amax), kind)
        want_q, want_scales = ref.quantise(rows_with_amax(amax), kind)
        same("scales", scales, want_scales)
        same("q", q, want_q)


def test_power_of_two_scales_are_powers_of_two_and_never_too_small():
    amax = torch.exp(torch.linspace(-9, 80, 20_000))
    scales = fp8.quantize(rows_with_amax(amax), power_of_two=True)[1].flatten()
    mantissa, _ = torch.frexp(scales)
    assert (mantissa == 0.5).all() and fp8.is_power_of_two(scales)
    assert (scales >= amax / 448).all() and (scales < amax / 448 * 2).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_scale_only(value):
    x = torch.ones(2, 256)
    x[1, 200] = value
    for power_of_two in (False, True):
        scales = fp8.quantize(x, power_of_two)[1]
        assert torch.isfinite(scales).tolist() == [[True, True], [True, False]]


def test_no_rows_are_no_rows():
    for kind in fp8.SCALE_FORMATS:
        q, scales = quantised(torch.zeros(0, 640), kind)
        width, dtype = fp8.scale_columns(640, kind)
        assert q.shape == (0, 640) and q.dtype == torch.float8_e4m3fn
        assert scales.shape == (0, width) and scales.dtype == dtype


@pytest.mark.parametrize(
    "scale, fits",
    [
        (1.0, True),
        (2.0**-126, True),
        (2.0**127, True),
        (3.0, False),
        (0.0, False),
        (-1.0, False),
        (2.0**-127, False),
        (torch.nan, False),
    ],
)
def test_only_positive_normal_powers_of_two_fit_ue8m0(scale, fits):
    assert fp8.is_power_of_two(torch.tensor([[1.0, scale]])) is fits
