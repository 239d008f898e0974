"""Letting processes into a process group, and taking them out in order: what a member may propose to the others.

Agreed through the membership store (DESIGN.md D8): no rank is special, the death of rank 0 included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from moe_a2a.errors import ExcludedFromView, JoinRefused, MoeA2AError, StoreAway
from moe_a2a.membership.member import Member
from moe_a2a.membership.view import State

#: How long activating and deactivating wait for the other hosts to have the new view. A host that does not answer for
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


class Admission:
    """What one process may ask of its group.

    slots: of the group. patience_s: how long `activate` waits for processes to be ready. member_of: gives this
    process's member; None while it is alone.
    """

    def __init__(self, slots: int, patience_s: float, member_of: Callable[[], Member | None]) -> None:
        self.slots, self._patience, self._member_of = slots, patience_s, member_of

    def peer_ready(self, ranks: Sequence[int]) -> list[bool]:
        """For each slot, whether a process waits there to be activated, or takes part already and lives: members that
        ask one after the other, while the first of them activates, hear the same. Asks nobody."""
        member = self._member_of()
        if member is None:
            return [False] * len(ranks)
        slots, page = member.view.slots, member.page
        return [
            0 <= rank < len(slots)
            and (slots[rank].state is _READY or slots[rank].takes_part)
            and not page.is_dead(rank, slots[rank].incarnation)
            for rank in ranks
        ]

    def held(self) -> int:
        """How many slots have a process that takes part or waits to be activated."""
        return sum(self.peer_ready(range(self.slots)))

    def activate(self, ranks: Sequence[int], patience_s: float | None = None) -> Proposal:
        """Let processes that have joined take part. Any member may ask; ranks that take part already stay as they are.

        Waits for those that are not ready; if one has not come in time then nothing is changed. A rank that was ready
        and is lost before the change is made is dropped. When this returns every member's page has the new view.
        """
        limit = self._patience if patience_s is None else patience_s
        deadline = time.monotonic() + limit
        wanted = sorted(set(ranks))
        member = self._member_of()
        refused = self._refusal(member, wanted)
        if refused or member is None:
            return self._rejected(refused)
        seen: set[int] = set()
        while True:
            view = member.view
            pending = [rank for rank in wanted if not view.slots[rank].takes_part]
            ready = {rank: view.slots[rank].incarnation for rank in pending if view.slots[rank].state is _READY}
            seen.update(ready)
            lost = tuple(rank for rank in pending if rank in seen and rank not in ready)
            absent = [rank for rank in pending if rank not in seen]
            if lost == tuple(wanted):
                return self._rejected(f"slots {list(lost)} were ready, and their processes are gone")
            if not absent:
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
                return Proposal(Outcome.DROPPED if lost else Outcome.APPLIED, view.epoch, lost)
            refused = self._refusal(member, wanted)
            if refused:
                return self._rejected(refused)
            left = deadline - time.monotonic()
            if left <= 0:
                return self._rejected(
                    f"no process is ready in slots {absent} after {limit:g} s; start one there that joins the group"
                )
            _await_change(member, view.epoch, min(left, _LOOK_S))

    def deactivate(self, ranks: Sequence[int]) -> Proposal:
        """Take ranks out in order, those that failed too. When this returns no member's page has them. Ranks that take
        no part are ignored. Rejected if no rank would be left."""
        wanted = sorted(set(ranks))
        member = self._member_of()
        refused = self._refusal(member, wanted)
        if refused or member is None:
            return self._rejected(refused)
        view = member.view
        if not set(view.ranks) - set(wanted):
            return self._rejected(f"without slots {wanted} the group would have no rank; let one stay")
        failed = [rank for rank in wanted if view.slots[rank].state is State.FAILED]
        leaving = [rank for rank in wanted if view.slots[rank].takes_part]
        try:
            if failed:
                view = member.strike(view.incarnations(failed))
            if leaving:
                view = member.leave(view.incarnations(leaving))
        except (ExcludedFromView, StoreAway) as error:
            return self._rejected(str(error))
        hosts = [slot.endpoint.host for rank in leaving if (slot := view.slots[rank]).endpoint is not None]
        member.settle(view.epoch, _SETTLE_S, hosts)
        return Proposal(Outcome.APPLIED, view.epoch)

    def revive(self) -> bool:
        """For a process that has taken a slot and waits: if all ranks of the group are gone, it goes on with this one.
        The first of several that come back activates itself, and may then activate the others. Returns whether this
        one was the first. Raises StoreAway."""
        member = self._member_of()
        if member is None or member.view.ranks:
            return False
        with contextlib.suppress(ExcludedFromView, JoinRefused):  # another one was first
            member.activate({member.rank: member.incarnation}, (0,) * len(member.view.channels))
            return True
        return False

    def _refusal(self, member: Member | None, ranks: Sequence[int]) -> str:
        """Why this process cannot propose anything about these slots; "" if it can."""
        if not ranks:
            return "no ranks were given"
        outside = [rank for rank in ranks if not 0 <= rank < self.slots]
        if outside:
            return f"slots {outside} do not exist; this group has slots 0 to {self.slots - 1}"
        if member is None:
            return "this process is alone; let it join the group first"
        try:
            member.check()
        except ExcludedFromView as error:
            return str(error)
        return ""

    def _rejected(self, reason: str) -> Proposal:
        member = self._member_of()
        return Proposal(Outcome.REJECTED, member.page.epoch if member is not None else 0, reason=reason)


def _await_change(member: Member, epoch: int, timeout_s: float) -> None:
    """Wait for a view after `epoch`, for a while."""
    with contextlib.suppress(MoeA2AError):
        member.wait(lambda view: view.epoch > epoch, timeout_s)
