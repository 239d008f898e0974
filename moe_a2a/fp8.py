"""FP8 e4m3 with one scale per token and 128 columns (the 1x128 tiles of the DeepSeek-V3 technical report, section 3.3).

Scales travel as fp32. They are handed out as fp32, as fp32 powers of two, or as UE8M0: the exponents of four
neighbouring scales in one int32, the form that DeepGEMM reads on Blackwell.
"""

from __future__ import annotations

from typing import Literal

import torch

from moe_a2a.config import GROUP

ScaleFormat = Literal["fp32", "pow2", "ue8m0"]
SCALE_FORMATS: tuple[ScaleFormat, ...] = ("fp32", "pow2", "ue8m0")

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_SMALLEST_AMAX = 1e-4


def quantize(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows. x: [T, H], any float dtype, H a multiple of 128. Returns (q float8_e4m3fn [T, H], scales fp32
    [T, H/128]), x ~ q * scale.

    scale = max(|x|, 1e-4) / 448 over 128 columns, rounded up to a power of two if asked for. A NaN or infinity in x
    gives a scale that is not finite.
    """
    tokens, hidden = x.shape
    tiles = x.float().view(tokens, hidden // GROUP, GROUP)
    amax = tiles.abs().amax(dim=2).clamp_min(_SMALLEST_AMAX)
    # By a tensor: on a GPU torch turns a division by a number into a product with its reciprocal, which rounds twice.
    scales = amax / amax.new_full((), FP8_MAX)
    if power_of_two:
        scales = _power_of_two_at_least(scales)
    q = (tiles / scales.unsqueeze(2)).to(FP8)
    return q.view(tokens, hidden), scales


def _power_of_two_at_least(scales: torch.Tensor) -> torch.Tensor:
    # By bits: log2 rounds, and next to a power of two would double the scale. Infinity and NaN stay what they are.
    bits = scales.view(torch.int32)
    up = (bits & 0x7FFFFF) != 0
    rounded = (((bits >> 23) + up) << 23).view(torch.float32)
    return torch.where(torch.isfinite(scales), rounded, scales)


def is_power_of_two(scales: torch.Tensor) -> bool:
    """Are all scales positive normal powers of two (what UE8M0 can hold)? scales: fp32."""
    bits = scales.contiguous().view(torch.int32)
    return bool(((bits & 0x7FFFFF) == 0).all() and (bits > 0).all())


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """The biased exponents of four neighbouring scales in one int32, lowest byte first; the last word is padded with
    zeros.

    scales: fp32 [..., G], powers of two. Returns int32 [..., ceil(G/4)].
    """
    exponents = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    short = -exponents.shape[-1] % 4
    if short:
        exponents = torch.nn.functional.pad(exponents, (0, short))
    return exponents.contiguous().view(torch.int32)


def unpack_ue8m0(words: torch.Tensor, groups: int) -> torch.Tensor:
    """What `pack_ue8m0` packed. words: int32 [n, ceil(G/4)], any strides; groups: G. Returns fp32 [n, G]."""
    exponents = words.contiguous().view(torch.uint8)[:, :groups]
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def scale_columns(hidden: int, scale_format: ScaleFormat) -> tuple[int, torch.dtype]:
    """Width and dtype of a row of scales as handed out: (H/128, fp32) or (ceil(H/512), int32)."""
    groups = hidden // GROUP
    return (-(-groups // 4), torch.int32) if scale_format == "ue8m0" else (groups, torch.float32)


def convert_scales(scales: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """fp32 scales [n, G] in the form that is handed out."""
    return pack_ue8m0(scales) if scale_format == "ue8m0" else scales
