"""Who takes part in an operation: the group's view, as this process goes by it, and what is known of failures."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_a2a.collectives.base import Base
from moe_a2a.collectives.options import Options
from moe_a2a.membership.view import State, View


@dataclass(frozen=True)
class Roll:
    """Who takes part in an operation. sequence: of the page that the view was read from. digest: 30 bits that stand for
    who takes part."""

    epoch: int
    incarnations: Mapping[int, int]
    sequence: int
    digest: int

    @classmethod
    def of(cls, epoch: int, incarnations: Mapping[int, int], sequence: int) -> Roll:
        digest = zlib.crc32(repr(sorted(incarnations.items())).encode()) & 0x3FFFFFFF
        return cls(epoch, incarnations, sequence, digest)

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted(self.incarnations))


class Roster:
    """Which view this process goes by.

    A view in which a rank failed is gone by at once if on_failure is "reconcile". Otherwise that rank stays on the
    roll, where every operation finds it lost, until `sync` ("deferred") or until somebody takes it out of the group in
    order ("framework"). Ranks that join or leave in order are followed at once.
    """

    def __init__(self, base: Base, options: Options) -> None:
        self.base = base
        self._holds, self._framework = options.on_failure != "reconcile", options.on_failure == "framework"
        #: (rank, incarnation) that missed a budget here.
        self.suspects: set[tuple[int, int]] = set()
        self._roll = Roll.of(0, {base.rank: base.incarnation}, -1)

    @property
    def view(self) -> View | None:
        return self.base.member.view if self.base.member is not None else None

    def changed(self, roll: Roll) -> bool:
        """Whether there is a view that a roll knows nothing of."""
        member = self.base.member
        return member is not None and member.page.sequence != roll.sequence

    @property
    def outside(self) -> bool:
        """Whether this process takes no part, by the newest view."""
        member = self.base.member
        return member is not None and not member.page.takes_part(self.base.rank, self.base.incarnation)

    def roll(self) -> Roll:
        """Of the newest view. Raises ExcludedFromView if this process takes no part."""
        member = self.base.member
        if member is None:
            return self._roll
        sequence = member.page.sequence
        if sequence != self._roll.sequence:
            member.check()
            view = member.view
            taking = view.incarnations(view.ranks)
            if self._holds:
                taking = {**self._held(view), **taking}
            self._roll = Roll.of(view.epoch, taking, sequence)
        return self._roll

    def sync(self) -> Roll:
        """Go by the newest view, without the ranks that failed."""
        member = self.base.member
        if member is not None:
            sequence = member.page.sequence
            member.check()
            view = member.view
            self._roll = Roll.of(view.epoch, view.incarnations(view.ranks), sequence)
        return self._roll

    def _held(self, view: View) -> dict[int, int]:
        slots = view.slots
        return {
            rank: incarnation
            for rank, incarnation in self._roll.incarnations.items()
            if slots[rank].incarnation == incarnation and slots[rank].state is State.FAILED
        }

    def lost(self, roll: Roll, rank: int) -> bool:
        """Whether a rank on a roll failed: in the view, for certain, or by missing a budget here."""
        member, incarnation = self.base.member, roll.incarnations[rank]
        if member is None:
            return False
        if (rank, incarnation) in self.suspects or member.page.is_dead(rank, incarnation):
            return True
        if member.page.takes_part(rank, incarnation):
            return False
        slot = member.view.slots[rank]
        return slot.incarnation != incarnation or slot.state is State.FAILED

    def left(self, roll: Roll, rank: int) -> bool:
        """Whether it has left in order."""
        member = self.base.member
        if member is None or member.page.takes_part(rank, roll.incarnations[rank]):
            return False
        return not self.lost(roll, rank)

    def gone(self, roll: Roll, rank: int) -> bool:
        """Whether it is lost or has left in order."""
        return self.lost(roll, rank) or self.left(roll, rank)

    def accuse(self, roll: Roll, ranks: Iterable[int], evidence: str) -> None:
        """Take ranks for lost from now on, and tell the group; with on_failure="framework" others do that."""
        if self._framework:
            return
        for rank in ranks:
            incarnation = roll.incarnations[rank]
            if (rank, incarnation) not in self.suspects:
                self.suspects.add((rank, incarnation))
                if self.base.keeper is not None:
                    self.base.keeper.accuse(rank, incarnation, evidence)

    def masked(self, roll: Roll, ranks: Iterable[int]) -> bool:
        """Whether the group's view is without these processes."""
        member = self.base.member
        return member is None or not any(member.page.takes_part(r, roll.incarnations[r]) for r in ranks)

    def check(self) -> None:
        """Raises ExcludedFromView."""
        if self.base.member is not None:
            self.base.member.check()
