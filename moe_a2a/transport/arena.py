"""The host's memory, seen by channel and parity: tables of rows, mailboxes and the places of partial sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moe_a2a.config import Config
from moe_a2a.errors import MoeA2AError
from moe_a2a.hosts import HostMap
from moe_a2a.routing import Arrival
from moe_a2a.rows import gather
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.region import Block, RegionLayout
from moe_a2a.transport.wait import Poll
from moe_a2a.transport.wire import (
    RECORD_BYTES,
    FloatArray,
    Kind,
    LongArray,
    Record,
    Status,
    Tables,
    record_reader,
    write_record,
)


class Arena:
    """One rank's view of the regions of its host."""

    def __init__(
        self,
        config: Config,
        hosts: HostMap,
        rank: int,
        memory: HostMemory,
        incarnations: Mapping[int, int],
        layout: RegionLayout | None = None,
    ) -> None:
        """layout: of this rank's region (None: the one that follows from `hosts`)."""
        self.config, self.hosts, self.rank, self.memory = config, hosts, rank, memory
        self.host = hosts.host_of[rank]
        self.peers = hosts.peers(rank)
        self.layout = layout or RegionLayout.of(config, hosts, self.host)
        self.incarnations = incarnations
        self.index = {peer: i for i, peer in enumerate(self.peers)}
        self.numbers = np.arange(config.max_tokens_per_rank, dtype=np.int64)
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

    def rows_at(self, owner: int, offset: int, row_format: RowFormat) -> int:
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
        return self.rows_at(owner, self._partials_offset(step, source), RowFormat.PLAIN)

    # rows and tables that are dispatched

    def tables(self, step: Step, rows: int) -> Tables:
        return Tables.of(rows, self.config.top_k, 0 if step.row_format == RowFormat.PLAIN else self.config.groups)

    def publish(self, step: Step) -> None:
        """Copy this rank's own tokens, all of them and once, to where the ranks of its host, or the engine, read
        them."""
        if not step.published:
            step.published = True
            rows = self.numbers[: step.tokens]
            self.pack(step, self.block(step).publish, rows)

    def pack(self, step: Step, at: int, rows: LongArray) -> None:
        """Put the tables and rows of this rank's tokens `rows` where the first row is at offset `at` of its region."""
        out, count = step.outgoing, len(rows)
        if not count:
            return
        tables = self.tables(step, count)
        whole = count == step.tokens
        self._array(self.rank, at + tables.tokens, (count,), np.int32)[:] = rows
        self._array(self.rank, at + tables.ids, (count, self.config.top_k), np.int32)[:] = (
            out.ids if whole else out.ids[rows]
        )
        if out.weights is not None:
            self.weights(step, self.rank, at, count)[:] = out.weights if whole else out.weights[rows]
        if out.scales is not None:
            scales = out.scales.numpy()
            self._array(self.rank, at + tables.scales, (count, self.config.groups), np.float32)[:] = (
                scales if whole else scales[rows]
            )
        packed = self.own_rows(at, count, step.row_format)
        if whole:
            packed.copy_(out.rows)
        else:
            gather(out.rows, rows, packed)

    def arrival(self, step: Step, source: int, record: Record, owner: int, at: int, keep: bool = False) -> Arrival:
        """What `source` announced by `record`, lying in the region of `owner`. keep: tokens and ids are copies. Headers
        are checked before they are believed: raises MoeA2AError."""
        check_header(step, source, record, self.config.max_tokens_per_rank)
        rows, tables = record.rows, self.tables(step, record.rows)
        tokens = self._array(owner, at + tables.tokens, (rows,), np.int32)
        ids = self._array(owner, at + tables.ids, (rows, self.config.top_k), np.int32)
        if keep:
            tokens, ids = tokens.copy(), ids.copy()
        if rows and (tokens.min() < 0 or tokens.max() >= record.tokens):
            raise MoeA2AError(f"{step}: rank {source} sent token numbers outside its {record.tokens} tokens")
        scales = None
        if step.row_format != RowFormat.PLAIN:
            scales = self._array(owner, at + tables.scales, (rows, self.config.groups), np.float32)
        return Arrival(
            source,
            tokens,
            ids,
            self.weights(step, owner, at, rows) if step.has_weights else None,
            scales,
            self.rows_at(owner, at, step.row_format),
        )

    def weights(self, step: Step, owner: int, at: int, rows: int) -> FloatArray:
        """The weights table in front of `rows` rows at an offset of a region: fp32 [rows, K]."""
        offset = at + self.tables(step, rows).weights
        table: FloatArray = self._array(owner, offset, (rows, self.config.top_k), np.float32)
        return table

    def _array(self, owner: int, offset: int, shape: tuple[int, ...], dtype: type) -> Any:
        at = self.memory.position(self.index[owner], offset)
        return np.frombuffer(self.memory.bytes, dtype=dtype, count=math.prod(shape), offset=at).reshape(shape)

    # records

    def record(
        self,
        step: Step,
        kind: Kind,
        rows: int = 0,
        status: Status = Status.OK,
        missing: int = -1,
        nbytes: int = 0,
        mask: int = 0,
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
            step.roll.reachable if step.roll else 0,
            mask,
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


def check_header(step: Step, rank: int, record: Record, most_tokens: int) -> None:
    """Believe a dispatch record only if it fits this step. Raises MoeA2AError."""
    if record.format != step.format_code:
        raise MoeA2AError(
            f"{step}: rank {rank} dispatched {describe_format(record.format)}, this rank "
            f"{describe_format(step.format_code)}; "
            "every rank must give the same fp8= and either all or none must give topk_weights at dispatch"
        )
    if record.rows > most_tokens or record.tokens > most_tokens:
        raise MoeA2AError(
            f"{step}: rank {rank} announces {record.rows} rows of {record.tokens} tokens; at most {most_tokens} fit"
        )


def describe_format(code: int) -> str:
    kind = {
        RowFormat.PLAIN: "plain rows",
        RowFormat.FP8: "FP8 rows",
        RowFormat.FP8_POW2: "FP8 rows with power-of-two scales",
    }
    return f"{kind[RowFormat(code % 16)]} {'with' if code >= 16 else 'without'} router weights"
