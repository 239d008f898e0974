"""Which processes a watcher knows to be gone, and its proposals to leave them out of the view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from moe_a2a.membership.store import Store, change
from moe_a2a.membership.view import State, View, mark_failed

#: What another host saw is proposed here too, if its own proposal has not come through by then.
SECOND_HAND_S = 0.05

Done = Callable[[View | None, Exception | None], None]


def matters(view: View | None, rank: int, incarnation: int) -> bool:
    """Whether a view still counts on a process."""
    if view is None or not 0 <= rank < view.max_ranks:
        return False
    slot = view.slots[rank]
    return slot.incarnation == incarnation and slot.state in (State.READY, State.ACTIVE, State.LEAVING)


class Deaths:
    """current: the newest view. submit: does work on the store, elsewhere, and calls back with the view or the error.
    changed: told what came of a proposal."""

    def __init__(
        self,
        current: Callable[[], View | None],
        submit: Callable[[Callable[[Store], Any], Done], None],
        changed: Done,
    ) -> None:
        self._current, self._submit, self._changed = current, submit, changed
        # (rank, incarnation) -> why, and when to propose. Kept: a store that lost its data may bring an old view back.
        self._dead: dict[tuple[int, int], tuple[str, float]] = {}
        self._proposing = False

    def add(self, ranks: Mapping[int, int], note: str, delay_s: float) -> None:
        """ranks: rank -> incarnation. delay_s: until it is proposed here."""
        due = time.monotonic() + delay_s
        for key in ranks.items():
            self._dead.setdefault(key, (note, due))

    @property
    def pending(self) -> bool:
        """Whether the view still counts on one of them."""
        view = self._current()
        return any(matters(view, *key) for key in self._dead)

    def propose(self) -> None:
        """Propose the view without them; again and again while the store is away."""
        known, now = self._current(), time.monotonic()
        due = {key: note for key, (note, at) in self._dead.items() if at <= now and matters(known, *key)}
        if not due or self._proposing or known is None:
            return

        def without(view: View) -> View:
            for note in dict.fromkeys(due.values()):
                view = mark_failed(view, {r: i for (r, i), why in due.items() if why == note}, note)
            return view

        def done(view: View | None, error: Exception | None) -> None:
            self._proposing = False
            self._changed(view, error)
            if error is not None:  # again, a little later
                later = time.monotonic() + 2 * SECOND_HAND_S
                self._dead.update({key: (note, later) for key, note in due.items()})

        self._proposing = True
        self._submit(lambda store: change(store, without, known), done)
