"""What the ranks of a group show each other: entries, second records and statuses, and the data that these announce.

Inside a host they are read where they lie. To other hosts they are written with the Transfer Engine: data first, and
when that is complete the record (DESIGN.md D7). A rank withdraws its entry before it overwrites what the entry
announced, so that whoever has read can look once more whether that was what had been announced.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moe_a2a.collectives.base import Base
from moe_a2a.collectives.region import ENTRY_WORDS, STATUS_WORDS, WORD
from moe_a2a.collectives.roster import Roll, Roster
from moe_a2a.collectives.signature import RETURNED, SETTLED
from moe_a2a.errors import EngineError

Steps = Generator[None, None, None]
Words = npt.NDArray[np.uint64]
#: Bits of an entry's first word that hold the round; those above, up to `_WITHDRAWN`, the number of the operation.
ROUND_BITS = 16
SIGNATURE_WORD = 2
_WITHDRAWN = 1 << 63


def _bits(word: int, bits: int) -> Words:
    """Of an entry."""
    return np.array([bits if i == word else 0 for i in range(ENTRY_WORDS)], dtype=np.uint64)


_IS_SETTLED, _IS_RETURNED = _bits(SIGNATURE_WORD, SETTLED), _bits(SIGNATURE_WORD, RETURNED)
_IS_WITHDRAWN = _bits(0, _WITHDRAWN)
_SEED = 0x6D6F655F61326131
_MASK = (1 << 64) - 1
#: How long a rank that cannot be written to may be on its way out of the view.
_NEWS_S = 0.5


class Lost(Exception):
    """Ranks that an operation cannot do without. Ends it. gone: they failed, and have not just gone on without this
    rank."""

    def __init__(self, ranks: Iterable[int], why: str, gone: bool = True) -> None:
        super().__init__(why)
        self.ranks, self.gone = tuple(sorted(ranks)), gone


class Missed(Lost):
    """The others have made the whole operation without this rank."""

    def __init__(self, ranks: Iterable[int], why: str) -> None:
        super().__init__(ranks, why, gone=False)


@dataclass(frozen=True)
class Status:
    """finished: the last operation that a rank is done with; failed: the last that failed there, with a bit in `mask`
    for each rank that was lost (none: for another reason)."""

    finished: int
    failed: int
    mask: int


class Places:
    """Indices of the words of a roll's other ranks. entries, seconds: [2 turns] of [ranks, words]."""

    def __init__(self, board: Board, roll: Roll) -> None:
        layout, me = board.base.layout, board.base.rank
        self.others = [rank for rank in roll.ranks if rank != me]
        starts = np.array([board.start(rank) for rank in self.others], dtype=np.int64).reshape(-1, 1)

        def words(offset: int, count: int) -> npt.NDArray[np.int64]:
            return (starts + offset) // WORD + np.arange(count)

        self.entries = [words(layout.entry(turn), ENTRY_WORDS) for turn in (0, 1)]
        self.stamps = [places[:, 0].copy() for places in self.entries]
        self.seconds = [words(layout.second_record(turn), 2) for turn in (0, 1)]
        self.statuses = words(layout.status, STATUS_WORDS)
        self.away = [rank for rank in self.others if rank in board.base.peers]


