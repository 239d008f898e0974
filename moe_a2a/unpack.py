"""From arrivals to the layouts that experts read: the receiving half of dispatch, after the wait."""

from __future__ import annotations

import numpy as np
import torch

from moe_a2a.checks import check_matrix
from moe_a2a.config import Config
from moe_a2a.errors import InputError
from moe_a2a.fp8 import FP8, ScaleFormat, convert_scales, scale_columns
from moe_a2a.routing import Received, place
from moe_a2a.rows import gather, gather_segments
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.wire import FloatArray, IntArray, LongArray
from moe_a2a.types import Contiguous, Grouped, Handle, Masked


class Outputs:
    """Output storage that is used again: fresh pages cost more than the copy into them.

    One growing buffer for each (channel, parity, purpose); results are views of it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, str], torch.Tensor] = {}

    def take(self, step: Step, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = 1
        for n in shape:
            count *= n
        nbytes = count * dtype.itemsize
        key = (step.channel, step.parity, purpose)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < nbytes:
            kept = torch.empty(nbytes, dtype=torch.uint8)
            self._kept[key] = kept
        return kept[:nbytes].view(dtype).view(shape)

    def close(self) -> None:
        self._kept.clear()


class Unpacker:
    """Places a step's received rows in one of the three layouts, for one rank."""

    def __init__(self, config: Config, world_size: int, experts: int) -> None:
        self._config, self._world, self._experts = config, world_size, experts
        self._block = world_size * config.max_tokens_per_rank
        self._starts = np.arange(experts + 1, dtype=np.int64) * self._block
        self._outputs = Outputs()

    def reserve(
        self, step: Step, handle: Handle, fp8: ScaleFormat | None, out: torch.Tensor | None, by_source: bool
    ) -> Masked:
        """The tensors of a masked result, before anything has arrived. Raises InputError."""
        experts, block, take = self._experts, self._block, self._outputs.take
        x = self._rows(step, "masked", (experts, block), out)
        scales = None
        if fp8 is not None:
            width, dtype = scale_columns(self._config.hidden_size, fp8)
            scales = take(step, "scales", (experts, width, block), dtype).transpose(1, 2)
        counts = take(step, "counts", (experts,), torch.int32)
        source = take(step, "source", (experts, block), torch.int32)
        ranges = take(step, "ranges", (experts, self._world), torch.int64) if by_source else None
        return Masked(x, counts, source, scales, handle, ranges)

    def masked(self, step: Step, received: Received, table: torch.Tensor, got: Masked) -> None:
        """Fill what `reserve` returned."""
        placement = place(received, self._starts, self._experts)
        index = received.table_rows[received.pair_row[placement.by_expert]]
        gather_segments(table, index, placement.counts, placement.starts, _as_table(got.x, table))
        got.counts.copy_(_int32(placement.counts))
        slot = torch.from_numpy(placement.slot)
        source = self._source(received) if got.ranges is None else received.source[:, 1]
        got.source.view(-1)[slot] = torch.from_numpy(source[received.pair_row])
        if got.ranges is not None:
            got.ranges.copy_(torch.from_numpy(self._ranges(received)))
        if got.scales is not None:
            form: ScaleFormat = "ue8m0" if got.scales.dtype == torch.int32 else "fp32"
            rows = convert_scales(self._scales(step, received), form)[torch.from_numpy(received.pair_row)]
            got.scales[slot // self._block, slot % self._block] = rows
        step.placement, step.output_rows = placement, self._experts * self._block

    def contiguous(
        self,
        step: Step,
        received: Received,
        table: torch.Tensor,
        handle: Handle,
        fp8: ScaleFormat | None,
        out: torch.Tensor | None,
    ) -> Contiguous:
        rows = len(received.table_rows)
        x = self._rows(step, "contiguous", (rows,), out)
        gather(table, received.table_rows, _as_table(x, table))
        scales = None
        if fp8 is not None:
            scales = convert_scales(self._scales(step, received), fp8)
            if fp8 == "ue8m0":
                scales = _column_major(scales)
        weights = None
        if step.has_weights:
            weights = torch.from_numpy(np.where(received.local_ids >= 0, self._weights(step, received), np.float32(0)))
        step.output_rows = rows
        return Contiguous(
            x,
            torch.from_numpy(received.local_ids.astype(np.int64)),
            weights,
            _int32(np.bincount(received.pair_expert, minlength=self._experts)),
            _int32(np.bincount(received.source[:, 0], minlength=self._world)),
            torch.from_numpy(self._source(received)),
            scales,
            handle,
        )

    def grouped(
        self,
        step: Step,
        received: Received,
        table: torch.Tensor,
        handle: Handle,
        fp8: ScaleFormat | None,
        out: torch.Tensor | None,
        alignment: int,
    ) -> Grouped:
        placement = place(received, None, self._experts, alignment)
        rows = int(placement.starts[-1])
        x = self._rows(step, "grouped", (rows,), out)
        index = received.table_rows[received.pair_row[placement.by_expert]]
        gather_segments(table, index, placement.counts, placement.starts, _as_table(x, table))
        slot = placement.slot
        source = np.full(rows, -1, np.int32)
        source[slot] = self._source(received)[received.pair_row]
        expert_ids = np.full(rows, -1, np.int32)
        expert_ids[slot] = received.pair_expert
        weights = None
        if step.has_weights:
            by_row = np.zeros(rows, np.float32)
            by_row[slot] = self._weights(step, received)[received.pair_row, received.pair_k]
            weights = torch.from_numpy(by_row)
        scales = None
        if fp8 is not None:
            width, dtype = scale_columns(self._config.hidden_size, fp8)
            scales = self._outputs.take(step, "scales", (width, rows), dtype).t()
            converted = convert_scales(self._scales(step, received), fp8)
            scales[torch.from_numpy(slot)] = converted[torch.from_numpy(received.pair_row)]
        step.placement, step.output_rows = placement, rows
        return Grouped(
            x,
            torch.from_numpy(expert_ids),
            _int32(placement.counts),
            _int32(placement.starts),
            weights,
            torch.from_numpy(source),
            scales,
            handle,
        )

    def close(self) -> None:
        self._outputs.close()

    def _rows(self, step: Step, purpose: str, shape: tuple[int, ...], out: torch.Tensor | None) -> torch.Tensor:
        dtype = self._config.dtype if step.row_format == RowFormat.PLAIN else FP8
        full = (*shape, self._config.hidden_size)
        if out is None:
            return self._outputs.take(step, purpose, full, dtype)
        self.check_out(purpose, out, dtype)
        if out.shape[0] < shape[0]:
            raise InputError(
                f"out has {out.shape[0]} rows and this rank received {shape[0]}; give dispatch_recv a larger one, "
                "or none"
            )
        return out[: shape[0]]

    def check_out(self, layout: str, out: torch.Tensor, dtype: torch.dtype) -> None:
        """Raise InputError unless a caller's output fits the layout, as far as that is known before anything "
        "arrives."""
        shape: tuple[int | str, ...] = ("rows", self._config.hidden_size)
        if layout == "masked":
            shape = (self._experts, self._block, self._config.hidden_size)
        check_matrix("out", out, shape, (dtype,))

    def _source(self, received: Received) -> IntArray:
        source: IntArray = received.source[:, 0] * np.int32(self._config.max_tokens_per_rank) + received.source[:, 1]
        return source

    def _ranges(self, received: Received) -> LongArray:
        """int64 [E_l, R]: first row << 32 | number of rows of each source rank, in the block of each expert."""
        pair = received.pair_expert.astype(np.int64) * self._world + received.source[received.pair_row, 0]
        rows = np.bincount(pair, minlength=self._experts * self._world).reshape(self._experts, self._world)
        return ((np.cumsum(rows, axis=1) - rows) << 32) | rows

    def _scales(self, step: Step, received: Received) -> torch.Tensor:
        parts = [
            a.scales[rows] for a, rows in zip(step.arrivals, received.arrival_rows, strict=True) if a.scales is not None
        ]
        return torch.from_numpy(np.concatenate(parts))

    def _weights(self, step: Step, received: Received) -> FloatArray:
        parts = [
            a.weights[rows]
            for a, rows in zip(step.arrivals, received.arrival_rows, strict=True)
            if a.weights is not None
        ]
        return np.concatenate(parts)


def _as_table(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """An output as [n, H] of the table's dtype (FP8 rows travel as bytes)."""
    rows = x.view(torch.uint8) if table.dtype == torch.uint8 else x
    return rows.view(-1, table.shape[1])


def _column_major(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.t().contiguous().t()


def _int32(values: LongArray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))


def pair_offsets(received: Received) -> LongArray:
    """int64 [N + 1]: the pairs of each received token, as bounds."""
    counts = np.bincount(received.pair_row, minlength=len(received.table_rows))
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
