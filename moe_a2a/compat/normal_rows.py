"""Rows and scales as DeepEP's normal mode takes and returns them, and as the core does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_a2a.checks import padded
from moe_a2a.config import GROUP
from moe_a2a.fp8 import FP8, ScaleFormat, unpack_ue8m0
from moe_a2a.types import Contiguous


@dataclass(frozen=True)
class Rows:
    """What a dispatch brings. x: bf16 or FP8 [T, H]; scales: None, fp32 [T, H/128] or int32 [T, ceil(H/512)]."""

    x: torch.Tensor
    scales: torch.Tensor | None

    def scales_for_core(self) -> tuple[torch.Tensor | None, ScaleFormat | None]:
        """(fp32 scales, contiguous; the form in which they are handed out)."""
        if self.scales is None:
            return None, None
        if self.scales.dtype == torch.int32:
            return unpack_ue8m0(self.scales, self.x.shape[1] // GROUP), "ue8m0"
        return self.scales.contiguous(), "fp32"


@dataclass(frozen=True)
class Got:
    """A dispatch's result, in DeepEP's terms. own: those of the tensors that are no views of a communication buffer."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    counts: list[int]
    own: tuple[torch.Tensor | None, ...]


def nothing(tokens: int, hidden: int, device: torch.device) -> Rows:
    """Rows that nobody reads, in the form that takes the fewest bytes."""
    ones = torch.ones(tokens, hidden // GROUP, dtype=torch.float32, device=device)
    return Rows(torch.zeros(tokens, hidden, dtype=torch.uint8, device=device).view(FP8), ones)


def cut(table: torch.Tensor, most: int | None, none: int) -> torch.Tensor:
    """The first `most` rows, all if it is None; rows that do not exist hold `none`."""
    if most is None:
        return table
    missing = most - len(table)
    return table[:most] if missing <= 0 else torch.cat([table, table.new_full((missing, *table.shape[1:]), none)])


def result_of(got: Contiguous, most: int | None, alignment: int, keep: bool) -> Got:
    """most: rows of the result; None: all. keep: as copies, which outlive the step's buffers."""
    x, ids = cut(got.x, most, 0), cut(got.topk_ids, most, -1)
    weights = None if got.topk_weights is None else cut(got.topk_weights, most, 0)
    scales = None if got.scales is None else cut(got.scales, most, 0)
    own: tuple[torch.Tensor | None, ...] = ()
    if scales is not None and (keep or scales.stride() != (scales.shape[1], 1)):  # the core's packed ones are not
        scales = scales.clone(memory_format=torch.contiguous_format)
        own = (scales,)
    if keep:
        x, ids, weights = x.clone(), ids.clone(), None if weights is None else weights.clone()
        own = (x, scales, ids, weights)
    counts = [] if got.counts_list is None else padded(got.counts_list, alignment)
    return Got(x, scales, ids, weights, counts, own)
