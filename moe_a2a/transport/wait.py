"""Waiting for records: every wait ends, and says who was missing (DESIGN.md D5)."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from moe_a2a.errors import RankLost
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.progress import Progress, Task, driving
from moe_a2a.transport.wire import Record, Status

Poll = Callable[[], Record | None]

_SPINS = 8
_NAP_S = 30e-6
_NAP_GROWTH = 1.25
_LONGEST_NAP_S = 200e-6
CHECK_EVERY_S = 2e-3


class Watch:
    """Knows when a rank of this host is gone or has given up, without waiting for a time-out."""

    def __init__(self, memory: HostMemory, ranks: tuple[int, ...], rank: int, progress: Progress | None = None) -> None:
        self._memory, self._ranks, self._rank, self._progress = memory, ranks, rank, progress
        self._process: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._poller = select.poll()
        # The caller and the thread that drives transfers both look, and poll() refuses two at once.
        self._one_poll = threading.Lock()

    def driving(self) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        """For the length of a wait: a call that advances this rank's own transfers, and raises the error of one that
        failed."""
        return driving(self._progress)

    def add_process(self, rank: int, pid: int) -> None:
        """Watch a peer's process. pid 0 (a process of another pid namespace) cannot be watched: time-outs remain."""
        if pid > 0 and rank != self._rank:
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(pid)
                self._process[fd] = rank
                self._pids[rank] = pid
                self._poller.register(fd, select.POLLIN)

    def check(self, waiting_for: Collection[int]) -> None:
        """Raise RankLost if a rank of this host died, closed its object while waited for, or has found another rank
        missing."""
        for index, rank in enumerate(self._ranks):
            missing = self._memory.fault(index) if rank != self._rank else None
            if missing is not None:
                raise RankLost(f"rank {rank} reports that rank {missing} is missing", [missing])
        lost = [rank for rank in self._ended() if rank in waiting_for]
        if lost:
            raise RankLost(f"{named(lost)} died (the process is gone)", lost)
        closed = [r for i, r in enumerate(self._ranks) if r in waiting_for and self._memory.has_closed(i)]
        if closed:
            raise RankLost(f"{named(closed)} closed the all-to-all", closed)

    def gone(self) -> list[int]:
        """Ranks of this host whose process ended without closing its object."""
        return [rank for rank in self._ended() if not self._memory.has_closed(self._ranks.index(rank))]

    def stopped(self) -> list[int]:
        """Ranks of this host whose process is stopped (SIGSTOP, a debugger): it does not even take in what is sent."""
        found = []
        for rank, pid in self._pids.items():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as f:
                if f.read().rpartition(b")")[2].split()[0] in (b"T", b"t"):
                    found.append(rank)
        return found

    def _ended(self) -> list[int]:
        with self._one_poll:
            return [self._process[fd] for fd, _ in self._poller.poll(0)]

    def close(self) -> None:
        for fd in self._process:
            os.close(fd)
        self._process.clear()
        self._poller = select.poll()


def named(ranks: Iterable[int]) -> str:
    """Ranks in a message: rank 3, or ranks 3, 5."""
    numbers = [str(r) for r in ranks]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


class Pause:
    """Rests between two looks: gives way to other threads first, then naps for longer and longer."""

    def __init__(self) -> None:
        self._spins, self._nap = 0, _NAP_S

    def rest(self) -> None:
        self._spins += 1
        if self._spins < _SPINS:
            os.sched_yield()
        else:
            time.sleep(self._nap)
            self._nap = min(self._nap * _NAP_GROWTH, _LONGEST_NAP_S)

    def reset(self) -> None:
        self._spins, self._nap = 0, _NAP_S


def wait_for(
    polls: Mapping[int, Poll], budget_s: float, watch: Watch, what: str, times: torch.Tensor | None = None
) -> dict[int, Record]:
    """Wait until each rank's record has come, and drive this rank's own transfers meanwhile. Returns rank -> record.

    polls: rank -> poll. With more ranks than cores, a rank that spins keeps the rank it waits for from running, so
    that this yields and naps. Raises RankLost naming the ranks that are missing, or the error of an own transfer that
    failed. times: int64 [R], to which the nanoseconds waited for each rank are added.
    """
    found: dict[int, Record] = {}
    pending = dict(polls)
    started = checked = time.monotonic()
    pause = Pause()
    lost: RankLost | None = None
    with watch.driving() as drive:
        while True:
            before = len(pending)
            for rank in list(pending):
                record = pending[rank]()
                if record is not None:
                    del pending[rank]
                    if record.status == Status.FAULT:
                        message = f"{what}: rank {rank} reports that rank {record.missing} is missing"
                        raise RankLost(message, [record.missing])
                    found[rank] = record
                    if times is not None:
                        times[rank] += int((time.monotonic() - started) * 1e9)
            if not pending:
                return found
            if lost is not None:  # what came before the loss was seen has been read by now
                raise RankLost(f"{what}: {lost}", lost.ranks)
            if drive() or len(pending) < before:
                pause.reset()
                continue
            pause.rest()
            now = time.monotonic()
            if now - checked >= CHECK_EVERY_S:
                checked = now
                try:
                    watch.check(pending.keys())
                except RankLost as error:
                    lost = error.with_traceback(None)  # which would keep the callers alive, in a circle
                if now - started > budget_s:
                    raise out_of_time(what, list(pending), budget_s, watch)


def wait_tasks(tasks: Collection[Task], budget_s: float, watch: Watch, what: str) -> None:
    """Drive own transfers to their end. After the budget, raises RankLost naming the ranks that those at hand are
    for."""
    started = time.monotonic()
    pause = Pause()
    with watch.driving() as drive:
        while not all(task.done for task in tasks):
            if drive():
                pause.reset()
                continue
            pause.rest()
            if time.monotonic() - started > budget_s:
                ranks = sorted({task.to for task in tasks if not task.done})
                raise RankLost(f"{what}: transfers to {named(ranks)} did not end within {budget_s:g} s", ranks)


def out_of_time(what: str, missing: list[int], budget_s: float, watch: Watch) -> RankLost:
    """The error of a wait whose budget is spent. A rank of this host that died or hangs is blamed before ranks that may
    have waited for it."""
    message = f"{what}: {named(missing)} sent nothing within {budget_s:g} s"
    # Rows between hosts come through the memory of a rail peer: a source may be missing because that one is gone.
    for ranks, why in ((watch.gone(), "died (the process is gone)"), (watch.stopped(), "hangs (it is stopped)")):
        if ranks and not set(ranks) & set(missing):
            return RankLost(f"{message}; {named(ranks)} {why}", ranks)
    return RankLost(message, missing)
