"""What dispatch returns: one class a layout, and the handle that combine takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from moe_a2a.fp8 import ScaleFormat
from moe_a2a.step import Step

Layout = Literal["masked", "contiguous", "grouped"]
LAYOUTS: tuple[Layout, ...] = ("masked", "contiguous", "grouped")


class Handle:
    """One step in flight, from dispatch to combine. Made by `AllToAll.dispatch_send`; opaque."""

    _reserved: Masked | None = None

    def __init__(self, owner: object, step: Step, fp8: ScaleFormat | None, layout: Layout | None = None) -> None:
        self._owner, self._step, self._fp8, self._layout = owner, step, fp8, layout

    @property
    def channel(self) -> str:
        """The channel that the step belongs to."""
        return self._step.channel_name

    @property
    def step(self) -> int:
        """The number of the step in its channel, from 1."""
        return self._step.number

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank has written to other hosts in this step so far, announcements included."""
        return self._step.traffic.wire_bytes

    def __repr__(self) -> str:
        return f"<Handle: {self._step}, {self._step.phase.value}>"


@dataclass(frozen=True)
class Masked:
    """Decode layout: a fixed block of rows for each local expert. Shapes do not depend on the routing.

    x: [E_l, R*M, H], payload dtype or float8_e4m3fn; the first counts[e] rows of expert e hold tokens, in (source
        rank, token) order; the others are never written.
    counts: int32 [E_l].
    source: int32 [E_l, R*M], source rank * M + token number, for the rows that hold tokens.
    scales: None, or fp32 [E_l, R*M, H/128], or int32 [E_l, R*M, ceil(H/512)] for UE8M0; the last two dimensions are
        stored column-major, as DeepGEMM reads them.
    GPU ranks with `Options.recv_capacity`: at most W = recv_capacity // R tokens a rank, and R*W rows in place of R*M.
    ranges: None; with `by_source` (see `AllToAll.reserve`) int64 [E_l, R], first row << 32 | number of rows of each
        source rank, and `source` then holds token numbers alone.
    Storage belongs to the AllToAll unless `out` was given: valid until the channel's next dispatch but one.
    """

    x: torch.Tensor
    counts: torch.Tensor
    source: torch.Tensor
    scales: torch.Tensor | None
    handle: Handle
    ranges: torch.Tensor | None = None


@dataclass(frozen=True)
class Contiguous:
    """Prefill layout: one row for each received token, in (source rank, token) order.

    x: [N, H], payload dtype or float8_e4m3fn.
    topk_ids: int64 [N, K], local expert ids, -1 where the expert is on another rank.
    topk_weights: fp32 [N, K], 0 where the expert is on another rank; None if weights were not given at dispatch.
    counts: int32 [E_l], rows that each local expert gets.
    tokens_per_rank: int32 [R], rows that came from each rank.
    source: int32 [N], source rank * M + token number.
    scales: None, or fp32 [N, H/128] row-major, or int32 [N, ceil(H/512)] column-major for UE8M0.
    counts_list: `counts` as a list, each rounded up to `alignment`, if host_counts was asked for; else None.
    rounds: in how many rounds the rows came, 1 unless `Options.recv_capacity` is less than R*M.
    GPU ranks without host_counts: all tensors have R*M rows in place of N. tokens_per_rank sums to N; the rows behind
        hold id -1, weight 0 and source -1, and x there means nothing.
    Storage belongs to the AllToAll unless `out` was given: valid until the channel's next dispatch but one.
    """

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor | None
    counts: torch.Tensor
    tokens_per_rank: torch.Tensor
    source: torch.Tensor
    scales: torch.Tensor | None
    handle: Handle
    counts_list: list[int] | None = None
    rounds: int = 1


@dataclass(frozen=True)
class Grouped:
    """Prefill layout, grouped by expert for a grouped GEMM: a token has one row for each of its local experts.

    x: [P, H], payload dtype or float8_e4m3fn; expert by expert, each padded to `alignment` rows; (source rank, token)
        order inside. Padding rows are never written.
    expert_ids: int32 [P], the local expert of each row, -1 for padding.
    counts: int32 [E_l], rows without padding. offsets: int32 [E_l + 1], first row of each expert.
    topk_weights: fp32 [P], 0 for padding; None if weights were not given at dispatch.
    source: int32 [P], source rank * M + token number, -1 for padding.
    scales: None, or fp32 [P, H/128], or int32 [P, ceil(H/512)] for UE8M0; stored column-major.
    rounds: as for `Contiguous`.
    Storage belongs to the AllToAll unless `out` was given: valid until the channel's next dispatch but one.
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    topk_weights: torch.Tensor | None
    source: torch.Tensor
    scales: torch.Tensor | None
    handle: Handle
    rounds: int = 1


Dispatched = Masked | Contiguous | Grouped
