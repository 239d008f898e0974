"""What a rank does for its group beside its steps, in two threads: it tells of failures and activates those who come,
and it finds the way to them, which may take long."""

from __future__ import annotations

import logging
import os
import threading
import time
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
        self._sought: dict[tuple[int, int], float] = {}  # who is not found -> since when
        self._joiners: tuple[dict[int, int], tuple[int, ...]] | None = None
        self._closing = False
        self._changed = True
        self._new_view = True
        self._member: Member | None = None
        self._finder: Finder | None = None
        self._threads: list[threading.Thread] = []

    def on_change(self, view: View) -> None:
        """For `Member`: there is a new view."""
        with self._wake:
            self._new_view = True
            self._wake.notify_all()

    def start(self, member: Member, finder: Finder, known: Mapping[int, int]) -> None:
        """known: rank -> incarnation of those that were found already."""
        self._member, self._finder, self._known = member, finder, dict(known)
        for name, run in (("keeper", self._run), ("finder", self._search)):
            self._threads.append(threading.Thread(target=run, name=f"moe_a2a-{name}", daemon=True))
            self._threads[-1].start()

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
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=self._timeout)
        for found in self.take_found().values():
            if found.fd >= 0:
                os.close(found.fd)

    def _rouse(self, note: Callable[[], Any]) -> None:
        with self._wake:
            note()
            self._changed = True
            self._wake.notify_all()

    def _run(self) -> None:
        member = self._member
        assert member is not None
        while True:
            with self._wake:
                while not self._changed and not self._accused and not self._closing:
                    self._wake.wait()
                if not self._changed and not self._closing:
                    self._wake.wait(_AGAIN_S)
                self._changed = False
                accused, joiners = dict(self._accused), self._joiners
                self._joiners = None
            if self._closing:
                return
            try:
                self._propose(member, accused)
                if joiners is not None:
                    member.activate(*joiners)
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

    def _search(self) -> None:
        member = self._member
        assert member is not None
        while True:
            with self._wake:
                if not self._new_view and not self._closing:
                    self._wake.wait(_AGAIN_S if self._sought else None)
                self._new_view = False
            if self._closing:
                return
            try:
                self._look(member)
            except (StoreAway, ExcludedFromView) as error:
                _log.info("%s", error)
            except MoeA2AError as error:
                _log.warning("%s", error)

    def _look(self, member: Member) -> None:
        """Find the way to everybody who holds a slot and is new. Who cannot be found is looked for again."""
        assert self._finder is not None
        slots = member.view.slots
        new = {
            (rank, slot.incarnation): slot.state
            for rank, slot in enumerate(slots)
            if slot.state in HELD and slot.incarnation != self._known.get(rank) and rank != member.rank
        }
        self._sought = {key: self._sought.get(key, time.monotonic()) for key in new}
        for (rank, incarnation), state in new.items():
            try:
                found = self._finder.find(rank, incarnation, patient=False)
            except MoeA2AError as error:
                if isinstance(error, StoreAway) or time.monotonic() - self._sought[rank, incarnation] < self._timeout:
                    continue
                if state is State.READY and incarnation == member.view.slots[rank].incarnation:
                    _log.warning("rank %d wants to join and cannot be reached: %s", rank, error)
                    member.propose_failed({rank: incarnation}, f"cannot be reached by rank {member.rank}: {error}")
                continue
            with self._wake:
                before, self._found[rank] = self._found.get(rank), found
            if before is not None and before.fd >= 0:
                os.close(before.fd)
            self._known[rank] = incarnation
            del self._sought[rank, incarnation]
