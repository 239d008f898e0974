"""`active_ranks`: a tensor that always says which slots of a group take part."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch

from moe_a2a.collectives.options import OnFailure
from moe_a2a.errors import MoeA2AError
from moe_a2a.membership.member import Member
from moe_a2a.membership.view import Slot, State, View
from moe_a2a.transport.driver import beside_captures, load_api

_LOOK_S = 5.0


class Mirror:
    """Writes int32 1 or 0 for each of the first `slots` places of a tensor, in place, in a thread that follows views.

    Ranks that failed are left out at once with on_failure="reconcile", at `acknowledge` with "deferred", and when they
    are taken out of the group in order with "framework".
    """

    def __init__(self, tensor: torch.Tensor, slots: int, on_failure: OnFailure) -> None:
        """Raises ConfigError if the tensor is on a GPU and cuda-bindings is not installed."""
        self.tensor = tensor
        self._places = tensor.detach().view(-1)[:slots]
        self._slots, self._on_failure = slots, on_failure
        self._acknowledged: set[int] = set()  # incarnations
        self._lock = threading.Lock()
        self._written: tuple[int, ...] = ()
        self._epoch = self._sequence = -1
        self._member: Member | None = None
        self._stream: Any = None
        if tensor.is_cuda:
            self._api = load_api()
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]

    def show_alone(self, slot: int) -> None:
        """This process has yet to join."""
        with self._lock:
            self._write([rank == slot for rank in range(self._slots)])

    def follow(self, member: Member) -> None:
        """Show the views of this member from now on, until it is closed or another one is followed."""
        with self._lock:
            self._member = member
            self._epoch = self._sequence = -1
            self._acknowledged = _failed(member.view)
        self.refresh()
        threading.Thread(target=self._run, args=(member,), name="moe_a2a-active_ranks", daemon=True).start()

    def acknowledge(self) -> None:
        """Leave out the ranks that failed until now."""
        with self._lock:
            if self._member is not None:
                self._acknowledged |= _failed(self._member.view)
                self._epoch = self._sequence = -1
        self.refresh()

    def refresh(self) -> None:
        """Show the newest view; the thread may not have seen it yet. Costs a look at a word if there is none."""
        member = self._member
        # The sequence changes before the words that waits look at; the epoch after them.
        if member is None or member.page.sequence == self._sequence:
            return
        with self._lock:
            if self._member is not None:
                sequence = self._member.page.sequence
                view = self._member.view
                if view.epoch > self._epoch:
                    self._write([self._counts(slot) for slot in view.slots])
                    self._epoch = view.epoch
                self._sequence = sequence  # last: whoever sees it does not wait for the lock

    def _counts(self, slot: Slot) -> bool:
        if slot.takes_part or self._on_failure == "reconcile":
            return slot.takes_part
        return slot.state is State.FAILED and bool(slot.first) and slot.incarnation not in self._acknowledged

    def _write(self, active: Sequence[bool]) -> None:
        wanted = tuple(map(int, active))
        if wanted == self._written:
            return
        values = torch.tensor(wanted, dtype=torch.int32)
        if self._stream is None:
            self._places.copy_(values)
        else:
            # Others, and this thread too, may be capturing a graph: so a stream of its own, and no pinned memory.
            with beside_captures(self._api), torch.cuda.stream(self._stream):
                self._places.copy_(values, non_blocking=True)
                self._stream.synchronize()
        self._written = wanted

    def _run(self, member: Member) -> None:
        while self._member is member and not member.closed:
            with contextlib.suppress(MoeA2AError):
                member.wait(self._outdated, _LOOK_S)
            if self._member is member and not member.closed:
                self.refresh()

    def _outdated(self, view: View) -> bool:
        return view.epoch > self._epoch or self._member is None or self._member.closed


def _failed(view: View) -> set[int]:
    return {slot.incarnation for slot in view.slots if slot.state is State.FAILED}
