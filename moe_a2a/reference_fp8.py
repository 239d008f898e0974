"""FP8 payloads, for the oracle: e4m3 values with one scale per 128 columns.

Tiles of 1x128 with one scale each are those of the DeepSeek-V3 Technical Report (section 3.3, fine-grained
quantisation); powers of two packed as UE8M0 bytes are what DeepGEMM reads on Blackwell.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Fp8Kind = Literal["fp32", "pow2", "ue8m0"]

TILE = 128  # columns that share one scale
E4M3_MAX = 448.0  # the largest finite float8_e4m3fn
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero tile away from zero


def quantise(x: Tensor, kind: Fp8Kind) -> tuple[Tensor, Tensor]:
    """[T, H] in any float dtype -> (float8_e4m3fn [T, H], scales), where x is about q * scale in every tile.

    kind "fp32":  scale = amax / 448, fp32 [T, H/128]
    kind "pow2":  scale = 2 ** ceil(log2(amax / 448)), fp32 [T, H/128]
    kind "ue8m0": as "pow2", packed by ``pack_ue8m0``: int32 [T, ceil(H/512)]
    """
    tiles = _tiles(x.float())
    scale = tiles.abs().amax(dim=-1).clamp(min=AMAX_FLOOR) / E4M3_MAX
    if kind != "fp32":
        scale = _power_of_two_at_least(scale)
    q = (tiles / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2)
    return q, pack_ue8m0(scale) if kind == "ue8m0" else scale


def dequantise(q: Tensor, scales: Tensor) -> Tensor:
    """float8_e4m3fn [..., H] and scales (fp32 [..., H/128], or packed int32 [..., ceil(H/512)]) -> fp32 [..., H]."""
    tiles = _tiles(q.float())
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales, tiles.shape[-2])
    return torch.flatten(tiles * scales.unsqueeze(-1), -2)


def pack_ue8m0(scales: Tensor) -> Tensor:
    """Powers of two, fp32 [..., S] -> their exponents, four to an int32, lowest byte first: int32 [..., ceil(S/4)].

    The exponent is the biased one, bits 23..30 of the fp32 number: 2**n becomes the byte n + 127. A last word that is
    not full ends in zero bytes.
    """
    exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)
    return _row_major(F.pad(exponents, (0, -scales.shape[-1] % 4))).view(torch.int32)  # little-endian, as our CPUs are


def unpack_ue8m0(packed: Tensor, count: int) -> Tensor:
    """Undo ``pack_ue8m0``: int32 [..., ceil(count/4)] -> fp32 [..., count]."""
    exponents = _row_major(packed).view(torch.uint8)[..., :count]
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def _tiles(x: Tensor) -> Tensor:
    """[..., H] -> [..., H/128, 128]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // TILE, TILE)


def _row_major(x: Tensor) -> Tensor:
    """A copy that can be viewed in another dtype; contiguous() keeps odd strides where a dimension is 0 or 1."""
    return x.clone(memory_format=torch.contiguous_format)


def _power_of_two_at_least(value: Tensor) -> Tensor:
    """2 ** ceil(log2(value)) by its bits: next to a power of two a rounded log2 would double the scale."""
    bits = value.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent << 23).view(torch.float32)
