"""What low-latency baselines have in common: what they give and take, and how their results are checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_a2a.bench.cases import Case
from moe_a2a.config import GROUP

#: Largest difference between two combines of the same tokens, relative to 1 + |expected|: the payload's rounding, and
#: for FP8 that a value next to the middle of two steps (an eighth of it apart) may fall to either.
BF16_TOLERANCE, FP8_TOLERANCE = 2**-6, 2**-3


@dataclass(frozen=True)
class Received:
    """A dispatch in the masked layout. x: [E_l, R*M, H] bf16 or FP8; scales: fp32 [E_l, R*M, H/128] with FP8; counts:
    [E_l]; handle: what combine takes. The order of an expert's rows is the library's."""

    x: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    handle: Any


class LowLatency(Protocol):
    """Another library's dispatch and combine, for T = M tokens on every rank. All but `buffer_bytes` is collective."""

    def buffer_bytes(self, case: Case) -> int:
        """Bytes of one rank's communication buffer."""
        ...

    def start(self, case: Case) -> None:
        """Make ready for a case."""
        ...

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor) -> Received:
        """x: bf16 [T, H]; topk_ids: int64 [T, K]."""
        ...

    def combine(
        self, y: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, got: Received, out: torch.Tensor
    ) -> torch.Tensor:
        """y: bf16 [E_l, R*M, H] in the order of `got`; topk_weights: fp32 [T, K]. Returns out."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def expert_rows(
    x: torch.Tensor, scales: torch.Tensor | None, counts: torch.Tensor, rank: int, case: Case
) -> torch.Tensor:
    """What this rank's experts return in a check: each row times 1 + id / E, so that a row in a wrong expert shows.
    Returns bf16 (or x's own dtype, if it is not FP8) [E_l, R*M, H], 0 where there is no row."""
    dtype = x.dtype if scales is None else torch.bfloat16
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    first = rank * len(counts)
    for e, count in enumerate(counts.tolist()):
        rows = x[e, :count].float()
        if scales is not None:
            tiles = rows.view(count, case.hidden // GROUP, GROUP) * scales[e, :count, :, None]
            rows = tiles.view(count, case.hidden)
        y[e, :count] = (rows * (1 + (first + e) / case.experts)).to(dtype)
    return y


def compare(
    counts: torch.Tensor, sums: torch.Tensor, our_counts: torch.Tensor, our_sums: torch.Tensor, fp8: bool
) -> str | None:
    """What differs between a baseline and ours, or None."""
    if counts.shape != our_counts.shape or not torch.equal(counts.long(), our_counts.long()):
        return "rows per expert differ from ours"
    ours = our_sums.float()
    error = ((sums.float() - ours).abs() / (1 + ours.abs())).max().item() if len(ours) else 0.0
    limit = FP8_TOLERANCE if fp8 else BF16_TOLERANCE
    return None if error <= limit else f"sums differ from ours by {error:.2e} (allowed {limit:.2e})"
