"""Who takes part in a step, and waits that end as soon as the one that is waited for is lost (DESIGN.md D5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from moe_a2a.errors import ExcludedFromView
from moe_a2a.membership.member import Member
from moe_a2a.membership.view import View
from moe_a2a.step import Roll, Step
from moe_a2a.transport.progress import Progress, driving
from moe_a2a.transport.wait import CHECK_EVERY_S, Pause
from moe_a2a.transport.wire import Record, Spot

K = TypeVar("K", bound=Hashable)
#: What a rank or its host said of itself is believed for so many seconds.
_FRESH_S = 0.7
#: Share of the time-out: a host that has not been heard of for so long has vanished, once one of its ranks is missing.
_SILENT_SHARE = 0.4
#: The same for a rank that waits itself, from the beginning of the wait for it.
_LONGEST_SHARE = 1.25
#: Tells the group that a process failed: rank, incarnation, evidence.
Accuse = Callable[[int, int, str], None]


@dataclass
class Awaited:
    """What a wait has to know of one that does not come at once.

    rank: whom `times` counts the wait for. gone: tells that it will not come. blame: the rank to be accused if it does
    not come in time, None for nobody.
    """

    rank: int
    gone: Callable[[], bool]
    blame: Callable[[], int | None]


@dataclass(frozen=True)
class _Members:
    """Who takes part in the steps `since` to `until` of a channel, by one view. missing: those of them known to
    be lost."""

    epoch: int
    since: int
    until: float
    incarnations: dict[int, int]
    hosts: tuple[tuple[int, ...], ...]
    here: tuple[int, ...]
    away: tuple[tuple[int, tuple[int, ...]], ...]
    missing: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, view: View, index: int, number: int, own: int) -> _Members:
        """own: this rank."""
        ranks = view.members(view.channels[index], number)
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            endpoint = view.slots[rank].endpoint
            assert endpoint is not None  # of a slot that takes part
            by_host.setdefault(endpoint.host, []).append(rank)
        turns = [step for slot in view.slots if slot.takes_part for steps in (slot.first, slot.last) for step in steps]
        until = min((step for step in turns if step > number), default=float("inf"))
        hosts = tuple(tuple(host) for host in by_host.values())
        here = next((host for host in hosts if own in host), ())
        away = tuple((place, host) for place, host in enumerate(hosts) if own not in host)
        return cls(view.epoch, number, until, view.incarnations(ranks), hosts, here, away)


class Lookout:
    """Knows who takes part, from the page that the host's watcher writes, and who missed a budget here."""

    def __init__(self, member: Member, accuse: Accuse, progress: Progress | None, timeout_s: float) -> None:
        self._member, self._page, self._tell, self._progress = member, member.page, accuse, progress
        self._timeout = timeout_s
        #: Newest epoch whose ranks this rank can reach.
        self.reachable = 0
        self._suspects: dict[int, int] = {}
        #: By channel, with the page's sequence; kept until somebody is lost.
        self._members: dict[int, tuple[int, _Members]] = {}
        self._slots, self._deaths = member.view.max_ranks, b""

    def roll(self, channel: int, number: int) -> Roll:
        """Who takes part in a step that begins now. Raises ExcludedFromView if this rank does not."""
        self._member.check()
        sequence, deaths = self._page.sequence, self._page.deaths(self._slots)
        if deaths != self._deaths:
            self._deaths = deaths
            self._members.clear()
        kept = self._members.get(channel)
        if kept is None or kept[0] != sequence or not kept[1].since <= number < kept[1].until:
            members = _Members.of(self._member.view, channel, number, self._member.rank)
            members.missing.update(rank for rank, of in members.incarnations.items() if self._is_lost(rank, of))
            kept = self._members[channel] = (sequence, members)
        members = kept[1]
        if self._member.rank not in members.incarnations:
            raise ExcludedFromView(
                f"rank {self._member.rank} takes no part in step {number} of channel {channel} "
                f"(epoch {members.epoch}): it has left, or joins later"
            )
        incarnations, hosts, missing = members.incarnations, members.hosts, set(members.missing)
        return Roll(members.epoch, self.reachable, incarnations, hosts, members.here, members.away, missing)

    def lost(self, roll: Roll, rank: int) -> bool:
        """Whether a rank that takes part in a step is out of the view, dead, or suspected here."""
        return self._is_lost(rank, roll.incarnations[rank])

    def _is_lost(self, rank: int, incarnation: int) -> bool:
        return (
            self._suspects.get(rank) == incarnation
            or not self._page.takes_part(rank, incarnation)
            or self._page.is_dead(rank, incarnation)
        )

    def accuse(self, roll: Roll, rank: int, evidence: str) -> None:
        """Leave a rank out from now on, and tell the group. If its host is silent too, leave all of that out."""
        heard = self._page.heard(rank)
        silent = time.monotonic() - heard > max(_FRESH_S, _SILENT_SHARE * self._timeout) if heard else False
        host = next(host for host in roll.hosts if rank in host)
        for other in host if silent and self._member.rank not in host else (rank,):
            incarnation = roll.incarnations[other]
            if self._suspects.get(other) != incarnation:
                self._suspects[other] = incarnation
                self._members.clear()
                self._tell(other, incarnation, evidence if other == rank else f"its host is silent, and {evidence}")

    def say_that_it_waits(self) -> None:
        """Let the others know that this rank itself waits."""
        self._page.say_that_it_waits()

    def waits(self, rank: int) -> bool:
        """Whether a rank was seen to wait for others itself, just now."""
        return time.monotonic() - self._page.waited(rank) <= _FRESH_S

    def excused(self, rank: int, since: float) -> bool:
        """Whether a rank from which nothing came within a budget waits for others itself, and so is not the one that
        hangs. since: when this rank began to wait for it; that has an end."""
        return self.waits(rank) and time.monotonic() - since < _LONGEST_SHARE * self._timeout

    def check(self) -> None:
        """Raises ExcludedFromView if this rank is outside the view."""
        self._member.check()

    def note_leavers(self, step: Step) -> None:
        """Strike those that, by a newer view, left in order before this step."""
        roll = step.roll
        assert roll is not None
        view = self._member.view
        if view.epoch == roll.epoch:
            return
        slots = view.slots
        for rank, incarnation in roll.incarnations.items():
            slot = slots[rank]
            if slot.incarnation == incarnation and slot.last and slot.last[step.channel] <= step.number:
                roll.left.add(rank)

    def wait(
        self, step: Step, places: Mapping[K, Sequence[Spot]], budget_s: float, what: str, about: Callable[[K], Awaited]
    ) -> tuple[dict[K, tuple[Record, Spot]], list[K]]:
        """Wait for records, and drive this rank's own transfers meanwhile. Returns (those that came and where, what did
        not come).

        places: where a record may come, the likeliest place first. Who sends nothing within the budget is accused, and
        who waits himself gets a little longer. Raises ExcludedFromView if this rank itself is outside.
        """
        roll, number = step.roll, step.number
        assert roll is not None
        found: dict[K, tuple[Record, Spot]] = {}
        lost: list[K] = []
        pending = dict(places)
        gone: set[K] = set()
        started = checked = time.monotonic()
        late = False
        pause = Pause()
        with driving(self._progress) as drive:
            while True:
                before = len(pending)
                for key, spots in list(pending.items()):
                    record = spots[0].poll(number)
                    if record is not None:
                        found[key] = record, spots[0]
                        del pending[key]
                        if step.wait_times is not None:
                            step.wait_times[about(key).rank] += int((time.monotonic() - started) * 1e9)
                    elif key in gone:  # what came before the loss was seen has been read by now
                        lost.append(key)
                        del pending[key]
                if not pending:
                    return found, lost
                if late:
                    for key, spots in list(pending.items()):
                        blamed = None if _passed(spots, number) else about(key).blame()
                        if blamed is not None:
                            if self.excused(blamed, started):
                                continue
                            self.accuse(roll, blamed, f"{what} of {step}: sent nothing within {budget_s:g} s")
                        lost.append(key)
                        del pending[key]
                    late = False
                    continue
                if drive() or len(pending) < before:
                    pause.reset()
                    continue
                pause.rest()
                now = time.monotonic()
                if now - checked >= CHECK_EVERY_S:
                    checked = now
                    self.say_that_it_waits()
                    self.check()
                    self.note_leavers(step)
                    for key, spots in pending.items():
                        item = about(key)
                        if item.gone() or item.rank in roll.left or _passed(spots, number):
                            gone.add(key)
                        pending[key] = sorted(spots, key=lambda spot: spot.poll(number) is None)
                late = now - started > budget_s


def _passed(spots: Sequence[Spot], number: int) -> bool:
    """Whether a sender went on to later steps: this rank is late, and nobody is to blame."""
    return any(spot.passed(number) for spot in spots)
