"""What `permute` returns, how many rows it can need, and what can be wrong with a routing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_a2a.errors import InputError


@dataclass(frozen=True)
class Permuted:
    """Tokens as rows grouped by expert: E experts, one after another, each with its rows padded to `alignment`.

    x: [P, H], dtype of the tokens; an expert's rows in (token, k) order. Padding rows are never written.
    expert_ids: int32 [P], -1 for padding.
    counts: int32 [E], rows without padding. offsets: int32 [E + 1], first row of each expert; offsets[E] ends the last.
    topk_weights: fp32 [P], 0 for padding; None if none were given.
    source: int32 [P], the token of each row, -1 for padding.
    scales: None, or [P, S] of the given scales' dtype, stored column-major; not written for padding.
    places: int32 [T, K], the row of each choice, -1 for a choice without one. `unpermute` takes it.

    P is offsets[E] on a CPU. On a GPU it is `worst_case_rows`, because the counts stay there; `capacity` sets it on
    both. Rows from offsets[E] on are padding too.
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    topk_weights: torch.Tensor | None
    source: torch.Tensor
    scales: torch.Tensor | None
    places: torch.Tensor
    _report: torch.Tensor | None = field(default=None, repr=False)

    def check(self) -> None:
        """Wait for the GPU, and raise InputError if ids were out of range or the rows did not fit `capacity`.

        On a CPU `permute` has raised it, and this does nothing.
        """
        if self._report is None:
            return
        from moe_a2a.kernels.permute import NO_WRONG_ID

        wrong, needed = self._report.tolist()
        if wrong != NO_WRONG_ID:
            token, k = divmod(wrong >> 32, self.places.shape[1])
            raise wrong_id(token, k, (wrong & 0xFFFFFFFF) - (1 << 31), len(self.counts))
        check_room(needed, len(self.x))


def worst_case_rows(tokens: int, top_k: int, num_experts: int, alignment: int = 128) -> int:
    """The most rows that `permute` can need: tokens * top_k, and padding for every expert that may have a row.

    If no token names an expert twice, min(top_k, num_experts) may be given as top_k.
    """
    choices = tokens * top_k
    return (choices + min(num_experts, choices) * (alignment - 1)) // alignment * alignment


def wrong_id(token: int, k: int, value: int, experts: int) -> InputError:
    return InputError(f"topk_ids[{token}, {k}] = {value}; allowed are 0 to {experts - 1}, and -1 for no expert")


def check_room(needed: int, rows: int) -> None:
    if needed > rows:
        raise InputError(
            f"capacity={rows}, but this routing needs {needed} rows with their padding; give more, or none for the "
            "worst case"
        )
