"""The gloo baseline: the same deduplicated rows and the same permutes and sums, moved by torch.distributed's
all_to_all_single."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from moe_a2a.bench.ours import outgoing
from moe_a2a.combine import reduce_partials, sum_contributions
from moe_a2a.config import Config
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.routing import Arrival, Contribution, receive
from moe_a2a.rows import gather
from moe_a2a.step import Phase, RowFormat, Step
from moe_a2a.types import Contiguous, Grouped, Handle, Layout, Masked
from moe_a2a.unpack import Unpacker
from moe_a2a.workload import Inputs


class GlooAllToAll:
    """Dispatch and combine over a gloo group. Buffers are kept and used again, as ours are."""

    def __init__(self, config: Config, group: dist.ProcessGroup) -> None:
        self._config, self._group = config, group
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._experts = config.local_experts(self._world)
        self._unpacker = Unpacker(config, self._world, self._experts)
        rows = self._world * config.max_tokens_per_rank
        self._buffers = [torch.empty(rows * config.row_bytes, dtype=torch.uint8) for _ in range(4)]
        self._sizes: tuple[list[int], list[int]] = ([], [])
        self._number = 0

    def dispatch(self, inputs: Inputs, layout: Layout, fp8: ScaleFormat | None) -> Masked | Contiguous | Grouped:
        """Exchange counts, tables and rows, then lay them out with the library's own code."""
        step = self._pack(inputs, fp8)
        counts = torch.tensor(self._sizes[0])
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self._group)
        self._sizes = (self._sizes[0], arriving.tolist())
        table = self._exchange(self._table(step))
        self._move_rows(step.row_format)
        step.arrivals = self._arrivals(step, table)
        received = receive(step.arrivals, self._rank * self._experts, self._experts, self._config.top_k)
        step.received, step.phase = received, Phase.RECEIVED
        handle = Handle(self, step, fp8)
        rows = self.table(step.row_format)
        if layout == "masked":
            got = self._unpacker.reserve(step, handle, fp8, None, False)
            self._unpacker.masked(step, received, rows, got)
            return got
        if layout == "contiguous":
            return self._unpacker.contiguous(step, received, rows, handle, fp8, None)
        return self._unpacker.grouped(step, received, rows, handle, fp8, None, 128)

    def combine(self, y: torch.Tensor, handle: Handle, out: torch.Tensor) -> torch.Tensor:
        """Reduce with the library's own code, exchange the rows, sum with the library's own code."""
        step = handle._step
        weights = {a.rank: a.weights for a in step.arrivals if a.weights is not None}
        reduce_partials(self, step, y, weights, range(self._world))
        self._move_sums()
        first, parts = 0, []
        for rank, count in enumerate(self._sizes[0]):
            parts.append(Contribution(np.flatnonzero(step.outgoing.hits[:, rank]), first))
            first += count
        sum_contributions(_Returned(self), parts, out)
        return out

    def transport(self, fp8: ScaleFormat | None) -> None:
        """Only move rows, both ways, as many as in the last dispatch; their places and numbers are known."""
        self._move_rows(RowFormat.PLAIN if fp8 is None else RowFormat.FP8)
        self._move_sums()

    # places of rows (combine.RowPlaces)

    def partials(self, step: Step, source: int, rows: int) -> torch.Tensor:
        first = sum(self._sizes[1][:source])
        return self._view(2, RowFormat.PLAIN)[first : first + rows]

    def table(self, row_format: RowFormat) -> torch.Tensor:
        return self._view(1, row_format)

    def _view(self, buffer: int, row_format: RowFormat) -> torch.Tensor:
        dtype = self._config.dtype if row_format == RowFormat.PLAIN else torch.uint8
        return self._buffers[buffer].view(dtype).view(-1, self._config.hidden_size)

    # moves

    def _pack(self, inputs: Inputs, fp8: ScaleFormat | None) -> Step:
        out, row_format = outgoing(inputs, fp8, self._experts, self._world)
        self._number += 1
        step = Step(0, "gloo", self._number, row_format, out)
        send, first, sizes = self._view(0, row_format), 0, []
        for rank in range(self._world):
            index = np.flatnonzero(out.hits[:, rank])
            gather(out.rows, index, send[first : first + len(index)])
            first += len(index)
            sizes.append(len(index))
        self._sizes = (sizes, [])
        return step

    def _table(self, step: Step) -> torch.Tensor:
        """int32 [n, 1 + 2K (+ G)]: token, ids, weights, scales of every row that is sent."""
        out = step.outgoing
        assert out.weights is not None
        columns = [np.arange(len(out.ids), dtype=np.int32)[:, None], out.ids, out.weights.view(np.int32)]
        if out.scales is not None:
            columns.append(out.scales.numpy().view(np.int32))
        whole = np.concatenate(columns, axis=1)
        return torch.from_numpy(np.concatenate([whole[out.hits[:, rank]] for rank in range(self._world)]))

    def _exchange(self, table: torch.Tensor) -> torch.Tensor:
        send, recv = self._sizes
        out = torch.empty((sum(recv), table.shape[1]), dtype=table.dtype)
        dist.all_to_all_single(out, table, recv, send, group=self._group)
        return out

    def _move_rows(self, row_format: RowFormat) -> None:
        self._all_to_all(self._view(0, row_format), self._view(1, row_format), *self._sizes)

    def _move_sums(self) -> None:
        self._all_to_all(self._view(2, RowFormat.PLAIN), self._view(3, RowFormat.PLAIN), self._sizes[1], self._sizes[0])

    def _all_to_all(self, source: torch.Tensor, target: torch.Tensor, send: Sequence[int], recv: Sequence[int]) -> None:
        dist.all_to_all_single(target[: sum(recv)], source[: sum(send)], list(recv), list(send), group=self._group)

    def _arrivals(self, step: Step, table: torch.Tensor) -> list[Arrival]:
        top_k, arrivals, first = self._config.top_k, [], 0
        whole = table.numpy()
        for rank, count in enumerate(self._sizes[1]):
            part = whole[first : first + count]
            scales = (
                np.ascontiguousarray(part[:, 1 + 2 * top_k :]).view(np.float32)
                if step.outgoing.scales is not None
                else None
            )
            weights = np.ascontiguousarray(part[:, 1 + top_k : 1 + 2 * top_k]).view(np.float32)
            arrivals.append(Arrival(rank, part[:, 0], part[:, 1 : 1 + top_k], weights, scales, first))
            first += count
        return arrivals


class _Returned:
    """The rows that came back, as the table of the last sum."""

    def __init__(self, owner: GlooAllToAll) -> None:
        self._owner = owner

    def partials(self, step: Step, source: int, rows: int) -> torch.Tensor:
        return self._owner.partials(step, source, rows)

    def table(self, row_format: RowFormat) -> torch.Tensor:
        return self._owner._view(3, row_format)
