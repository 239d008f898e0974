"""The grouped layout of GPU ranks: contiguous rows, moved to their experts in one local pass, and back."""

from __future__ import annotations

import torch

from moe_a2a.checks import padded
from moe_a2a.errors import InputError
from moe_a2a.fp8 import FP8
from moe_a2a.gpu import inputs
from moe_a2a.gpu.contiguous import ContiguousRank
from moe_a2a.gpu.contiguous_state import ContiguousHandle
from moe_a2a.gpu.lockstep import Launches
from moe_a2a.kernels.permute import REPORT_WORDS, Outputs, permute
from moe_a2a.kernels.unpermute import unpermute
from moe_a2a.permuted import worst_case_rows
from moe_a2a.step import Phase
from moe_a2a.types import Contiguous, Grouped, Handle


class GroupedRank:
    """One rank's grouped layout. Steps are sent, and summed over ranks, by `contiguous`. processors: SMs of the device,
    all of which the local passes use."""

    def __init__(self, contiguous: ContiguousRank, processors: int) -> None:
        self.contiguous, self._processors = contiguous, processors

    def worst_case(self, alignment: int) -> int:
        """The most rows that a step can need."""
        layout = self.contiguous.layout
        return worst_case_rows(layout.MOST, min(layout.K, layout.E_L), layout.E_L, alignment)

    def dispatch_recv(
        self, handle: Handle, *, alignment: int = 128, host_counts: bool = False, out: torch.Tensor | None = None
    ) -> Grouped:
        """Launch the receiving half and the move. The result has `worst_case` rows, or, with host_counts, exactly those
        that are needed; what of it is not `out` is new. Raises InputError, HandleError."""
        mine, x = self._room(handle, alignment, host_counts, out)
        return self._move(mine, self.contiguous.dispatch_recv(mine, host_counts=host_counts), x, alignment)

    def receiving(
        self, handle: Handle, *, alignment: int = 128, host_counts: bool = False, out: torch.Tensor | None = None
    ) -> Launches[Grouped]:
        """`dispatch_recv`, for ranks that share a stream."""
        mine, x = self._room(handle, alignment, host_counts, out)
        came = yield from self.contiguous.receiving(mine, host_counts=host_counts)
        return self._move(mine, came, x, alignment)

    def _room(
        self, handle: Handle, alignment: int, host_counts: bool, out: torch.Tensor | None
    ) -> tuple[ContiguousHandle, torch.Tensor]:
        """The step, and storage for its rows."""
        mine, layout = self.contiguous.step(handle, Phase.SENT), self.contiguous.layout
        rows = self.worst_case(alignment)
        if host_counts:
            counts = self.contiguous.counts_on_host(mine)[layout.R : layout.R + layout.E_L]
            rows = sum(padded(counts, alignment))
        dtype = self.contiguous.config.dtype if mine._fp8 is None else FP8
        if out is None:
            return mine, torch.empty((rows, layout.H), dtype=dtype, device=self.contiguous.device)
        self.contiguous.check_out(out, dtype, rows)
        return mine, out[:rows]

    def _move(self, mine: ContiguousHandle, came: Contiguous, x: torch.Tensor, alignment: int) -> Grouped:
        """Launch the move of contiguous rows into x."""
        layout, device, rows = self.contiguous.layout, self.contiguous.device, x.shape[0]

        def ints(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        scales = came.scales
        made = Outputs(
            x=x,
            expert_ids=ints(rows),
            source=ints(rows),
            counts=ints(layout.E_L),
            offsets=ints(layout.E_L + 1),
            places=ints(*came.topk_ids.shape),
            topk_weights=None if came.topk_weights is None else torch.empty(rows, device=device),
            scales=None if scales is None else scales.new_empty((scales.shape[1], rows)),
            report=torch.empty(REPORT_WORDS, dtype=torch.int64, device=device),
        )
        permute(
            came.x,
            came.topk_ids,
            made,
            alignment,
            topk_weights=came.topk_weights,
            scales=scales,
            names=came.source,
            valid=mine.slot.places[:1],
            processors=self._processors,
        )
        mine.grouping, mine.weights = made.places, came.topk_weights
        mine.grouped_rows = rows
        by_row = None if made.scales is None else made.scales.t()
        return Grouped(
            x, made.expert_ids, made.counts, made.offsets, made.topk_weights, made.source, by_row, mine, came.rounds
        )

    def contiguous_rows(self, y: torch.Tensor, handle: Handle) -> torch.Tensor:
        """Experts' outputs [P, H] of a step that was received as grouped -> one row for each received token, weighted
        and summed over its experts here. Those of other steps are that already. Raises InputError, HandleError."""
        mine, layout = self.contiguous.step(handle, Phase.RECEIVED), self.contiguous.layout
        if mine.grouping is None:
            return y
        dtype, device = self.contiguous.config.dtype, self.contiguous.device
        rows = inputs.check_tensor("y", y, (mine.grouped_rows, layout.H), (dtype,), device)
        if mine.weights is None:
            raise InputError(
                "topk_weights were not given at dispatch, which is where GPU ranks take them for the grouped layout"
            )
        out = torch.empty((mine.rows, layout.H), dtype=dtype, device=device)
        unpermute(rows, mine.grouping, mine.weights, out, valid=mine.slot.places[:1], processors=self._processors)
        return out
