"""Contiguous steps of a GPU rank, as the host knows them: their handles, and the memory that they use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from moe_a2a.errors import HandleError
from moe_a2a.fp8 import FP8, ScaleFormat, scale_columns
from moe_a2a.gpu.handle import GpuHandle, Slot, Turns
from moe_a2a.gpu.layout import SLOTS, Layout
from moe_a2a.gpu.routing import Routing
from moe_a2a.types import Handle
from moe_a2a.types import Layout as LayoutName

#: Routings of a channel that are kept: those of two open steps, and one for the next.
_ROUTINGS = SLOTS + 1
#: Local ids, weights and source numbers of the received rows.
Tables = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


@dataclass
class ContiguousSlot(Slot):
    """As `Slot`, where places is int32 [R + 2]: N, the first received row of each source, and N again. host: int64
    [R + E_l] of pinned memory, for counts, and one more for the number of rounds where there may be several."""

    host: torch.Tensor

    @staticmethod
    def of(layout: Layout, device: torch.device, host: torch.Tensor) -> ContiguousSlot:
        """Kernels write all that they read."""
        words = torch.empty(layout.HANDLE_WORDS, dtype=torch.int64, device=device)
        came = torch.empty(layout.R + 2, dtype=torch.int32, device=device)
        return ContiguousSlot(words, words[:0], came, host)


@dataclass
class Sent:
    """A rank's own part of a step, as it was given. known: the routing is that of an earlier step; tables are then that
    step's."""

    x: torch.Tensor
    weights: torch.Tensor | None
    scales: torch.Tensor | None
    mode: int
    known: bool
    tables: Tables | None


class ContiguousHandle(GpuHandle):
    """A contiguous step. layout: how its rows are wanted, contiguous or grouped. block: 0 or 1, where its received rows
    lie; rows: how many were handed out; routed: how many tokens its routing is of, also when it is discarded.

    shown: the results, if the launch that sends fills them in.
    grouping: of a step that was received as grouped: int32 [rows, K], where each choice's row lies among the
    grouped_rows that were handed out instead; weights: fp32 [rows, K], if they were given.

    rounds: of a step that goes in rounds (`moe_a2a.gpu.rounds`): how many, 0 before it is sent; outputs: what the
    experts made of it, while it is being sent back.
    """

    slot: ContiguousSlot

    def __init__(
        self,
        owner: object,
        channel: str,
        turns: Turns,
        captured: bool,
        slot: ContiguousSlot,
        bits: int,
        fp8: ScaleFormat | None,
        sent: Sent,
        routing: Routing,
    ) -> None:
        tokens, weighted = sent.x.shape[0], sent.weights is not None
        super().__init__(owner, channel, turns, captured, slot, tokens, bits, fp8, weighted)
        self.sent: Sent | None = sent
        self.known, self.tables = sent.known, sent.tables
        self.routing, self.routing_call = routing, routing.call
        self.block, self.rows, self.routed = self.call % SLOTS, 0, tokens
        self.shown: Output | None = None
        self.layout: LayoutName = "contiguous"
        self.grouping: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self.grouped_rows = 0
        self.rounds = 0
        self.outputs: torch.Tensor | None = None

    @property
    def ticket(self) -> int:
        """Says in words for the host that they are this step's."""
        return self.call & 0x7FFFFFFF


