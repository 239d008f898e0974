"""A group's operations: each becomes a `CollectiveWork` that ends once, right or failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence

import torch

from moe_a2a.collectives.base import Base
from moe_a2a.collectives.board import Board, Lost, Missed, Places, Steps
from moe_a2a.collectives.driver import Driver
from moe_a2a.collectives.letters import Letters
from moe_a2a.collectives.options import Options
from moe_a2a.collectives.roster import Roll, Roster
from moe_a2a.collectives.rounds import Call, Moved, entered
from moe_a2a.collectives.signature import Signature
from moe_a2a.collectives.work import CollectiveWork
from moe_a2a.errors import ExcludedFromView, MoeA2AError, RankLost
from moe_a2a.transport.wait import Pause, named

COLLECTIVES = "collectives"
_WRITE_SHARE = 0.5
_LOOK_S = 1e-3
#: Share of an operation's budget in which the way to a rank has to be found: others wait for this one meanwhile.
_FIND_SHARE = 0.3
#: Operations after a failure in which a rank may still be reading what this one overwrites.
_UNSURE = 3


class Group:
    """Operations of one process in one group, from the time that it has come to it (or is alone) on."""

    def __init__(self, base: Base, options: Options, collective_s: float, message_s: float) -> None:
        self.base, self.options = base, options
        self.collective_s, self.message_s = collective_s, message_s
        self.roster = Roster(base, options)
        self._board = Board(base, self.roster, _WRITE_SHARE * min(collective_s, message_s))
        self._letters = Letters(self._board, self.roster)
        self.driver = Driver()
        self._places: tuple[Roll, Places] | None = None
        #: Of the next operation; None: what the others are at, as a process that has joined finds out.
        self._number: int | None = 1 if base.member is None or base.founded else None
        self._unsure = 0
        self._last: Roll | None = None

    def lead(self) -> None:
        """There is nobody to learn the number of the next operation from: those who come later learn this one's."""
        self._number = 1

    # beginning

    def collective(
        self,
        work: CollectiveWork,
        signature: Signature,
        body: Callable[[Call], Steps],
        after: Callable[[], None] | None,
        budget_s: float,
        alone: bool,
    ) -> None:
        """body: the operation. after: copies its result to where it belongs."""
        self.driver.begin(COLLECTIVES, work, self._run(work, signature, body, after, budget_s), alone)

    def send(
        self, work: CollectiveWork, to: int, data: torch.Tensor, dtype: torch.dtype, tag: int, alone: bool
    ) -> None:
        def steps(roll: Roll) -> Steps:
            yield from self._letters.send(roll, to, data, dtype, tag, self.message_s)

        self.driver.begin(("to", to), work, self._message(work, [to], steps, None), alone)

    def receive(
        self,
        work: CollectiveWork,
        source: int,
        data: torch.Tensor,
        dtype: torch.dtype,
        tag: int,
        after: Callable[[], None] | None,
        alone: bool,
    ) -> None:
        def steps(roll: Roll) -> Steps:
            yield from self._letters.receive(roll, source, data, dtype, tag, self.message_s)
            work.came_from(source)

        self.driver.begin(("from", source), work, self._message(work, [source], steps, after), alone)

    def receive_any(
        self,
        work: CollectiveWork,
        data: torch.Tensor,
        dtype: torch.dtype,
        tag: int,
        after: Callable[[], None] | None,
        alone: bool,
    ) -> None:
        """From whichever rank has sent something that no other receive is waiting for."""

        def steps(roll: Roll) -> Steps:
            deadline = time.monotonic() + self.message_s
            while True:
                free = [
                    rank for rank in roll.ranks if not self.driver.has(("from", rank)) and self._reaches(roll, rank)
                ]
                source = self._letters.waiting(roll, free)
                if source is not None:
                    break
                if time.monotonic() > deadline:
                    raise MoeA2AError(f"nobody sent anything within {self.message_s:g} s")
                yield
                if self.roster.changed(roll):
                    roll = yield from self._take_roll(self.message_s)
            yield from self._letters.receive(roll, source, data, dtype, tag, self.message_s)
            work.came_from(source)

        self.driver.begin("from anyone", work, self._message(work, [], steps, after), alone)

    # running

    def _run(
        self,
        work: CollectiveWork,
        signature: Signature,
        body: Callable[[Call], Steps],
        after: Callable[[], None] | None,
        budget_s: float,
    ) -> Steps:
        roll: Roll | None = None
        gone: tuple[int, ...] = ()
        failure: tuple[MoeA2AError, tuple[int, ...]] | None = None
        joining = self._number is None
        try:
            deadline = time.monotonic() + budget_s
            begun: set[int] = set()
            tried: list[tuple[Roll, Places]] = []
            back: Roll | None = None
            missed = 0
            while True:
                roll = back or (yield from self._take_roll(budget_s))
                if self._number is None:
                    self._number = yield from self._find_number(roll, missed, deadline)
                    continue  # the view may have changed meanwhile
                work.epoch, work.ranks = roll.epoch, roll.ranks
                call = Call(
                    self._board,
                    self.roster,
                    self._places_of(roll),
                    roll,
                    self._number,
                    signature,
                    budget_s,
                    not self._unsure,
                    frozenset(begun),
                    self._last,
                    tried,
                    back is not None,
                )
                try:
                    yield from body(call)
                    break
                except Moved as moved:
                    begun.update(moved.begun)
                    tried.append((roll, self._places_of(roll)))
                    back = moved.back
                    self._unsure = _UNSURE
                except Missed:
                    if not joining:
                        raise
                    # It came when the others had begun: it takes part from the next one on.
                    missed, self._number, back = call.number, None, None
                    tried.clear()
            if after is not None:
                after()
        except Lost as lost:
            failure = RankLost(f"{work.name}: {lost}", lost.ranks), lost.ranks
            gone = lost.ranks if lost.gone else ()
        except MoeA2AError as error:
            failure = error, ()
        except Exception as error:  # nothing may keep the operations behind this one from running
            failure = MoeA2AError(f"{work.name}: {error!r}"), ()
            failure[0].__cause__ = error
        if self._number is None:
            work.end(*(failure or (None, ())))
            return
        number, self._number, self._last = self._number, self._number + 1, roll
        if failure is None:
            self._unsure = max(0, self._unsure - 1)
            self._board.finish(number)
        else:
            self._unsure = _UNSURE
            self._board.finish(number, True, sum(1 << rank for rank in gone))
            if roll is not None and self._places is not None and self._places[0] is roll:
                yield from self._board.push_status(roll, self._places[1])
            with contextlib.suppress(ExcludedFromView):  # the next operation says so
                yield from self._reconcile(roll or self.roster.roll(), gone)
        work.end(*(failure or (None, ())))

    def _message(
        self,
        work: CollectiveWork,
        ranks: Sequence[int],
        steps: Callable[[Roll], Steps],
        after: Callable[[], None] | None,
    ) -> Steps:
        failure: tuple[MoeA2AError, tuple[int, ...]] | None = None
        try:
            roll = yield from self._take_roll(self.message_s)
            work.epoch, work.ranks = roll.epoch, roll.ranks
            for rank in ranks:
                if rank not in roll.incarnations:
                    raise Lost([rank], f"rank {rank} takes no part in epoch {roll.epoch}")
            yield from steps(roll)
            if after is not None:
                after()
        except Lost as lost:
            failure = RankLost(f"{work.name}: {lost}", lost.ranks), lost.ranks
        except MoeA2AError as error:
            failure = error, ()
        except Exception as error:
            failure = MoeA2AError(f"{work.name}: {error!r}"), ()
            failure[0].__cause__ = error
        work.end(*(failure or (None, ())))

    def _take_roll(self, budget_s: float) -> Generator[None, None, Roll]:
        """The roll of the newest view, once this process can reach all of it. Raises ExcludedFromView, Lost."""
        deadline = time.monotonic() + _FIND_SHARE * budget_s
        while True:
            roll = self.roster.roll()
            self.base.take_in_found()
            unknown = [rank for rank in roll.ranks if not self._reaches(roll, rank)]
            if not unknown:
                return roll
            lost = [rank for rank in unknown if self.roster.lost(roll, rank)]
            if not lost and time.monotonic() > deadline:
                self.roster.accuse(roll, unknown, f"rank {self.base.rank} did not find the way to it in time")
                lost = unknown
            if lost:
                raise Lost(lost, f"{named(lost)} cannot be reached")
            yield

    def _reaches(self, roll: Roll, rank: int) -> bool:
        return self.base.known.get(rank) == roll.incarnations[rank]

    def _places_of(self, roll: Roll) -> Places:
        if self._places is None or self._places[0] is not roll:
            self._places = (roll, Places(self._board, roll))
        return self._places[1]

    def _find_number(self, roll: Roll, after: int, deadline: float) -> Generator[None, None, int | None]:
        """The number of the operation, above `after`, that the others are at, or will be at next. Raises Lost."""
        places = self._places_of(roll)
        while (number := entered(self._board, places, roll.epoch, after)) is None:
            if time.monotonic() > deadline:
                raise Lost((), "no rank of the group has called anything since this one joined it")
            yield
            if self.roster.changed(roll):
                return None
        return number

    def _reconcile(self, roll: Roll, ranks: Sequence[int]) -> Steps:
        """After a failure: wait until the view is without the ranks that failed. Raises ExcludedFromView."""
        if self.options.on_failure != "reconcile":
            return
        deadline = time.monotonic() + self.options.reconcile_s
        mine = [rank for rank in ranks if rank in roll.incarnations]
        while not self.roster.masked(roll, mine) and time.monotonic() < deadline:
            self.roster.check()
            yield

    # failures

    @property
    def failure_pending(self) -> bool:
        """Whether a rank is lost that this process still counts on."""
        with contextlib.suppress(ExcludedFromView):
            roll = self.roster.roll()
            return any(self.roster.lost(roll, rank) for rank in roll.ranks)
        return True

    def sync(self) -> int:
        """Wait for a view without the ranks that are lost here, and go by it. Returns its epoch. Raises
        ExcludedFromView, MoeA2AError."""
        deadline = time.monotonic() + self.options.reconcile_s
        while True:
            roll = self.roster.sync()
            lost = [rank for rank in roll.ranks if self.roster.lost(roll, rank)]
            if not lost:
                return roll.epoch
            if time.monotonic() > deadline:
                raise MoeA2AError(
                    f"the view (epoch {roll.epoch}) still has {named(lost)} after {self.options.reconcile_s:g} s; "
                    "is the membership store away?"
                )
            time.sleep(_LOOK_S)

    def drain(self) -> None:
        """Wait until everything that has begun has ended."""
        pause = Pause()
        while not self.driver.idle:
            if self.driver.advance():
                pause.reset()
            else:
                pause.rest()

    def close(self) -> None:
        self.driver.close()
        self.base.close()
