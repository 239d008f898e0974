"""Where everything lies in a rank's communication region. Pure arithmetic; every rank computes every rank's layout.

A region belongs to one rank; the ranks of its host map it read-only, and the engine writes into its slots. For each
channel and parity:

    mailbox     one record per kind, read by the ranks of this host
    partials    sums of this rank's experts for every source rank: R x M rows
    publish     this rank's own tokens: tables and M rows
    host slot   one per other host: tables and rows of the tokens that go there; the combined rows come back into it
    source slot one per rank of other hosts (enough for any re-railing): its mirror on the receiving side

In elastic groups there is a host slot for every rank, and all slots that a rank of another host writes into, of all
channels and parities, lie together in its lane, which is whole pages.

Every row area starts at a multiple of the row size, and a region is a multiple of it too, so that all row areas of
all regions that are mapped side by side are rows of one table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_a2a.config import Config
from moe_a2a.hosts import HostMap
from moe_a2a.transport.wire import RECORD_BYTES, Kind, Tables

PAGE = 4096
PARITIES = 2
#: First words of a region: what its owner tells the ranks of its host at any time (see transport/memory.py).
CONTROL_BYTES = PAGE
MAILBOX_BYTES = RECORD_BYTES * len(Kind)


@dataclass(frozen=True)
class Slot:
    """Byte offsets of a slot: records that arrive, records to be sent from, and the first row (tables lie before
    it)."""

    inbox: int
    outbox: int
    rows: int


@dataclass(frozen=True)
class Block:
    """Byte offsets of what one channel and parity owns. publish: its first row; the tables lie before it, as in a
    slot."""

    mailbox: int
    partials: int
    publish: int
    host_slots: dict[int, Slot]
    source_slots: dict[int, Slot]


class _Cursor:
    def __init__(self, start: int) -> None:
        self.at = start

    def take(self, nbytes: int, align: int = RECORD_BYTES) -> int:
        start = -(-self.at // align) * align
        self.at = start + nbytes
        return start


@dataclass(frozen=True)
class RegionLayout:
    """The region of any rank of one host.

    blocks: [channel][parity]; nbytes: size of the region; engine_start: the engine reads and writes from here on.
    What only this rank and its host use lies before it, out of reach of other hosts. lanes: by rank, (start, bytes) of
    what that rank writes if it is on another host; elastic groups only.
    """

    blocks: tuple[tuple[Block, ...], ...]
    nbytes: int
    engine_start: int
    lanes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: Config, hosts: HostMap, host: int) -> RegionLayout:
        start = _Start(config, len(hosts.host_of))
        cursor = start.cursor
        blocks = []
        for mailbox, partials in zip(start.mailboxes, start.partials, strict=True):
            publish = _rows(cursor, config)
            host_slots = {h: _slot(cursor, config) for h in hosts.remote_hosts(host)}
            source_slots = {s: _slot(cursor, config) for s in hosts.remote_ranks(host)}
            blocks.append(Block(mailbox, partials, publish, host_slots, source_slots))
        return cls(*start.finish(blocks))

    @classmethod
    def elastic(cls, config: Config, max_ranks: int, several_hosts: bool) -> RegionLayout:
        """The region of any rank of an elastic group, alike for all, because nobody knows who comes later, and where.
        host_slots: one per rank, used while that one is the rail peer; source_slots: one per rank."""
        start = _Start(config, max_ranks)
        cursor = start.cursor
        places = zip(start.mailboxes, start.partials, strict=True)
        blocks = [Block(mailbox, partials, _rows(cursor, config), {}, {}) for mailbox, partials in places]
        lanes = []
        for rank in range(max_ranks) if several_hosts else ():
            first = cursor.take(0, PAGE)
            for block in blocks:
                block.host_slots[rank], block.source_slots[rank] = _slot(cursor, config), _slot(cursor, config)
            lanes.append((first, cursor.take(0, PAGE) - first))
        return cls(*start.finish(blocks), tuple(lanes))


class _Start:
    """What all regions begin with, and end with."""

    def __init__(self, config: Config, ranks: int) -> None:
        self._config, self.cursor = config, _Cursor(CONTROL_BYTES)
        count = len(config.channels) * PARITIES
        sums = ranks * config.max_tokens_per_rank * config.row_bytes
        self.mailboxes = [self.cursor.take(MAILBOX_BYTES) for _ in range(count)]
        self.partials = [self.cursor.take(sums, config.row_bytes) for _ in range(count)]
        self._engine_start = self.cursor.take(0, PAGE)

    def finish(self, blocks: list[Block]) -> tuple[tuple[tuple[Block, ...], ...], int, int]:
        """(blocks by channel, size of the region, engine_start)."""
        by_channel = tuple(tuple(blocks[i : i + PARITIES]) for i in range(0, len(blocks), PARITIES))
        nbytes = self.cursor.take(0, math.lcm(self._config.row_bytes, PAGE))
        return by_channel, nbytes, self._engine_start


def _rows(cursor: _Cursor, config: Config) -> int:
    """Room for the tables and rows of M tokens. Returns the offset of the first row."""
    rows = config.max_tokens_per_rank
    cursor.take(-Tables.of(rows, config.top_k, config.groups).tokens)
    return cursor.take(rows * config.row_bytes, config.row_bytes)


def _slot(cursor: _Cursor, config: Config) -> Slot:
    return Slot(cursor.take(MAILBOX_BYTES), cursor.take(MAILBOX_BYTES), _rows(cursor, config))