class Board:
    def __init__(self, base: Base, roster: Roster, write_budget_s: float) -> None:
        self.base, self._roster, self._budget = base, roster, write_budget_s
        self.words: Words = np.frombuffer(base.memory.bytes, dtype=np.uint64)
        self._own = self.start(base.rank)
        self._tensors: dict[torch.dtype, torch.Tensor] = {}
        self._fence = threading.Lock()
        self._finished = self._failed = self._mask = 0

    def start(self, rank: int) -> int:
        """Where what a rank publishes begins, as an offset in this process's view of memory."""
        base = self.base
        if rank in base.peers:
            return base.memory.position(base.rank, base.layout.mirror(rank))
        return base.memory.position(rank, 0)

    def data(self, rank: int, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count], at an offset of what a rank publishes. To be written to if that is this rank."""
        whole = self._tensors.get(dtype)
        if whole is None:
            whole = self._tensors[dtype] = self.base.memory.table(1, dtype).view(-1)
        first = (self.start(rank) + offset) // dtype.itemsize
        return whole[first : first + count]

    # own records

    def withdraw(self, turn: int, stamp: int) -> None:
        self.words[(self._own + self.base.layout.entry(turn)) // WORD] = stamp | _WITHDRAWN
        with self._fence:  # a locked instruction: later looks at others' words come after this store
            pass

    def enter(self, turn: int, entry: Sequence[int]) -> None:
        self._write_record(self.base.layout.entry(turn), entry)

    def announce_second(self, turn: int, stamp: int, epoch: int) -> None:
        self._write_record(self.base.layout.second_record(turn), (stamp, epoch))

    def _write_record(self, offset: int, record: Sequence[int]) -> None:
        at = (self._own + offset) // WORD
        for place in range(len(record) - 1, -1, -1):  # the first word last: it is what readers look for
            self.words[at + place] = record[place]

    def finish(self, number: int, failed: bool = False, mask: int = 0) -> None:
        self._finished = number
        if failed:
            self._failed, self._mask = number, mask
        self.write_checked(self.base.layout.status, (self._finished, self._failed, self._mask, self.base.incarnation))

    def write_words(self, offset: int, words: Sequence[int]) -> None:
        """Into this rank's region."""
        at = (self._own + offset) // WORD
        for place, word in enumerate(words):
            self.words[at + place] = word

    def write_checked(self, offset: int, record: Sequence[int]) -> None:
        """A record and a word by which readers see that it is whole."""
        self.write_words(offset, (*record, check_word(record)))

    def read_words(self, rank: int, offset: int, count: int) -> list[int]:
        at = (self.start(rank) + offset) // WORD
        words: list[int] = self.words[at : at + count].tolist()
        return words

    # others' records

    def status(self, places: Places, index: int, incarnation: int) -> Status | None:
        """Of `places.others[index]`; None if there is none of this process, or if it is being written."""
        finished, failed, mask, life, check = (int(word) for word in self.words[places.statuses[index]])
        if life != incarnation or check != check_word((finished, failed, mask, life)):
            return None
        return Status(finished, failed, mask)

    def pending(self, places: npt.NDArray[np.int64], record: Words) -> npt.NDArray[np.bool_]:
        """[ranks], whose record is not this one. places: [ranks, words]."""
        found: npt.NDArray[np.bool_] = (self.words[places] != record).any(axis=1)
        return found

    def has_been(self, places: Places, turn: int, entry: Words) -> bool:
        """Whether all others have published this entry, even if some have withdrawn it."""
        return not differ(self.words[places.entries[turn]], entry, withdrawn=True).any()

    def went_on(self, places: Places, incarnations: Mapping[int, int], turn: int, entry: Words) -> bool:
        """Whether some rank of the view of this entry, of the first round of an operation, has gone on in that view, or
        will: it says so, or has published what comes later."""
        stamp, epoch = int(entry[0]), int(entry[1])
        entries, stamps = self.words[places.entries[turn]], self.words[places.stamps[1 - turn]].tolist()
        seconds = self.words[places.seconds[turn]].tolist()
        number = stamp >> ROUND_BITS
        for i in np.flatnonzero(~differ(entries, entry)).tolist():
            status = self.status(places, i, incarnations[places.others[i]])
            failed = status is not None and status.failed == number
            finished = status is not None and status.finished >= number
            if not failed and (
                finished
                or int(entries[i, SIGNATURE_WORD]) & SETTLED
                or seconds[i] == [stamp, epoch]
                or stamp < stamps[i] < _WITHDRAWN
            ):
                return True
        return False

    # other hosts

    def push(self, roll: Roll, parts: Sequence[tuple[int, int, int]]) -> Steps:
        """Write (rank, offset, nbytes) of what this rank publishes to ranks of other hosts, until all of it is there.
        Raises Lost. What a rank that has left in order does not take any more is not missed."""
        base, writes = self.base, []
        engine = base.engine
        failed: dict[int, str] = {}
        for rank, offset, nbytes in parts:
            if nbytes and rank not in failed:
                assert engine is not None  # of every group that has peers on other hosts
                remote = base.peers[rank]
                target = remote.address + base.layout.mirror(base.rank) + offset
                try:
                    source = base.memory.address(base.rank, offset)
                    writes.append((rank, engine.submit_write(remote.engine, source, target, nbytes)))
                except EngineError as error:
                    failed[rank] = str(error)
        started = time.monotonic()
        while writes:
            still = []
            for rank, batch in writes:
                assert engine is not None
                try:
                    if not engine.is_done(batch, base.peers[rank].engine):
                        if self._roster.gone(roll, rank):
                            failed[rank] = "it is gone"
                        elif time.monotonic() - started > self._budget:
                            failed[rank] = f"a write did not end within {self._budget:g} s"
                        else:
                            still.append((rank, batch))
                except EngineError as error:
                    failed[rank] = str(error)
            writes = still
            if writes:
                yield
        # One that has just left has closed its memory, and word of it may still be under way.
        started = time.monotonic()
        while any(not self._roster.gone(roll, rank) for rank in failed) and time.monotonic() - started < _NEWS_S:
            yield
        lost = {rank: why for rank, why in failed.items() if not self._roster.left(roll, rank)}
        if lost:
            why = "; ".join(f"rank {rank}: {text}" for rank, text in lost.items())
            self._roster.accuse(roll, lost, f"cannot be written to: {why}")
            raise Lost(lost, f"ranks of other hosts could not be written to ({why})")

    def push_entry(self, roll: Roll, places: Places, turn: int) -> Steps:
        offset = self.base.layout.entry(turn)
        yield from self.push(roll, [(rank, offset, ENTRY_WORDS * WORD) for rank in places.away])

    def push_second(self, roll: Roll, places: Places, turn: int) -> Steps:
        offset = self.base.layout.second_record(turn)
        yield from self.push(roll, [(rank, offset, 2 * WORD) for rank in places.away])

    def push_status(self, roll: Roll, places: Places) -> Steps:
        """To those that are not lost."""
        offset = self.base.layout.status
        for rank in places.away:
            if not self._roster.lost(roll, rank):
                try:
                    yield from self.push(roll, [(rank, offset, STATUS_WORDS * WORD)])
                except Lost:  # then it has been told of, and this rank has its own failure to report
                    continue


def differ(entries: Words, entry: Words, withdrawn: bool = False, returned: bool = True) -> npt.NDArray[np.bool_]:
    """[ranks], which of these entries, [ranks, words], are not that one (or those), settled or not. withdrawn,
    returned: one that was withdrawn, or that a rank came back to, is still that one."""
    ignored = _IS_SETTLED | (_IS_WITHDRAWN if withdrawn else 0) | (_IS_RETURNED if returned else 0)
    found: npt.NDArray[np.bool_] = (((entries ^ entry) & ~ignored) != 0).any(axis=1)
    return found


def check_word(record: Sequence[int]) -> int:
    """A sum over a record's words, for readers to see that it is whole."""
    total = _SEED
    for word in record:
        total = (total * 0x100000001B3 ^ word) & _MASK
    return total
