"""Channels and steps of a GPU rank, as the host knows them: what memory they use and how far their launches are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_a2a.errors import HandleError
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.layout import SLOTS, Layout
from moe_a2a.step import Phase
from moe_a2a.types import Handle


@dataclass
class Slot:
    """Memory of one open step: handle words, hits int64 [M], places int32 [R*M, K] (see `moe_a2a.gpu.layout`). Kernels
    write all that they read, but for SENT, which a dispatch in one launch wants to find at 0."""

    handle: torch.Tensor
    hits: torch.Tensor
    places: torch.Tensor

    @staticmethod
    def empty(layout: Layout, device: torch.device, captured: bool = False) -> Slot:
        """captured: for a step of a CUDA graph, which is dispatched in two launches."""
        words = torch.empty if captured else torch.zeros
        return Slot(
            words(layout.HANDLE_WORDS, dtype=torch.int64, device=device),
            torch.empty(layout.M, dtype=torch.int64, device=device),
            torch.empty((layout.CAP, layout.K), dtype=torch.int32, device=device),
        )


@dataclass
class Turns:
    """Dispatches of a channel that the host has launched, and their steps that are open. Those that a CUDA graph
    captured are counted apart: when they run, and how often, is not known here."""

    calls: int = 0
    open: list[GpuHandle] = field(default_factory=list)


class GpuHandle(Handle):
    """One step in flight on a GPU rank. The device numbers the steps: a replayed graph makes new ones.

    turns: the dispatches that this one, the `call`-th, was counted with. captured: it is part of a CUDA graph, and
    `slot` is its own; otherwise the next dispatch but one uses the slot again.
    """

    #: Where waits add how long they lasted for each rank, int64 [R] nanoseconds.
    wait_times: torch.Tensor | None = None

    def __init__(
        self,
        owner: object,
        channel: str,
        turns: Turns,
        captured: bool,
        slot: Slot,
        tokens: int,
        bits: int,
        fp8: ScaleFormat | None,
        has_weights: bool,
    ) -> None:
        self._owner, self._fp8 = owner, fp8
        self._channel, self.turns, self.call, self.captured = channel, turns, turns.calls, captured
        self.slot, self.tokens = slot, tokens
        self.bits, self.has_weights, self.pushed, self.phase = bits, has_weights, False, Phase.SENT

    @property
    def channel(self) -> str:
        """The channel that the step belongs to."""
        return self._channel

    @property
    def step(self) -> int:
        """The number of the step in its channel, from 1. Waits for the device."""
        self.check_words()
        return int(self.slot.handle[0].item())

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank has written to other hosts: none, the ranks map each other's memory."""
        return 0

    def check_words(self) -> None:
        """Raises HandleError if a later step has written over what the device knew of this one."""
        if not self.captured and self.turns.calls - self.call >= SLOTS:
            raise HandleError(f"{self!r} is too old to be asked; ask before the channel's next dispatch but one")

    def __repr__(self) -> str:
        return f"<GpuHandle: dispatch {self.call} of channel {self._channel!r}, {self.phase.value}>"


@dataclass
class Output:
    """Storage of a masked result: see `Masked`."""

    x: torch.Tensor
    counts: torch.Tensor
    source: torch.Tensor
    scales: torch.Tensor | None
    ranges: torch.Tensor | None = None


@dataclass
class Channel:
    """A channel's symmetric memory and what this rank keeps beside it. slots, outputs: memory of steps and results
    outside of graphs; outputs by (call's turn, form of the rows)."""

    region: torch.Tensor
    peers: torch.Tensor
    live: torch.Tensor
    slots: list[Slot]
    eager: Turns = field(default_factory=Turns)
    captured: Turns = field(default_factory=Turns)
    outputs: dict[tuple[int, ScaleFormat | None], Output] = field(default_factory=dict)