@dataclass
class Output:
    """What a step hands out, all of it CAPACITY rows, most of it views of the region. packed: storage of UE8M0
    scales."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    source: torch.Tensor
    counts: torch.Tensor
    tokens_per_rank: torch.Tensor
    scales: torch.Tensor | None
    packed: torch.Tensor | None

    @staticmethod
    def of(layout: Layout, region: torch.Tensor, block: int, payload: torch.dtype, fp8: ScaleFormat | None) -> Output:
        """The results of steps whose rows lie in `block` of `region`."""

        def view(area: int, dtype: torch.dtype, columns: int) -> torch.Tensor:
            start = block * layout.parity_bytes + area
            size = layout.CAPACITY * columns * dtype.itemsize
            return region[start : start + size].view(dtype).view(layout.CAPACITY, columns)

        scales, packed = None, None
        if fp8 == "ue8m0":
            width, form = scale_columns(layout.H, fp8)
            packed = torch.empty((width, layout.CAPACITY), dtype=form, device=region.device)
            scales = packed.t()
        elif fp8 is not None:
            scales = view(layout.scales, torch.float32, layout.G)
        return Output(
            view(layout.rows, payload if fp8 is None else FP8, layout.H),
            view(layout.table, torch.int64, layout.K),
            view(layout.weights, torch.float32, layout.K),
            view(layout.source, torch.int32, 1).view(-1),
            torch.empty(layout.E_L, dtype=torch.int32, device=region.device),
            torch.empty(layout.R, dtype=torch.int32, device=region.device),
            scales,
            packed,
        )


@dataclass
class Extra:
    """What a channel needs for contiguous steps, beside `Channel`.

    experts: int32 [E], zeros between launches; unread: pinned as a slot's `host`, for steps in graphs, which share
    nothing else of this. fresh: the dispatch that wrote the tables of each block last. outputs:
    by block and form of scales.
    """

    slots: list[ContiguousSlot]
    routings: list[Routing]
    experts: torch.Tensor
    unread: torch.Tensor
    made: list[int]
    kept: list[int]
    outputs: dict[tuple[int, ScaleFormat | None], Output] = field(default_factory=dict)

    @staticmethod
    def of(layout: Layout, device: torch.device) -> Extra:
        words = layout.R + layout.E_L + (layout.ROUNDS > 1)
        host = torch.zeros((SLOTS + 1, words), dtype=torch.int64, pin_memory=device.type == "cuda")
        return Extra(
            [ContiguousSlot.of(layout, device, words) for words in host[:SLOTS]],
            [Routing.empty(layout, device) for _ in range(_ROUTINGS)],
            torch.zeros(layout.E, dtype=torch.int32, device=device),
            host[SLOTS],
            [0] * SLOTS,
            [0] * SLOTS,
        )

    def note(self, call: int, known: bool) -> None:
        """A contiguous dispatch uses a block."""
        block = call % SLOTS
        if not known:
            self.made[block] = call
        elif self.kept[block] != call - SLOTS:  # a masked one was there
            self.made[block] = 0
        self.kept[block] = call

    def holds(self, call: int, calls: int) -> bool:
        """Are the tables of a dispatch still there, after `calls` of the channel, masked ones too?"""
        block = call % SLOTS
        return self.made[block] == call and self.kept[block] == calls - (calls - call) % SLOTS

    def free_routing(self, open_steps: Iterable[GpuHandle]) -> Routing:
        """The one that was written longest ago, of those that no open step follows."""
        used = [handle.routing for handle in open_steps if isinstance(handle, ContiguousHandle)]
        return min((r for r in self.routings if not any(r is u for u in used)), key=lambda r: r.call)


def followed(like: Handle, owner: object, name: str, extra: Extra, turns: Turns, captured: bool) -> ContiguousHandle:
    """The step that like= names, whose routing and tables are still there. Of those in captures, the kernels find it
    out. Raises HandleError."""
    if not isinstance(like, ContiguousHandle) or like._owner is not owner or like.channel != name:
        raise HandleError(f"like={like!r}; give the handle of a contiguous step of channel {name!r} of this object")
    if like.tables is None:
        raise HandleError(f"like={like!r}; receive that step first")
    if like.captured != captured:
        where = "in a CUDA graph's capture" if captured else "outside of a CUDA graph's capture"
        raise HandleError(
            f"like={like!r}, and this call is {where}; both belong into the same graph, or outside of graphs"
        )
    call = like.routing_call
    if not captured and (like.routing.call != call or not extra.holds(call, turns.calls)):
        raise HandleError(
            f"like={like!r}: the routing of dispatch {call} has been overwritten by a later dispatch of the "
            "channel; give topk_ids again"
        )
    return like
