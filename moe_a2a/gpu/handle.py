"""Channels and steps of a GPU rank, as the host knows them: what memory they use and how far their launches are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_a2a.fp8 import ScaleFormat
from moe_a2a.step import Phase
from moe_a2a.types import Handle


@dataclass
class Slot:
    """Memory of one open step: handle words, hits int64 [M], places int32 [R*M, K] (see `moe_a2a.gpu.layout`)."""

    handle: torch.Tensor
    hits: torch.Tensor
    places: torch.Tensor


class GpuHandle(Handle):
    """One step in flight on a GPU rank. The device numbers the steps: a replayed graph makes new ones."""

    def __init__(
        self,
        owner: object,
        channel: str,
        call: int,
        slot: Slot,
        tokens: int,
        bits: int,
        fp8: ScaleFormat | None,
        has_weights: bool,
    ) -> None:
        self._owner, self._fp8 = owner, fp8
        self._channel, self.call, self.slot, self.tokens = channel, call, slot, tokens
        self.bits, self.has_weights, self.pushed, self.phase = bits, has_weights, False, Phase.SENT
        self.wait_times: torch.Tensor | None = None

    @property
    def channel(self) -> str:
        """The channel that the step belongs to."""
        return self._channel

    @property
    def step(self) -> int:
        """The number of the step in its channel, from 1. Waits for the device."""
        return int(self.slot.handle[0].item())

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank has written to other hosts: none, the ranks map each other's memory."""
        return 0

    def __repr__(self) -> str:
        return f"<GpuHandle: dispatch {self.call} of channel {self._channel!r}, {self.phase.value}>"


@dataclass
class Channel:
    """A channel's symmetric memory and what this rank keeps beside it. calls: dispatches that the host has launched;
    outputs: storage of results, by (call's turn, name)."""

    region: torch.Tensor
    peers: torch.Tensor
    live: torch.Tensor
    slots: list[Slot]
    calls: int = 0
    open: list[GpuHandle] = field(default_factory=list)
    outputs: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
