"""One dispatch and its combine, from send to end: the state that the object and its transports share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum

import torch

from moe_a2a.routing import Arrival, BoolArray, Placement, Received
from moe_a2a.transport.progress import Task
from moe_a2a.transport.wire import FloatArray, IntArray, LongArray, Spot


class RowFormat(IntEnum):
    """What dispatched rows hold; part of every record, because all ranks must agree."""

    PLAIN = 0
    FP8 = 1
    FP8_POW2 = 2


class Phase(Enum):
    """How far a step is; the value completes the sentence "this step is ..."."""

    SENT = "sent, not received"
    RECEIVED = "received, not combined"
    COMBINING = "being combined"
    DONE = "finished"


@dataclass
class Traffic:
    """What this rank put on the network in a step, and when (CLOCK_MONOTONIC, ns): first post and last announcement
    of each direction."""

    wire_bytes: int = 0
    dispatch_posted: int = 0
    dispatch_announced: int = 0
    combine_posted: int = 0
    combine_announced: int = 0


@dataclass(frozen=True)
class Outgoing:
    """A rank's own tokens of one step. rows: [T, H] of the payload dtype, or uint8 [T, H] holding FP8; scales: fp32
    [T, G] for FP8."""

    rows: torch.Tensor
    ids: IntArray
    weights: FloatArray | None
    scales: torch.Tensor | None
    hits: BoolArray


@dataclass
class Roll:
    """Who takes part in a step of an elastic group. Latched from one view when the step begins, and never changed: a
    rank that is lost later is missing.

    epoch: of that view. reachable: the newest epoch whose ranks, those that wait to be activated included, this rank
        could reach then. incarnations: rank -> incarnation of all that take part, this rank included. hosts: their
        ranks by host, hosts ordered by their lowest rank. here: the ranks of this rank's host; away: (place in `hosts`,
        ranks) of the other hosts.
    missing: ranks that did not do their part, so that the result lacks it: those known to be lost; once rows are
        received, those whose rows did not come; at the end, also those whose sums did not. left: ranks that left in
        order, so that this step went on without them. summed: sources for whose tokens this rank has sums. returned:
        ranks whose sums for this rank's tokens arrived.
    epochs: `reachable` of the others, as they announced it. holders: source of another host -> rank of this host in
        whose region its rows lie. rails: host (place in `hosts`) -> the rank there that has this rank's rows.
    resent: hosts to which they went a second time, because the first rank there was lost.
    finished: when this step began, this rank had finished all steps of the channel up to this one.
    reading: rank -> the record that announced what is being read of it, at dispatch and then at combine.
    """

    epoch: int
    reachable: int
    incarnations: dict[int, int]
    hosts: tuple[tuple[int, ...], ...]
    here: tuple[int, ...]
    away: tuple[tuple[int, tuple[int, ...]], ...]
    missing: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)
    returned: set[int] = field(default_factory=set)
    epochs: dict[int, int] = field(default_factory=dict)
    holders: dict[int, int] = field(default_factory=dict)
    rails: dict[int, int] = field(default_factory=dict)
    resent: set[int] = field(default_factory=set)
    finished: int = 0
    reading: dict[int, Spot] = field(default_factory=dict)


@dataclass
class Step:
    """State of one step of one channel on this rank."""

    channel: int
    channel_name: str
    number: int
    row_format: RowFormat
    outgoing: Outgoing
    phase: Phase = Phase.SENT
    arrivals: list[Arrival] = field(default_factory=list)
    received: Received | None = None
    placement: Placement | None = None
    published: bool = False
    layout: str = ""
    output_rows: int = 0
    sent_to_host: dict[int, LongArray] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    #: Where waits add how long they lasted for each rank, int64 [R] nanoseconds.
    wait_times: torch.Tensor | None = None
    #: Of elastic groups only.
    roll: Roll | None = None

    @property
    def parity(self) -> int:
        return self.number % 2

    @property
    def tokens(self) -> int:
        """T of this rank."""
        return len(self.outgoing.ids)

    @property
    def has_weights(self) -> bool:
        """Do router weights travel with the dispatch?"""
        return self.outgoing.weights is not None

    @property
    def format_code(self) -> int:
        """Row format and weights bit, as records carry them."""
        return int(self.row_format) + (16 if self.has_weights else 0)

    def __str__(self) -> str:
        return f"step {self.number} of channel {self.channel_name!r}"
