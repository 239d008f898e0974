"""The process group: who takes part, and torch's questions about it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from moe_a2a.collectives.admission import Admission, Proposal
from moe_a2a.collectives.base import Base, TorchStore, alone, enter, found
from moe_a2a.collectives.group import Group
from moe_a2a.collectives.options import Options
from moe_a2a.collectives.torch_calls import TorchCalls
from moe_a2a.errors import MoeA2AError
from moe_a2a.membership.member import Member


class ProcessGroupMoeA2A(TorchCalls):
    """A process group of CPU tensors whose operations run among the ranks of the current view.

    Ranks are slots, numbered for life. Ranks that are not in the view are skipped: all_gather and the like leave their
    pieces of the output as they were, sums lack them, "avg" divides by the number of ranks that took part. An operation
    runs in one view on all ranks. Every operation ends: right, or as failed (`CollectiveWork`), and then its outputs
    hold anything. Collectives run in the order in which they were called, messages of a pair of ranks in theirs.

    store, rank, size, timeout: as torch gives them to a backend. Collective, unless options.joining. Raises
    ConfigError, EngineError, RankLost, StoreAway.
    """

    def __init__(
        self,
        store: TorchStore | None,
        rank: int,
        size: int,
        timeout: timedelta,
        options: Options | None = None,
        name: str = "",
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._options = options or Options()
        self._raises, self._closed, self._numbers, self._name = self._options.raises, False, itertools.count(), name
        self._description = ""
        self._slot, self._declared, self._store = rank, size, store
        self._timeout_s = timeout.total_seconds()
        slots = size if self._options.slots is None else self._options.slots
        if self._options.joining:
            base = alone(rank, max(slots, size), self._options)
        else:
            assert store is not None
            base = found(store, rank, size, self._timeout_s, self._options)
        self._group = self._of(base)
        self._admission = Admission(self.slots, self._options.reconcile_s, lambda: self._group.base.member)

    def _of(self, base: Base) -> Group:
        options = self._options
        return Group(
            base, options, options.collective_timeout_s or self._timeout_s, options.p2p_timeout_s or self._timeout_s
        )

    # who takes part

    def rank(self) -> int:
        return self._slot

    def size(self) -> int:
        """One past the highest active slot: `dist.get_world_size()`. While this process is alone: what it was given."""
        view = self._group.roster.view
        if view is None:
            return self._declared
        with contextlib.suppress(MoeA2AError):  # a process that is outside the view still has a size
            return max(self._group.roster.roll().ranks) + 1
        return view.size

    def active(self) -> tuple[bool, ...]:
        """[slots], who takes part, as the next operation would see it. While this process is alone: itself. Raises
        ExcludedFromView."""
        ranks = self._group.roster.roll().ranks
        return tuple(rank in ranks for rank in range(self.slots))

    @property
    def epoch(self) -> int:
        """Of the newest view; grows with every change. 0 while this process is alone."""
        view = self._group.roster.view
        return 0 if view is None else view.epoch

    @property
    def alone(self) -> bool:
        """Whether this process waits to `join()`."""
        return self._group.base.member is None

    @property
    def member(self) -> Member | None:
        """This process's part in the group's membership; None while it is alone."""
        return self._group.base.member

    @property
    def options(self) -> Options:
        return self._options

    def peer_ready(self, ranks: Sequence[int]) -> list[bool]:
        """For each slot, whether a process waits there to be activated, or takes part already and lives. Asks
        nobody."""
        return self._admission.peer_ready(ranks)

    def join(self, timeout_s: float | None = None) -> None:
        """Come to the group: take the slot `rank()`, wait until a member has activated it, and take part from the
        group's next operation on. Also for a process that was found failed, or was deactivated, and is still there.

        Operations that have begun are waited for. Raises JoinRefused (the slot is taken, or what was given differs from
        the group's), StoreAway, MoeA2AError if nobody activates it within `timeout_s` (None: reconcile_s).
        """
        self._group.drain()
        self._group.close()
        self._group = self._of(alone(self._slot, self.slots, self._options))  # and so it stays if this raises
        patience = self._options.reconcile_s if timeout_s is None else timeout_s
        base = enter(self._store, self._slot, self._options, self._options.reconcile_s)
        waiting, self._group = self._group, self._of(base)
        try:
            assert base.member is not None
            if self._admission.revive():
                self._group.lead()
            base.member.wait_active(patience)
        except BaseException:
            self._group.close()
            self._group = waiting
            raise
        waiting.close()

    def activate(self, ranks: Sequence[int]) -> Proposal:
        """Let processes that are ready take part; wait for their readiness up to reconcile_s. Any one member may ask;
        ranks that take part already stay as they are."""
        return self._admission.activate(ranks)

    def deactivate(self, ranks: Sequence[int]) -> Proposal:
        """Take ranks out of the group in order, those that failed too: when this returns no member's next operation has
        them. Ranks that do not take part are ignored. Such a process may `join()` again."""
        return self._admission.deactivate(ranks)

    def sync_after_failure(self) -> int:
        """Wait until the view is without the ranks that operations here have lost, and go by it from now on. Returns
        its epoch. What on_failure="deferred" needs after a failure; without one it returns at once.

        Raises ExcludedFromView, MoeA2AError (there is no such view within reconcile_s).
        """
        return self._group.sync()

    @property
    def failure_pending(self) -> bool:
        """Whether an operation here has lost a rank that this process still counts on."""
        return self._group.failure_pending

    # torch's other calls

    def getBackendName(self) -> str:  # noqa: N802
        return "moe_a2a"

    def name(self) -> str:
        return "moe_a2a"

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """torch's name of this group."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    def _get_backend(self, device: torch.device) -> Any:
        """For batch_isend_irecv of torch 2.14, which asks whether a backend coalesces: this group is its own, and does
        not."""
        if device.type == "cpu":
            return self
        return super()._get_backend(device)

    def set_timeout(self, timeout: timedelta) -> None:
        """For operations that begin from now on, unless Options say otherwise."""
        self._timeout_s = timeout.total_seconds()
        self._group.collective_s = self._options.collective_timeout_s or self._timeout_s
        self._group.message_s = self._options.p2p_timeout_s or self._timeout_s

    def shutdown(self) -> None:
        """Leave the group, and let go of memory. Collectives that have begun should have ended. May be called twice."""
        if not self._closed:
            self._closed = True
            self._group.close()

    abort = shutdown
