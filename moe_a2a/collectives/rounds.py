"""One operation of all ranks, round by round: everybody enters, everybody sees that everybody has, data are read.

A round of an operation is announced by an entry: its number, the epoch of the view, and what is called. Whoever sees
the same entry of all others goes on. So all ranks of an operation have one view and call the same thing, and what the
last round but one announced may be overwritten, because everybody has come to the round after it.

If the view changes while a rank waits in the first round, it withdraws its entry and looks once more. If all others
have published theirs, somebody may have gone on, and so will this rank: it says that the view is settled. Otherwise it
enters again, with the new view. Inside a host nobody can have gone on then. Between hosts entries arrive one after the
other, and somebody may have seen all of them before this rank has: who has entered again, and sees that the view before
is settled, or that a rank has gone on in it, goes back to it. A rank that goes on in one view is missing in the other
one, so that nobody goes on there. If a rank failed, the operation fails instead, on all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from moe_a2a.collectives.board import ROUND_BITS, Board, Lost, Missed, Places, Status, Steps, Words, differ
from moe_a2a.collectives.options import MOST_SLOTS
from moe_a2a.collectives.roster import Roll, Roster
from moe_a2a.collectives.signature import RETURNED, SETTLED, Signature, describe
from moe_a2a.errors import InputError, MoeA2AError
from moe_a2a.transport.wait import CHECK_EVERY_S, named

Pending = Callable[[], npt.NDArray[np.bool_]]
_STAMP = (1 << 63) - 1  # without the bit of entries that were withdrawn
MOST_ROUNDS = (1 << ROUND_BITS) - 2
#: Once a rank has given up for a reason of its own, the others look this long for what that may have been.
_REASON_S = 1.0
#: What a rank of another host has written, or is about to write, is there after so long.
_UNDER_WAY_S = 1.0


class Moved(Exception):
    """The view has changed before the operation began: begin again. begun: ranks that had entered it. back: the view in
    which it runs after all, None for the newest."""

    def __init__(self, begun: Collection[int] = (), back: Roll | None = None) -> None:
        super().__init__()
        self.begun, self.back = begun, back


class Call:
    """One operation in one view.

    number: of the operation, the same on all ranks. roll: who takes part. sure: whether all ranks are known to have
    finished the operations before, so that their data may be overwritten without a word to other hosts. begun: ranks
    of which this one knows that they have entered it in an earlier view; those of other hosts may have ended it.
    before: who took part in the last operation. tried: views in which this rank has entered this operation before, with
    their places. returned: it came back to this view, and stays.
    """

    def __init__(
        self,
        board: Board,
        roster: Roster,
        places: Places,
        roll: Roll,
        number: int,
        signature: Signature,
        budget_s: float,
        sure: bool,
        begun: Collection[int],
        before: Roll | None,
        tried: Sequence[tuple[Roll, Places]] = (),
        returned: bool = False,
    ) -> None:
        self.board, self._roster, self._places, self.roll = board, roster, places, roll
        self.number, self._signature, self._budget, self._sure = number, signature, budget_s, sure
        self._begun, self._before, self._tried = begun, before, tried
        self._flags = SETTLED | RETURNED if returned else 0
        self.ranks, self.me = roll.ranks, board.base.rank
        self.layout = board.base.layout
        self._round = -1
        self._turn = 0
        self._stamp = 0
        self._entry: tuple[int, ...] = ()
        self._seen: Words = np.zeros((0, 0), dtype=np.uint64)
        self._given_up = 0.0

    @property
    def others(self) -> Collection[int]:
        return self._places.others

    @property
    def first(self) -> int:
        """Offset of the data that entries of this round announce."""
        return self.layout.first(self._turn)

    @property
    def second(self) -> int:
        return self.layout.second(self._turn)

    def part(self, rank: int, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self.board.data(rank, offset, count, dtype)

    def need(self, rank: int) -> Steps:
        """Raises Lost, on all ranks, if one without which this operation is pointless takes no part."""
        if rank not in self.roll.incarnations:
            yield from self.meet()
            raise Lost([rank], f"rank {rank} takes no part in epoch {self.roll.epoch}")

    def need_pieces(self, pieces: Mapping[int, torch.Tensor]) -> None:
        """Raises MoeA2AError if there is none for a rank that takes part: the group has grown since they were made."""
        for rank in self.ranks:
            if rank not in pieces:
                raise MoeA2AError(
                    f"{self._signature} has no piece for rank {rank}, which joined (epoch {self.roll.epoch}); "
                    "call it again with a piece for each rank up to size()"
                )

    # rounds

    def meet(self, fill: Callable[[], None] | None = None, away: Mapping[int, tuple[int, int]] | None = None) -> Steps:
        """Enter the next round and wait until all have.

        fill: writes this rank's data to `first`. away: for ranks of other hosts, (start, nbytes) in it that they read.
        Raises Lost, Moved, InputError (ranks call different things).
        """
        self._round += 1
        board, turn = self.board, (self.number + self._round) & 1
        self._turn, self._stamp = turn, self.number << ROUND_BITS | self._round
        self._entry = self._entry_of(self.roll)
        record = np.array(self._entry, dtype=np.uint64)
        if self._round == 0 and not self._sure:
            yield from self._let_others_finish()
        board.withdraw(turn, self._stamp)
        if self._places.away:
            if not self._sure:
                yield from board.push_entry(self.roll, self._places, turn)
            if fill is not None:
                fill()
            parts = [(rank, self.first + start, nbytes) for rank, (start, nbytes) in (away or {}).items()]
            yield from board.push(self.roll, [part for part in parts if part[0] in board.base.peers])
            board.enter(turn, self._entry)
            yield from board.push_entry(self.roll, self._places, turn)
        else:
            if fill is not None:
                fill()
            board.enter(turn, self._entry)
        places = self._places.entries[turn]
        self._seen = board.words[places]
        if (self._seen == record).all():
            return

        def pending() -> npt.NDArray[np.bool_]:
            self._seen = board.words[places]
            return differ(self._seen, record)

        yield from self._wait(pending, "", entering=True)

    def show(self, nbytes: Mapping[int, tuple[int, int]]) -> Steps:
        """Announce what this rank has written to `second`. nbytes: as `away` of `meet`."""
        board = self.board
        parts = [(rank, self.second + start, count) for rank, (start, count) in nbytes.items()]
        if self._places.away:
            yield from board.push(self.roll, [part for part in parts if part[0] in board.base.peers])
        board.announce_second(self._turn, self._stamp, self.roll.epoch)
        if self._places.away:
            yield from board.push_second(self.roll, self._places, self._turn)

    def see(self) -> Steps:
        """Wait until all others have announced theirs. Raises Lost."""
        board = self.board
        places, record = self._places.seconds[self._turn], np.array([self._stamp, self.roll.epoch], dtype=np.uint64)
        if (board.words[places] == record).all():
            return
        yield from self._wait(lambda: board.pending(places, record), ", second part", entering=False)

    def confirm(self, second: bool = False) -> None:
        """After reading: raises Lost if somebody has overwritten meanwhile what was read. second: in `second`."""
        if not self.others:
            return
        if second:  # who has come back to this view has said so meanwhile, and is in this round all the same
            stood = self.board.words[self._places.stamps[self._turn]] == np.uint64(self._stamp)
        else:
            stood = ~differ(self.board.words[self._places.entries[self._turn]], self._seen, returned=False)
        if not stood.all():
            late = [rank for rank, stands in zip(self.others, stood, strict=True) if not stands]
            raise Lost(late, f"{named(late)} went on before this rank had read", gone=False)

    # waiting

    def _let_others_finish(self) -> Steps:
        """After a failure: wait until nobody looks any more for what this rank published in the operation before the
        last, which it is about to overwrite. Those who took part come to the last one, or fail there, at once."""
        started = checked = time.monotonic()
        behind = [
            rank
            for rank in self.others
            if self._before is not None and self._before.incarnations.get(rank) == self.roll.incarnations[rank]
        ]
        while behind:
            behind = [rank for rank in behind if not self._has_come_to(rank, self.number - 1)]
            if not behind:
                return
            yield
            now = time.monotonic()
            if now - checked >= CHECK_EVERY_S:
                checked = now
                behind = [rank for rank in behind if not self._roster.gone(self.roll, rank)]
                if now - started > self._budget:
                    return

    def _has_come_to(self, rank: int, number: int) -> bool:
        """Whether a rank has entered this operation or a later one, or has finished the one before."""
        at = self._places.others.index(rank)
        for turn in (0, 1):
            if int(self.board.words[self._places.stamps[turn][at]]) & _STAMP >= number << ROUND_BITS:
                return True
        status = self.board.status(self._places, at, self.roll.incarnations[rank])
        return status is not None and status.finished >= number - 1

    def _wait(self, pending: Pending, what: str, entering: bool) -> Steps:
        started = checked = time.monotonic()
        while True:
            yield
            missing = pending()
            if not missing.any():
                return
            now = time.monotonic()
            if now - checked < CHECK_EVERY_S:
                continue
            checked = now
            if entering:
                self._compare()
                if self._round == 0 and not self._flags:
                    self._look_back()
                    if self._roster.changed(self.roll):
                        yield from self._settle_or_follow()
                        continue
            lost = {rank for rank in self.others if self._roster.lost(self.roll, rank)}
            statuses = [
                self.board.status(self._places, i, self.roll.incarnations[r]) for i, r in enumerate(self.others)
            ]
            later = {rank for rank in self.others if self._is_later(rank)}
            # Evidence first, then another look: what came before that evidence has been seen by then.
            missing = pending()
            waiting = [rank for i, rank in enumerate(self.others) if missing[i]]
            if not waiting:
                return
            absent = lost.intersection(waiting)
            if absent:
                raise Lost(absent, f"{named(sorted(absent))} failed")
            for rank, status in zip(self.others, statuses, strict=True):
                if status is not None:
                    self._heed(rank, status, rank in waiting, now)
            ahead = later.intersection(waiting)
            if ahead:
                why = f"{named(sorted(ahead))} went on without this rank"
                raise Missed(ahead, why) if self._round == 0 else Lost(ahead, why, gone=False)
            if now - started > self._budget:
                evidence = f"{self._signature}{what}: sent nothing within {self._budget:g} s"
                silent = [rank for rank in waiting if rank not in self._begun]
                self._roster.accuse(self.roll, silent, evidence)
                raise Lost(silent or waiting, f"{named(waiting)} did not come within {self._budget:g} s", bool(silent))

    def _heed(self, rank: int, status: Status, waiting: bool, now: float) -> None:
        """Raise what another rank's status means for this operation, if anything."""
        failed = status.failed == self.number
        if failed and status.mask:
            ranks = _ranks(status.mask)
            raise Lost(ranks, f"rank {rank} reports that {named(ranks)} failed")
        if failed:
            self._given_up = self._given_up or now
            if now - self._given_up > _REASON_S:
                raise MoeA2AError(f"{self._signature}: rank {rank} gave up this operation; its own error says why")
        elif waiting and status.finished >= self.number:
            why = f"rank {rank} went on without this rank"
            if status.failed > self.number and status.mask:
                raise Lost(_ranks(status.mask), why)
            raise Missed([rank], why) if self._round == 0 else Lost([rank], why, gone=False)

    def _is_later(self, rank: int) -> bool:
        """Whether a rank has entered a later operation in this view, or in one after it."""
        at = self._places.others.index(rank)
        for turn in (0, 1):
            stamp, epoch, *_ = self.board.words[self._places.entries[turn][at]].tolist()
            if stamp < 1 << 63 and stamp >> ROUND_BITS > self.number and epoch >= self.roll.epoch:
                return True
        return False

    def _compare(self) -> None:
        """Raise InputError if a rank calls something else."""
        found = self.board.words[self._places.entries[self._turn]]
        for rank, (stamp, _, *words) in zip(self.others, found.tolist(), strict=True):
            if stamp == self._stamp and self._signature.differs((words[0], words[1])):
                raise InputError(
                    f"ranks call different things: this rank (rank {self.me}) {self._signature}, rank {rank} "
                    f"{describe((words[0], words[1]))}; all ranks have to make the same calls in the same order"
                )

    def _entry_of(self, roll: Roll) -> tuple[int, ...]:
        """What this rank says in this round of a view."""
        first, second = self._signature.words(roll.digest)
        return (self._stamp, roll.epoch, first | self._flags, second)

    def _look_back(self) -> None:
        """Raises Moved if a rank goes on in a view that this one has left."""
        for roll, places in self._tried:
            entry = np.array(self._entry_of(roll), dtype=np.uint64)
            if self.board.went_on(places, roll.incarnations, self._turn, entry):
                raise Moved(back=roll)

    def _settle_or_follow(self) -> Steps:
        """There is a new view. If another rank may have gone on in this round, this one will too, and what the new view
        says is for the next operation. Else raises Lost if a rank of this operation failed, and Moved if not; returns
        if the view is the same after all."""
        board = self.board
        board.withdraw(self._turn, self._stamp)
        if (yield from self._all_have_entered()):
            self._flags = SETTLED
            self._entry = self._entry_of(self.roll)
            board.enter(self._turn, self._entry)
            if self._places.away:
                yield from board.push_entry(self.roll, self._places, self._turn)
            return
        roll = self._roster.roll()
        failed = [rank for rank in self.others if self._roster.lost(self.roll, rank)]
        if failed:
            raise Lost(failed, f"{named(failed)} failed")
        if (roll.epoch, roll.digest) == (self.roll.epoch, self.roll.digest):
            self.roll = roll
            self.board.enter(self._turn, self._entry)
            return
        entries = self.board.words[self._places.stamps[self._turn]].tolist()
        raise Moved([rank for rank, stamp in zip(self.others, entries, strict=True) if stamp == self._stamp])

    def _all_have_entered(self) -> Generator[None, None, bool]:
        """Whether all others have published their entries. If the new view is without this rank, somebody who has seen
        all of them may have taken it out after this operation; then those of other hosts may be under way."""
        entry, started = np.array(self._entry, dtype=np.uint64), time.monotonic()
        while not self.board.has_been(self._places, self._turn, entry):
            under_way = self._places.away and time.monotonic() - started < _UNDER_WAY_S
            if not (under_way and self._roster.outside):
                return False
            yield
        return True


def entered(board: Board, places: Places, epoch: int, after: int) -> int | None:
    """The lowest number, above `after`, of an operation that others have entered since this epoch, None if there is
    none."""
    found = [row for turn in (0, 1) for row in board.words[places.entries[turn]].tolist()]
    numbers = [row[0] >> ROUND_BITS for row in found if row[1] >= epoch and row[0] < 1 << 63]
    return min((number for number in numbers if number > after), default=None)


def _ranks(mask: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(MOST_SLOTS) if mask >> rank & 1)
