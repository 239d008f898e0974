"""What a rank does for its group beside its steps, in a thread of its own: it tells of failures, finds the way to those
who come, and activates them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_a2a.elastic.places import HELD, Finder, Found
from moe_a2a.errors import ExcludedFromView, MoeA2AError, StoreAway
from moe_a2a.membership.member import Member
from moe_a2a.membership.view import State, View

_log = logging.getLogger(__name__)

_AGAIN_S = 0.05


class Keeper:
    """One rank's keeper. Begins to work when `start` is called."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timeout_s
        self._wake = threading.Condition()
        self._accused: dict[tuple[int, int], str] = {}
        self._found: dict[int, Found] = {}
        self._known: dict[int, int] = {}
        self._joiners: tuple[dict[int, int], tuple[int, ...]] | None = None
        self._closing = False
        self._changed = True
        self._member: Member | None = None
        self._finder: Finder | None = None
        self._thread: threading.Thread | None = None

    def on_change(self, view: View) -> None:
        """For `Member`: there is a new view."""
        self._rouse(lambda: None)

    def start(self, member: Member, finder: Finder, known: Mapping[int, int]) -> None:
        """known: rank -> incarnation of those that were found already."""
        self._member, self._finder, self._known = member, finder, dict(known)
        self._thread = threading.Thread(target=self._run, name="moe_a2a-keeper", daemon=True)
        self._thread.start()

    def accuse(self, rank: int, incarnation: int, evidence: str) -> None:
        """Propose the view without this process, until the view is without it."""
        _log.warning("rank %d: %s", rank, evidence)
        self._rouse(lambda: self._accused.setdefault((rank, incarnation), evidence))

    def activate(self, ranks: Mapping[int, int], first: Sequence[int]) -> None:
        """Let these processes take part from these steps on."""

        def note() -> None:
            self._joiners = (dict(ranks), tuple(first))

        self._rouse(note)

    def take_found(self) -> dict[int, Found]:
        """Processes that were found since the last call."""
        with self._wake:
            found, self._found = self._found, {}
            return found

    @property
    def has_found(self) -> bool:
        return bool(self._found)

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=self._timeout)
        for found in self.take_found().values():
            if found.fd >= 0:
                os.close(found.fd)

    def _rouse(self, note: Callable[[], Any]) -> None:
        with self._wake:
            note()
            self._changed = True
            self._wake.notify()

    def _run(self) -> None:
        member = self._member
        assert member is not None
        while not self._closing:
            with self._wake:
                if not self._changed:
                    self._wake.wait(None if not self._accused else _AGAIN_S)
                self._changed = False
                accused, joiners = dict(self._accused), self._joiners
                self._joiners = None
            if self._closing:
                return
            try:
                self._propose(member, accused)
                if joiners is not None:
                    member.activate(*joiners)
                self._look(member)
            except StoreAway as error:
                _log.info("%s", error)
            except ExcludedFromView:  # the next step says so
                with self._wake:
                    self._accused.clear()
            except MoeA2AError as error:
                _log.warning("%s", error)

    def _propose(self, member: Member, accused: Mapping[tuple[int, int], str]) -> None:
        for (rank, incarnation), evidence in accused.items():
            if member.page.takes_part(rank, incarnation):
                member.propose_failed({rank: incarnation}, evidence)
            with self._wake:
                self._accused.pop((rank, incarnation), None)

    def _look(self, member: Member) -> None:
        """Find the way to everybody who holds a slot and is new."""
        assert self._finder is not None
        for rank, slot in enumerate(member.view.slots):
            if slot.state not in HELD or slot.incarnation == self._known.get(rank) or rank == member.rank:
                continue
            try:
                found = self._finder.find(rank, slot.incarnation)
            except MoeA2AError as error:
                if slot.state is State.READY and slot.incarnation == member.view.slots[rank].incarnation:
                    _log.warning("rank %d wants to join and cannot be reached: %s", rank, error)
                    member.propose_failed({rank: slot.incarnation}, f"cannot be reached by rank {member.rank}: {error}")
                continue
            with self._wake:
                self._found[rank] = found
            self._known[rank] = slot.incarnation
