"""The 64-byte record that announces rows, and the layout of the tables that travel in front of them.

A record is the flag and the header of DESIGN.md D4 in one: readers look at its step word (an aligned 8-byte store,
written last inside a host) and then check the rest by CRC, because a record that comes over TCP may land in pieces.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RECORD_BYTES = 64
_MAGIC = b"MA2A"
_RECORD = struct.Struct("<4sHHQQIIIIiQQI")
_STEP_OFFSET = 8
_CRC_END = 60
#: Bit of the step word of a record that is not to be believed any more (see `withdraw`).
_WITHDRAWN = 1 << 63
_ALIGN = 64

NO_RANK = -1


class Kind(IntEnum):
    """What a record announces. The value is also its place in a mailbox."""

    DISPATCH = 0
    WEIGHTS = 1
    PARTIALS_AWAY = 2  # partial sums for ranks of other hosts, to be reduced by the rail peer
    COMBINE = 3


class Status(IntEnum):
    """How the announced phase went on the rank that announces it."""

    OK = 0
    DISCARDED = 1
    FAULT = 2


class Record(NamedTuple):
    """One announcement. rows: rows that lie in the announced place; tokens: T of the source in this step;
    format: `RowFormat` code; missing: the rank that a FAULT is about; nbytes: bytes of the data write; epoch: of the
    newest view whose ranks the sender can reach; mask: a bit for each rank whose rows took part, in announcements of
    sums of elastic groups; in their announcements of rows, `finished`."""

    kind: Kind
    step: int
    incarnation: int
    rows: int = 0
    tokens: int = 0
    format: int = 0
    status: Status = Status.OK
    missing: int = NO_RANK
    nbytes: int = 0
    epoch: int = 0
    mask: int = 0

    @property
    def finished(self) -> int:
        """Of an announcement of rows: the step up to which its sender had finished all steps of the channel."""
        return self.mask

    def pack(self) -> bytes:
        head = _RECORD.pack(
            _MAGIC,
            self.kind,
            self.status,
            self.step,
            self.incarnation,
            self.epoch,
            self.rows,
            self.tokens,
            self.format,
            self.missing,
            self.nbytes,
            self.mask,
            0,
        )
        crc = zlib.crc32(head[:_CRC_END])
        return head[:_CRC_END] + struct.pack("<I", crc)


def write_record(memory: memoryview, offset: int, record: Record) -> None:
    """Publish `record` to the ranks that map this memory: everything first, the step word last (x86-64 keeps the
    order)."""
    data = record.pack()
    memory[offset : offset + _STEP_OFFSET] = data[:_STEP_OFFSET]
    memory[offset + _STEP_OFFSET + 8 : offset + RECORD_BYTES] = data[_STEP_OFFSET + 8 :]
    memory[offset + _STEP_OFFSET : offset + _STEP_OFFSET + 8] = data[_STEP_OFFSET : _STEP_OFFSET + 8]


def record_reader(
    memory: memoryview, offset: int, kind: Kind, step: int, incarnation: int
) -> Callable[[], Record | None]:
    """A poll for one record: None until a whole record of this kind, step and incarnation is there.

    Records of an older step, of another process, or half written ones are not believed.
    """
    step_word = np.frombuffer(memory, dtype=np.uint64, count=1, offset=offset + _STEP_OFFSET)

    def poll() -> Record | None:
        if int(step_word[0]) != step:
            return None
        return _record(bytes(memory[offset : offset + RECORD_BYTES]), kind, step, incarnation)

    return poll


def _record(data: bytes, kind: Kind, step: int, incarnation: int) -> Record | None:
    """The record that these bytes are, if they are one of this kind, step and process."""
    fields = _RECORD.unpack(data)
    if fields[0] != _MAGIC or fields[1] != kind or fields[4] != incarnation or fields[3] != step:
        return None
    if fields[12] != zlib.crc32(data[:_CRC_END]):
        return None
    _, _, status, _, _, epoch, rows, tokens, row_format, missing, nbytes, mask, _ = fields
    return Record(kind, step, incarnation, rows, tokens, row_format, Status(status), missing, nbytes, epoch, mask)


def withdraw(memory: memoryview, offset: int, step: int) -> None:
    """Say that what a record announced is about to be overwritten for `step`, before it is. Whoever has read rows then
    looks at the record once more, and knows whether they were the announced ones."""
    memory[offset + _STEP_OFFSET : offset + _STEP_OFFSET + 8] = struct.pack("<Q", step | _WITHDRAWN)


def withdrawn(step: int) -> bytes:
    """A record that does to a mailbox of another host what `withdraw` does."""
    return bytes(_STEP_OFFSET) + struct.pack("<Q", step | _WITHDRAWN) + bytes(RECORD_BYTES - _STEP_OFFSET - 8)


class Spot:
    """A place for records of one kind from one process, step after step. owner: the rank in whose region it is; sender:
    the rank that writes there.

    `poll` reads a step's record, None until it is there; `stands` tells whether it is still there, and so what it
    announced; `passed` whether the sender has gone on to later steps.
    """

    def __init__(
        self, memory: memoryview, offset: int, kind: Kind, incarnation: int, owner: int = NO_RANK, sender: int = NO_RANK
    ) -> None:
        self._memory, self._offset, self._kind, self._incarnation = memory, offset, kind, incarnation
        self.owner, self.sender = owner, sender
        self._word = np.frombuffer(memory, np.uint64, 1, offset + _STEP_OFFSET)

    def poll(self, step: int) -> Record | None:
        if int(self._word[0]) != step:
            return None
        data = bytes(self._memory[self._offset : self._offset + RECORD_BYTES])
        return _record(data, self._kind, step, self._incarnation)

    def stands(self, step: int) -> bool:
        return int(self._word[0]) == step

    def passed(self, step: int) -> bool:
        return int(self._word[0]) & ~_WITHDRAWN > step


def step_words(memory: memoryview, offset: int, count: int) -> npt.NDArray[np.uint64]:
    """The step words of `count` records that lie one after the other, for `withdrawn_word`."""
    words: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64, count * RECORD_BYTES // 8, offset)
    return words[_STEP_OFFSET // 8 :: RECORD_BYTES // 8]


def withdrawn_word(step: int) -> np.uint64:
    word: np.uint64 = np.uint64(step | _WITHDRAWN)
    return word


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class Tables:
    """Where the tables of `rows` rows lie, as byte offsets from the first row (negative: they end where the rows begin,
    so that tables and rows are one contiguous write). tokens int32 [n], ids int32 [n, K], weights fp32 [n, K],
    scales fp32 [n, G] (FP8 only)."""

    tokens: int
    ids: int
    weights: int
    scales: int

    @classmethod
    def of(cls, rows: int, top_k: int, groups: int) -> Tables:
        """groups: G = H / 128 for FP8 rows, 0 for rows without scales."""
        scales = -_padded(rows * groups * 4)
        weights = scales - _padded(rows * top_k * 4)
        ids = weights - _padded(rows * top_k * 4)
        return cls(ids - _padded(rows * 4), ids, weights, scales)


IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
