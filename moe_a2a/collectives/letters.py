"""Messages between two ranks, in the order in which they were sent.

A sender has two places for each receiver, in its own region, which it uses in turn; the receiver says how many letters
it has taken. A message is one letter or several. A sender is done when its last letter lies there: the receiver need
not have come.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_a2a.collectives.board import Board, Lost, Steps, check_word
from moe_a2a.collectives.region import LETTER_WORDS, WORD
from moe_a2a.collectives.roster import Roll, Roster
from moe_a2a.collectives.signature import dtype_code, dtype_name
from moe_a2a.errors import InputError, MoeA2AError
from moe_a2a.transport.wait import CHECK_EVERY_S

_DTYPE_BITS = 8
MOST_TAG = (1 << 31) - 1


@dataclass
class _Pair:
    """Letters to or from one process. broken: why nothing more can follow, "" if it can."""

    incarnation: int
    count: int = 0
    broken: str = ""


@dataclass
class _Patience:
    """When a message has waited long enough."""

    budget_s: float
    started: float = field(default_factory=time.monotonic)
    checked: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether it is time to look at more than the other's words."""
        now = time.monotonic()
        if now - self.checked < CHECK_EVERY_S:
            return False
        self.checked = now
        return True

    def over(self) -> bool:
        return time.monotonic() - self.started > self.budget_s


class Letters:
    def __init__(self, board: Board, roster: Roster) -> None:
        self._board, self._roster = board, roster
        self._base, self._layout = board.base, board.base.layout
        self._out: dict[int, _Pair] = {}
        self._in: dict[int, _Pair] = {}

    def send(self, roll: Roll, to: int, data: torch.Tensor, dtype: torch.dtype, tag: int, budget_s: float) -> Steps:
        """data: [nbytes] uint8. Raises Lost, MoeA2AError."""
        pair = _pair(self._out, to, roll, "to")
        board, layout, me = self._board, self._layout, self._base.rank
        patience = _Patience(budget_s)
        size, sent = len(data), 0
        while True:
            while self._taken(roll, to) < pair.count - 1:
                yield
                if not patience.due():
                    continue
                gone, over = self._roster.gone(roll, to), patience.over()
                if (gone or over) and self._taken(roll, to) < pair.count - 1:
                    if sent:
                        pair.broken = "a message was sent in part"
                    if gone:
                        raise Lost([to], f"rank {to} is gone")
                    raise Lost([to], f"rank {to} took none of this rank's messages within {budget_s:g} s")
            turn = pair.count & 1
            part = data[sent : sent + layout.letter]
            record_at, data_at = layout.letter_record(to, turn), layout.letter_data(to, turn)
            board.data(me, data_at, len(part), torch.uint8).copy_(part)
            away = to in self._base.peers
            pair.count += 1
            sent += len(part)
            pair.broken = "a message was sent in part"
            if away:
                yield from board.push(roll, [(to, data_at, len(part))])
            lives = (self._base.incarnation, roll.incarnations[to])
            board.write_checked(record_at, (pair.count, size, tag << _DTYPE_BITS | dtype_code(dtype), *lives))
            if away:
                yield from board.push(roll, [(to, record_at, LETTER_WORDS * WORD)])
            if sent >= size:
                pair.broken = ""
                return

    def receive(
        self, roll: Roll, source: int, data: torch.Tensor, dtype: torch.dtype, tag: int, budget_s: float
    ) -> Steps:
        """data: [nbytes] uint8. Raises Lost, MoeA2AError, InputError if the message is another one than expected; it is
        then taken and dropped."""
        pair = _pair(self._in, source, roll, "from")
        patience = _Patience(budget_s)
        taken, problem = 0, ""
        expected = (len(data), tag << _DTYPE_BITS | dtype_code(dtype))
        while True:
            while (header := self._letter(roll, source, pair.count)) is None:
                yield
                if not patience.due():
                    continue
                gone, over = self._roster.gone(roll, source), patience.over()
                if (gone or over) and self._letter(roll, source, pair.count) is None:
                    if taken:
                        pair.broken = "a message came in part"
                    if gone:
                        raise Lost([source], f"rank {source} is gone, and had sent nothing more")
                    raise Lost([source], f"rank {source} sent nothing within {budget_s:g} s")
            size, kind = header
            if header != expected:
                problem = (
                    f"rank {source} sent {size} bytes of {dtype_name(kind & 0xFF)} with tag {kind >> _DTYPE_BITS}, "
                    f"and this receive is for {len(data)} bytes of {dtype_name(expected[1] & 0xFF)} with tag {tag}; "
                    "messages of two ranks are received in the order in which they were sent"
                )
            part = min(self._layout.letter, size - taken)
            if not problem:
                at = self._layout.letter_data(self._base.rank, pair.count & 1)
                data[taken : taken + part].copy_(self._board.data(source, at, part, torch.uint8))
            taken += part
            pair.count += 1
            ack = self._layout.ack(source)
            self._board.write_words(ack, (pair.count, roll.incarnations[source]))
            if source in self._base.peers:
                with contextlib.suppress(Lost):  # it sent this and is gone: what it sent counts
                    yield from self._board.push(roll, [(source, ack, 2 * WORD)])
            if taken >= size:
                break
        if problem:
            raise InputError(problem)

    def waiting(self, roll: Roll, ranks: Collection[int]) -> int | None:
        """One of these ranks whose next message has begun to arrive, if there is one."""
        for rank in ranks:
            pair = self._in.get(rank)
            count = pair.count if pair is not None and pair.incarnation == roll.incarnations[rank] else 0
            if self._letter(roll, rank, count) is not None:
                return rank
        return None

    def _taken(self, roll: Roll, rank: int) -> int:
        count, life = self._board.read_words(rank, self._layout.ack(self._base.rank), 2)
        return count if life == self._base.incarnation and rank in roll.incarnations else 0

    def _letter(self, roll: Roll, source: int, count: int) -> tuple[int, int] | None:
        """(bytes of the message, tag and dtype) of the letter after `count` others, if it is there."""
        at = self._layout.letter_record(self._base.rank, count & 1)
        number, size, kind, sender, receiver, check = self._board.read_words(source, at, LETTER_WORDS)
        record = (number, size, kind, sender, receiver)
        if number != count + 1 or (sender, receiver) != (roll.incarnations[source], self._base.incarnation):
            return None
        if check != check_word(record):
            return None
        if size > np.iinfo(np.int64).max:
            raise MoeA2AError(f"rank {source} announces a message of {size} bytes")
        return size, kind


def _pair(pairs: dict[int, _Pair], rank: int, roll: Roll, way: str) -> _Pair:
    pair = pairs.get(rank)
    if pair is None or pair.incarnation != roll.incarnations[rank]:
        pair = pairs[rank] = _Pair(roll.incarnations[rank])
    if pair.broken:
        raise Lost([rank], f"no message can go {way} rank {rank} any more: {pair.broken}")
    return pair
