"""The host's memory, seen by channel and parity: tables of rows, mailboxes and the places of partial sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_a2a.config import Config
from moe_a2a.hosts import HostMap
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.region import Block, RegionLayout
from moe_a2a.transport.wait import Poll
from moe_a2a.transport.wire import RECORD_BYTES, Kind, Record, Status, record_reader, write_record


class Arena:
    """One rank's view of the regions of its host."""

    def __init__(
        self, config: Config, hosts: HostMap, rank: int, memory: HostMemory, incarnations: Mapping[int, int]
    ) -> None:
        self.config, self.hosts, self.rank, self.memory = config, hosts, rank, memory
        self.host = hosts.host_of[rank]
        self.peers = hosts.peers(rank)
        self.layout = RegionLayout.of(config, hosts, self.host)
        self.incarnations = incarnations
        self.index = {peer: i for i, peer in enumerate(self.peers)}
        self._tables = {
            RowFormat.PLAIN: memory.table(config.hidden_size, config.dtype),
            RowFormat.FP8: memory.table(config.hidden_size, torch.uint8),
        }

    def table(self, row_format: RowFormat) -> torch.Tensor:
        """All rows of all regions: [n, H] of the payload dtype, or uint8 for FP8."""
        return self._tables[RowFormat.PLAIN if row_format == RowFormat.PLAIN else RowFormat.FP8]

    def row_bytes(self, row_format: RowFormat) -> int:
        """Bytes of a dispatched row."""
        return self.config.row_bytes if row_format == RowFormat.PLAIN else self.config.hidden_size

    def block(self, step: Step) -> Block:
        return self.layout.blocks[step.channel][step.parity]

    def rows_at(self, step: Step, owner: int, offset: int, row_format: RowFormat) -> int:
        """Number, in the table of `row_format`, of the row at `offset` of a rank's region."""
        return self.memory.row(self.index[owner], offset, self.row_bytes(row_format))

    def own_rows(self, offset: int, rows: int, row_format: RowFormat) -> torch.Tensor:
        """A writable [rows, H] view of this rank's region."""
        dtype = self.config.dtype if row_format == RowFormat.PLAIN else torch.uint8
        return self.memory.tensor(self.index[self.rank], offset, (rows, self.config.hidden_size), dtype)

    def _partials_offset(self, step: Step, source: int) -> int:
        return self.block(step).partials + source * self.config.max_tokens_per_rank * self.config.row_bytes

    def partials(self, step: Step, source: int, rows: int) -> torch.Tensor:
        """Where this rank puts its sums for `source`: [rows, H] of the payload dtype."""
        return self.own_rows(self._partials_offset(step, source), rows, RowFormat.PLAIN)

    def partials_row(self, step: Step, owner: int, source: int) -> int:
        """Table row of the first sum that `owner`, a rank of this host, has for `source`."""
        return self.rows_at(step, owner, self._partials_offset(step, source), RowFormat.PLAIN)

    def record(
        self, step: Step, kind: Kind, rows: int = 0, status: Status = Status.OK, missing: int = -1, nbytes: int = 0
    ) -> Record:
        """A record of this rank about `step`."""
        return Record(
            kind,
            step.number,
            self.incarnations[self.rank],
            rows,
            step.tokens,
            step.format_code,
            status,
            missing,
            nbytes,
        )

    def announce(self, step: Step, kind: Kind, status: Status = Status.OK, rows: int = 0) -> None:
        """Publish a record in this rank's mailbox, for the ranks of its host."""
        offset = self.block(step).mailbox + RECORD_BYTES * kind
        at = self.memory.position(self.index[self.rank], offset)
        write_record(self.memory.bytes, at, self.record(step, kind, rows, status))

    def announced(self, step: Step, kind: Kind, owner: int) -> Poll:
        """A poll for a record in the mailbox of a rank of this host."""
        return self.record_at(step, kind, owner, self.block(step).mailbox, owner)

    def record_at(self, step: Step, kind: Kind, owner: int, mailbox: int, sender: int) -> Poll:
        """A poll for the record that `sender` writes into a mailbox of `owner`'s region."""
        at = self.memory.position(self.index[owner], mailbox + RECORD_BYTES * kind)
        return record_reader(self.memory.bytes, at, kind, step.number, self.incarnations[sender])
