"""Where things lie in a rank's region.

A region begins with what its owner publishes. Between hosts that is followed by one such part for each slot: a mirror,
into which a rank of another host writes what it publishes for this one, each thing to the same place. So a reader finds
a peer's things at the same offsets of one base or the other.

Published are, as 64-bit words: an entry for each of two turns, which says that this rank has come to an operation and
that its data lie in `first`; a second record for each turn, for `second`; a status, which says how far this rank has
come and what failed; and for each other rank two letters with their data, and an acknowledgement of its letters.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_a2a.collectives.options import MOST_SLOTS

WORD = 8
LINE = 64
#: Words of a record that are compared: operation and round, epoch, and what is called (signature.py).
ENTRY_WORDS = 4
STATUS_WORDS = 5
LETTER_WORDS = 6
_ENTRIES, _SECONDS, _STATUS = LINE, 3 * LINE, 5 * LINE
_ACKS = 8 * LINE
_LETTERS = _ACKS + MOST_SLOTS * 2 * WORD
_PAGE = 4096
_LARGEST_LETTER = 256 << 10


@dataclass(frozen=True)
class Layout:
    """chunk: bytes of an area. letter: bytes of one part of a message between two ranks. Offsets are in bytes."""

    slots: int
    chunk: int
    several_hosts: bool

    @property
    def letter(self) -> int:
        return min(self.chunk, _LARGEST_LETTER)

    def entry(self, turn: int) -> int:
        return _ENTRIES + turn * LINE

    def second_record(self, turn: int) -> int:
        return _SECONDS + turn * LINE

    @property
    def status(self) -> int:
        return _STATUS

    def ack(self, sender: int) -> int:
        """Two words: how many letters of `sender` have been taken, and the incarnation of that sender."""
        return _ACKS + sender * 2 * WORD

    def letter_record(self, receiver: int, turn: int) -> int:
        return _LETTERS + (2 * receiver + turn) * LINE

    @property
    def _data(self) -> int:
        return -(-(_LETTERS + 2 * self.slots * LINE) // _PAGE) * _PAGE

    def first(self, turn: int) -> int:
        return self._data + 2 * turn * self.chunk

    def second(self, turn: int) -> int:
        return self._data + (2 * turn + 1) * self.chunk

    def letter_data(self, receiver: int, turn: int) -> int:
        return self._data + 4 * self.chunk + (2 * receiver + turn) * self.letter

    @property
    def published(self) -> int:
        """Whole pages: each mirror is mapped by itself."""
        return -(-(self._data + 4 * self.chunk + 2 * self.slots * self.letter) // _PAGE) * _PAGE

    def mirror(self, rank: int) -> int:
        """Where a rank of another host writes to."""
        return self.published * (1 + rank)

    @property
    def nbytes(self) -> int:
        return self.published * (1 + self.slots if self.several_hosts else 1)
