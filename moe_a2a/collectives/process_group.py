"""The process group: torch's interface on one side, operations among the ranks of a view on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from moe_a2a.collectives.options import Options


class ProcessGroupMoeA2A(dist.ProcessGroup):
    """A process group of CPU tensors whose operations run among the ranks of the current view.

    Ranks are slots, numbered for life. Ranks that are not in the view are skipped: all_gather and the like leave their
    pieces of the output as they were, sums lack them, "avg" divides by the number of ranks that took part. An operation
    runs in one view on all ranks. Every operation ends: right, or as failed (`CollectiveWork`).
    """

    def active(self) -> tuple[bool, ...]:
        """[slots], who takes part, as the next operation would see it. While this process is alone: itself."""
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        """Of the view that the next operation would run in; grows with every change. 0 while this process is alone."""
        raise NotImplementedError

    @property
    def slots(self) -> int:
        """Numbered places of the group for its whole life."""
        raise NotImplementedError

    @property
    def alone(self) -> bool:
        """Whether this process waits to `join()`."""
        raise NotImplementedError

    def peer_ready(self, ranks: Sequence[int]) -> list[bool]:
        """For each slot, whether a process holds it that this one can reach: active, or ready to be activated. Looks
        at what this process knows and asks nobody."""
        raise NotImplementedError

    def join(self) -> None:
        """Come to the group: take the slot `rank()`, wait until a member has activated it, and take part from the
        group's next operation on. Also for a process that was found failed, or deactivated, and is still there.

        Raises JoinRefused (the slot is taken, or what was given differs from the group's), StoreAway, MoeA2AError if
        nobody activates it within reconcile_s.
        """
        raise NotImplementedError

    def activate(self, ranks: Sequence[int]) -> Any:
        """Let processes that are ready take part; wait for their readiness up to reconcile_s. Any one member may; ranks
        that take part already stay as they are. Returns the view's epoch and the ranks that were dropped."""
        raise NotImplementedError

    def deactivate(self, ranks: Sequence[int]) -> Any:
        """Take ranks out of the group in order: when this returns no member's next operation has them. Ranks that do
        not take part are ignored. Such a process may `join()` again."""
        raise NotImplementedError

    def sync_after_failure(self) -> Any:
        """Wait until the view is without the ranks that operations here have lost, and use it from now on. What
        on_failure="deferred" needs after a failure; without one it returns at once."""
        raise NotImplementedError

    @property
    def options(self) -> Options:  # type: ignore[override]
        raise NotImplementedError
