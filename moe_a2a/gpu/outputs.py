"""What a GPU rank's steps return, and what experts return to it: storage, and checks of storage that callers give."""

from __future__ import annotations

import torch

from moe_a2a.fp8 import FP8, ScaleFormat, scale_columns
from moe_a2a.gpu import inputs
from moe_a2a.gpu.handle import Channel, GpuHandle, Output
from moe_a2a.gpu.layout import SLOTS, Layout
from moe_a2a.types import Masked


class Outputs:
    """Tensors of one rank. dtype: of the payload."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout, self._dtype, self._device = layout, dtype, device
        self._shape = (layout.E_L, layout.CAP, layout.H)  # of a result's rows

    def check_rows(self, out: torch.Tensor, quantised: bool) -> torch.Tensor:
        """Storage that a caller gives for the rows of a dispatch. Raises InputError."""
        return inputs.check_tensor("out", out, self._shape, (FP8 if quantised else self._dtype,), self._device)

    def check_experts(self, y: torch.Tensor) -> torch.Tensor:
        """What the experts made of a dispatch's rows. Raises InputError."""
        return inputs.check_tensor("y", y, self._shape, (self._dtype,), self._device)

    def sums(self, tokens: int, out: torch.Tensor | None) -> torch.Tensor:
        """Storage of combine's result [T, H]: `out`, once it is checked. Raises InputError."""
        shape = (tokens, self._layout.H)
        if out is None:
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        return inputs.check_tensor("out", out, shape, (self._dtype,), self._device)

    def masked(self, state: Channel, handle: GpuHandle, out: torch.Tensor | None, by_source: bool) -> Masked:
        """A dispatch's result, with `out` for its rows: the same tensors at every second dispatch of the channel; in a
        graph, the graph's own."""
        rows = out is None  # x is large, and made only if it is asked for
        if handle.captured:
            found = self._allocate(handle._fp8, rows)
        else:
            key = (handle.call % SLOTS, handle._fp8)
            cached = state.outputs.get(key)
            if cached is None:
                cached = state.outputs[key] = self._allocate(handle._fp8, rows)
            elif rows and not cached.x.numel():
                cached.x = cached.x.new_empty(self._shape)
            found = cached
        if by_source and found.ranges is None:
            found.ranges = torch.empty((self._layout.E_L, self._layout.R), dtype=torch.int64, device=self._device)
        return Masked(
            found.x if out is None else out,
            found.counts,
            found.source,
            found.scales,
            handle,
            found.ranges if by_source else None,
        )

    def _allocate(self, fp8: ScaleFormat | None, rows: bool) -> Output:
        layout, device, scales = self._layout, self._device, None
        if fp8 is not None:
            width, form = scale_columns(layout.H, fp8)
            storage = torch.empty((layout.E_L, width, layout.CAP), dtype=form, device=device)
            scales = storage.transpose(1, 2)
        return Output(
            torch.empty(self._shape if rows else 0, dtype=self._dtype if fp8 is None else FP8, device=device),
            torch.empty(layout.E_L, dtype=torch.int32, device=device),
            torch.empty((layout.E_L, layout.CAP), dtype=torch.int32, device=device),
            scales,
        )
