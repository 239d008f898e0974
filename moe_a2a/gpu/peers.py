"""The other ranks of a GPU rank's host, as the CPU sees them: who is gone, and waiting kernels that must hear of it."""

from __future__ import annotations

import threading

import numpy as np

from moe_a2a.errors import RankLost
from moe_a2a.gpu.layout import Layout
from moe_a2a.gpu.report import ranks_of
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.wait import Watch, named

_LOOK_EVERY_S = 0.02


class Peers:
    """A thread that takes the bit of a rank out of `alive` when it dies, closes its object, or is reported missing, by
    another rank or by this rank's own kernels.

    memory: a page for each rank, mapped by all, in which it says that it closed or whom it misses. words: [HOST_WORDS]
    int64, pinned: ALIVE, which kernels read while they wait, so that they do not wait for a rank without its bit; and
    TOLD, in which they say whom they found missing.
    `lost` says for each such rank why, and keeps it. Deaths count for waits to come only: what a rank did before it
    died is there.
    `blamed` leaves out ranks that closed because they missed another.
    """

    def __init__(self, memory: HostMemory, watch: Watch, rank: int, words: np.ndarray) -> None:
        self._memory, self._watch, self._rank, self._words = memory, watch, rank, words
        self.lost: dict[int, str] = {}
        self._tolerant, self._lock = False, threading.Lock()
        self._followed: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe_a2a-peers", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RankLost if a rank cannot take part in another step. Costs no system call."""
        if self.lost:
            lost = self.blamed()
            why = "; ".join(f"{named([rank])} {text}" for rank, text in lost.items())
            raise RankLost(f"rank {self._rank}: {why}", sorted(lost))

    def blamed(self) -> dict[int, str]:
        """The ranks at fault, and why."""
        lost = dict(self.lost)
        return {rank: why for rank, why in lost.items() if rank not in self._followed} or lost

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
                self._words[Layout.ALIVE] &= ~np.int64(1 << rank)

    def tolerate_missing(self) -> None:
        """From now on only ranks that died or closed are lost. For those that kernels here miss, waits still end."""
        self._tolerant = True

    def leave_out(self, ranks: int) -> None:
        """End waits for these ranks, bits of a mask."""
        with self._lock:
            self._words[Layout.ALIVE] &= ~np.int64(ranks)

    def take_back(self, ranks: int) -> None:
        """Wait for these ranks again, bits of a mask, unless they are lost. TOLD must be without them by now."""
        with self._lock:
            self._words[Layout.ALIVE] |= np.int64(ranks & ~sum(1 << rank for rank in self.lost))

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        for rank in range(self._memory.count):
            if rank == self._rank:
                continue
            has_closed = self._memory.has_closed(rank)  # first: a rank says whom it misses, and closes then
            missing = None if self._tolerant else self._memory.fault(rank)
            if missing is not None:
                self._lose(missing, f"is missing, as rank {rank} reports")
            if has_closed:
                if missing is not None and rank not in self.lost:
                    self._followed.add(rank)
                self._lose(rank, "closed its AllToAll")
        for rank in self._watch.gone():
            self._lose(rank, "died (the process is gone)")
        if self._tolerant:
            with self._lock:
                self._words[Layout.ALIVE] &= ~self._words[Layout.TOLD]
        else:
            self.report([rank for rank in ranks_of(int(self._words[Layout.TOLD])) if rank not in self.lost])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
