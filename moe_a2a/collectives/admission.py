"""Who takes part in a process group, and how that changes: founding, joining, activating, deactivating.

The data plane asks `roster()` at the beginning of an operation (cheap: one word if nothing has changed), and gives a
function that makes memory for a new incarnation and publishes where it is. It reports ranks that missed a budget with
`member.propose_failed` (not with on_failure="framework"); ranks that die are found by the watchers.

Everything here is agreed through the membership store (DESIGN.md D8): no rank is special, the death of rank 0 included.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from moe_a2a.collectives.address import Address
from moe_a2a.collectives.options import Options
from moe_a2a.errors import ExcludedFromView, JoinRefused, MoeA2AError, StoreAway
from moe_a2a.hosts import own_label
from moe_a2a.membership.group import found_group, join_group
from moe_a2a.membership.member import Member, MemberOptions
from moe_a2a.membership.view import Slot, State, View

#: How long activating and deactivating wait for the hosts of others to have the new view. One that does not answer for
#: so long is not online.
_SETTLE_S = 3.0
_LOOK_S = 0.2
_READY = State.READY


class Outcome(Enum):
    """Of a proposal."""

    REJECTED = 0
    APPLIED = 1
    DROPPED = 2  # applied, but for ranks that were lost meanwhile


@dataclass(frozen=True)
class Proposal:
    """What became of a wish to change who takes part.

    epoch: of the view that has it; if it was rejected, of the newest. dropped: ranks that were lost before the change
    was made. reason: why it was rejected.
    """

    outcome: Outcome
    epoch: int
    dropped: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Roster:
    """Who takes part, as the next operation should see it.

    incarnations: rank -> incarnation of those who take part, ascending; with on_failure="framework" also of those that
    are lost, until they are deactivated. ready: the same of those who wait to be activated. epoch: of the view; 0 while
    this process is alone.
    """

    slots: int
    epoch: int
    incarnations: Mapping[int, int]
    ready: Mapping[int, int]

    @property
    def active(self) -> tuple[bool, ...]:
        """[slots]"""
        return tuple(rank in self.incarnations for rank in range(self.slots))

    @property
    def size(self) -> int:
        """One past the highest slot that takes part."""
        return max(self.incarnations, default=-1) + 1


class Admission:
    """One process's place in who takes part in a group.

    prepare: called with the member, before its slot is taken (founders: right after), each time that this process comes
    with a new incarnation: makes fresh memory and publishes where it is under that incarnation. on_roster: called with
    each new roster, in any thread, epochs ascending.
    """

    def __init__(
        self,
        address: Address,
        rank: int,
        size: int,
        options: Options,
        timeout_s: float,
        prepare: Callable[[Member], None],
        on_roster: Callable[[Roster], None] = lambda roster: None,
    ) -> None:
        """Founds the group with all ranks, collectively, unless `options.joining`: then this process is alone.

        address: where the group is, or will be. rank, size: this process's slot, and the ranks that found the group or,
        for one that joins, what `size` says until it has. timeout_s: of founding. Raises as `found_group`.
        """
        self.address, self.rank, self.options = address, rank, options
        self._declared = size
        self._prepare, self._on_roster = prepare, on_roster
        self._told = threading.Lock()
        self._reported = -1
        self.slots = size if options.slots is None else options.slots
        #: None while this process is alone and has not tried to join.
        self.member: Member | None = None
        self.alone = options.joining
        self._kept: tuple[int, Roster] = (-1, Roster(self.slots, 0, {rank: 0}, {}))
        if not options.joining:
            meeting = address.bootstrap(rank, size)
            self.member = found_group(
                meeting,
                self._member_options(address.settle(meeting, timeout_s)),
                self.slots,
                charter=self._charter(),
                on_change=self._changed,
            )
            address.settled(self.member)
            prepare(self.member)
        self._tell(self.roster())

    # what is the case

    def roster(self) -> Roster:
        """Who takes part. Costs a look at one word if nothing has changed. Raises ExcludedFromView if this process was
        found failed, or deactivated."""
        if self.alone:
            return self._kept[1]
        member = self._own_member()
        sequence, roster = self._kept
        if member.page.sequence != sequence:
            sequence = member.page.sequence
            roster = self._read(member.view)
            self._kept = (sequence, roster)
            self._tell(roster)
        if roster.incarnations.get(self.rank) != member.incarnation:
            member.check()  # says why
        return roster

    @property
    def size(self) -> int:
        """What torch calls the size: one past the highest slot that takes part; while alone, what was declared."""
        return self._declared if self.alone else self._peek().size

    @property
    def epoch(self) -> int:
        return self._peek().epoch

    def active(self) -> tuple[bool, ...]:
        """[slots]"""
        return self._peek().active

    def peer_ready(self, ranks: Sequence[int]) -> list[bool]:
        """For each slot, whether a process waits there to be activated, or takes part already and lives: members that
        ask one after the other, while the first of them activates, hear the same. Asks nobody."""
        roster, page = self._peek(), self._own_member().page
        return [
            rank in roster.ready or (rank in roster.incarnations and page.takes_part(rank, roster.incarnations[rank]))
            for rank in ranks
        ]

    def held(self) -> int:
        """How many slots have a process that takes part or waits to be activated."""
        roster = self._peek()
        return len(roster.incarnations) + len(roster.ready)

    # what it wants

    def join(self, timeout_s: float | None = None) -> None:
        """Take slot `rank` and wait until a member has activated this process, `reconcile_s` unless told otherwise. A
        process that takes part already stays as it is. A group whose ranks are all gone goes on with this one.

        Raises JoinRefused, StoreAway, MoeA2AError if nobody activated it; it can be called again after that.
        """
        limit = self.options.reconcile_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        member = self.member
        if member is None:
            where = self.address.find(limit)
            self.member = member = join_group(
                self._member_options(where),
                self.rank,
                charter=self._charter(),
                on_change=self._changed,
                prepare=lambda member: self._come(member, deadline),
            )
            self.address.settled(member)
        else:
            view = member.refresh()
            if view.holds(self.rank, member.incarnation) and not self.alone:
                return
            if view.slots[self.rank].incarnation != member.incarnation or view.slots[self.rank].state is not _READY:
                member.rejoin(self.rank, prepare=lambda: self._come(member, deadline))
        self._revive(member)
        try:
            member.wait_active(max(deadline - time.monotonic(), _LOOK_S))
        except (ExcludedFromView, StoreAway):
            raise
        except MoeA2AError as error:
            raise MoeA2AError(
                f"nobody activated rank {self.rank} within {limit:g} s; let a member call activate([{self.rank}]), "
                "and join again"
            ) from error
        self.alone = False
        self.roster()

    def activate(self, ranks: Sequence[int], timeout_s: float | None = None) -> Proposal:
        """Let processes that have joined take part. Any member may ask; ranks that take part already stay as they are.

        Waits for those that are not ready, `reconcile_s` unless told otherwise; if one has not come by then nothing is
        changed. A rank that was ready and is lost before the change is made is dropped. When this returns, the next
        operation that any member begins has the new ranks.
        """
        limit = self.options.reconcile_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        wanted = sorted(set(ranks))
        refused = self._refusal(wanted)
        if refused is not None:
            return refused
        member = self._own_member()
        seen: dict[int, int] = {}
        while True:
            view = member.view
            taking = self._read(view).incarnations
            pending = [rank for rank in wanted if not view.slots[rank].takes_part]
            ready = {rank: view.slots[rank].incarnation for rank in pending if view.slots[rank].state is _READY}
            seen.update(ready)
            lost = [rank for rank in pending if rank in seen and rank not in ready]
            absent = [rank for rank in pending if rank not in seen]
            if not absent:
                if not ready and lost and len(lost) == len(wanted):
                    return self._rejected(f"slots {lost} were ready, and their processes are gone")
                try:
                    if ready:
                        view = member.activate(ready, (0,) * len(view.channels))
                except JoinRefused:  # one of them is gone: look again
                    with contextlib.suppress(StoreAway):
                        member.refresh()
                    continue
                except (ExcludedFromView, StoreAway) as error:
                    return self._rejected(str(error))
                member.settle(view.epoch, _SETTLE_S)
                return Proposal(Outcome.DROPPED if lost else Outcome.APPLIED, view.epoch, tuple(lost))
            if self.rank not in taking:
                return self._refusal(wanted) or self._rejected("this process takes no part")
            left = deadline - time.monotonic()
            if left <= 0:
                return self._rejected(
                    f"no process is ready in slots {absent} after {limit:g} s; start one there that joins the group"
                )
            _await_change(member, left)

    def deactivate(self, ranks: Sequence[int]) -> Proposal:
        """Take ranks out in order. When this returns, no operation that any member begins has them. Ranks that take no
        part are ignored; such a process may `join` again. Rejected if no rank would be left."""
        wanted = sorted(set(ranks))
        refused = self._refusal(wanted)
        if refused is not None:
            return refused
        member = self._own_member()
        view = member.view
        roster = self._read(view)
        leaving = {rank: roster.incarnations[rank] for rank in wanted if rank in roster.incarnations}
        if leaving.keys() >= {rank for rank in roster.incarnations if view.slots[rank].takes_part}:
            return self._rejected(f"without slots {sorted(leaving)} the group would have no rank; let one stay")
        try:
            if leaving:
                failed = {rank: i for rank, i in leaving.items() if not view.slots[rank].takes_part}
                if failed:
                    view = member.strike(failed)
                if leaving.keys() - failed:
                    view = member.leave({rank: i for rank, i in leaving.items() if rank not in failed})
        except (ExcludedFromView, StoreAway) as error:
            return self._rejected(str(error))
        member.settle(view.epoch, _SETTLE_S)
        return Proposal(Outcome.APPLIED, view.epoch)

    def close(self) -> None:
        if self.member is not None:
            self.member.close()

    # within

    def _own_member(self) -> Member:
        if self.member is None:
            raise ExcludedFromView(f"rank {self.rank} is alone; join() the group first")
        return self.member

    def _peek(self) -> Roster:
        """As `roster`, also for a process that takes no part."""
        if self.alone:
            return self._kept[1]
        member = self._own_member()
        if member.page.sequence != self._kept[0]:
            return self._read(member.view)
        return self._kept[1]

    def _read(self, view: View) -> Roster:
        takes = {rank: slot.incarnation for rank, slot in enumerate(view.slots) if self._counts(slot)}
        ready = {rank: slot.incarnation for rank, slot in enumerate(view.slots) if slot.state is _READY}
        return Roster(self.slots, view.epoch, takes, ready)

    def _counts(self, slot: Slot) -> bool:
        """Whether a slot takes part. With on_failure="framework" one that took part and failed still does (its first
        steps are known), until it is deactivated and has LEFT."""
        failed = slot.state is State.FAILED and bool(slot.first)
        return slot.takes_part or (failed and self.options.on_failure == "framework")

    def _changed(self, view: View) -> None:
        if not self.alone:
            self._tell(self._read(view))

    def _tell(self, roster: Roster) -> None:
        with self._told:
            if roster.epoch > self._reported:
                self._reported = roster.epoch
                self._on_roster(roster)

    def _refusal(self, ranks: Sequence[int]) -> Proposal | None:
        """Why this process cannot propose anything about these slots."""
        if not ranks:
            return self._rejected("no ranks were given")
        outside = [rank for rank in ranks if not 0 <= rank < self.slots]
        if outside:
            return self._rejected(f"slots {outside} do not exist; this group has slots 0 to {self.slots - 1}")
        try:
            self._own_member().check()
        except ExcludedFromView as error:
            return self._rejected(str(error))
        return None

    def _rejected(self, reason: str) -> Proposal:
        return Proposal(Outcome.REJECTED, self._peek().epoch, reason=reason)

    def _come(self, member: Member, deadline: float) -> None:
        member.refresh()
        self._wait_for_slot(member, deadline)
        self._prepare(member)

    def _wait_for_slot(self, member: Member, deadline: float) -> None:
        """With on_failure="framework" a lost rank keeps its slot until it is deactivated."""
        while True:
            slot = member.view.slots[self.rank]
            if slot.takes_part or not self._counts(slot):
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise JoinRefused(f"slot {self.rank} has a lost rank; let a member call deactivate([{self.rank}])")
            _await_change(member, left)

    def _revive(self, member: Member) -> None:
        """The first to come back to a group whose ranks are all gone activates itself."""
        if not member.view.ranks:
            with contextlib.suppress(ExcludedFromView, JoinRefused):  # another one was first
                member.activate({self.rank: member.incarnation}, (0,) * len(member.view.channels))

    def _charter(self) -> dict[str, object]:
        """What everybody who joins must have too."""
        return {"slots": self.slots, "on_failure": self.options.on_failure, "chunk_bytes": self.options.chunk_bytes}

    def _member_options(self, where: MemberOptions) -> MemberOptions:
        return replace(where, host=own_label(self.options.host), control_address=self.options.control_address)


def _await_change(member: Member, timeout_s: float) -> None:
    """Wait for a newer view, for a while."""
    epoch = member.view.epoch
    with contextlib.suppress(MoeA2AError):
        member.wait(lambda view: view.epoch > epoch, min(timeout_s, _LOOK_S))
