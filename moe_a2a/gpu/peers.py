"""The other ranks of a GPU rank's host, as the CPU sees them: who is gone, and waiting kernels that must hear of it."""

from __future__ import annotations

import threading

import numpy as np

from moe_a2a.errors import RankLost
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.wait import Watch, named

_LOOK_EVERY_S = 0.02


class Peers:
    """A thread that takes the bit of a rank out of `alive` when it dies, closes its object, or is reported missing.

    memory: a page for each rank, mapped by all, in which it says that it closed or whom it misses. alive: [1] int64,
    the pinned word that kernels read while they wait; a wait for a rank without its bit ends at once.
    `lost` says for each such rank why. Deaths count for waits to come only: what a rank did before it died is there.
    """

    def __init__(self, memory: HostMemory, watch: Watch, rank: int, alive: np.ndarray) -> None:
        self._memory, self._watch, self._rank, self._alive = memory, watch, rank, alive
        self.lost: dict[int, str] = {}
        self._all, self._lock = int(alive[0]), threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe_a2a-peers", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RankLost if a rank cannot take part in another step. Costs no system call."""
        if self.lost:
            lost = dict(self.lost)
            why = "; ".join(f"{named([rank])} {text}" for rank, text in lost.items())
            raise RankLost(f"rank {self._rank}: {why}", sorted(lost))

    def report(self, missing: list[int]) -> None:
        """Tell the others whom this rank misses, and end its own waits for them."""
        if missing:
            self._memory.set_fault(missing[0])
        for rank in missing:
            self._lose(rank, "was missing from a step")

    def _lose(self, rank: int, why: str) -> None:
        with self._lock:
            if rank not in self.lost:
                self.lost[rank] = why
                self._alive[0] &= ~np.int64(1 << rank)

    def leave_out(self, ranks: int) -> None:
        """End waits for these ranks, bits of a mask, and for no others but those that are lost."""
        with self._lock:
            lost = sum(1 << rank for rank in self.lost)
            self._alive[0] = np.int64(self._all & ~ranks & ~lost)

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        for rank in self._watch.gone():
            self._lose(rank, "died (the process is gone)")
        for rank in range(self._memory.count):
            if rank == self._rank:
                continue
            missing = self._memory.fault(rank)
            if missing is not None:
                self._lose(missing, f"is missing, as rank {rank} reports")
            if self._memory.has_closed(rank):
                self._lose(rank, "closed its AllToAll")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
