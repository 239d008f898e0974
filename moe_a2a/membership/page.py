"""A rank's page of shared memory in which its host's watcher keeps the group's view.

The rank makes it (anonymous memory, no name) and hands it to the watcher; the watcher alone writes. So a wait can look
at one word, without a lock, a system call or a thread that has to be scheduled first. The page stays where it is when
the watcher dies and another one takes over.

64-bit words: magic, sequence (odd while the view is being written), epoch, flags, time of the watcher's last sign of
life, length of the view, time when the rank itself last waited for others (the rank's own word). Then, one word per
slot each: from `FIRST_SLOT` the incarnation that takes part, or 0; from `FIRST_DEAD` the one that is known to be
dead, or 0; three words with incarnation, process id and time of start of the processes that this watcher watches, for
the next one; the time when its host was last heard of; the time when it last waited for others. Then the view's bytes.
Times are CLOCK_MONOTONIC in ns, 0 for never. Order of stores is x86-64's.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_a2a.errors import MessageError, MoeA2AError
from moe_a2a.membership.view import MAX_RANKS, View
from moe_a2a.membership.wire import MAX_VIEW_BYTES, decode_view

_MAGIC = 0x6D6F655F61326132
_VERSION_WORD, _SEQUENCE, _EPOCH, _FLAGS, _BEAT, _LENGTH, _OWN_WAIT = range(7)
FIRST_SLOT = 16
FIRST_DEAD = FIRST_SLOT + MAX_RANKS
_FIRST_PROCESS = FIRST_DEAD + MAX_RANKS
_FIRST_HEARD = _FIRST_PROCESS + 3 * MAX_RANKS
_FIRST_WAIT = _FIRST_HEARD + MAX_RANKS
_VIEW_BYTE = 8 * (_FIRST_WAIT + MAX_RANKS)
PAGE_BYTES = _VIEW_BYTE + MAX_VIEW_BYTES
STORE_AWAY = 1
_TRIES = 10_000


@dataclass(frozen=True)
class Process:
    """A process that held a slot. started: its time of start, which tells it from a later one with its number."""

    incarnation: int
    pid: int
    started: int

    @classmethod
    def of(cls, incarnation: int, pid: int) -> Process:
        return cls(incarnation, pid, _started(pid))

    def open(self) -> int:
        """A descriptor that tells of its end (pidfd); -1 if it has ended."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return -1
        if _started(self.pid) == self.started:
            return fd
        os.close(fd)
        return -1


def _started(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[19])
    except OSError:
        return 0


class Page:
    """words: int64 numpy over the page's words."""

    def __init__(self, fd: int | None = None) -> None:
        """fd: of another process's page, which this object takes over. Raises MoeA2AError if it is none."""
        made = fd is None
        if fd is None:
            fd = os.memfd_create("moe_a2a_view", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, PAGE_BYTES)
            # A page that shrank would kill whoever looks at it.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.fd = fd
        try:
            if os.fstat(fd).st_size != PAGE_BYTES or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise MoeA2AError("the descriptor is not a page of this version of moe-a2a")
            self._map = mmap.mmap(fd, PAGE_BYTES)
        except (OSError, ValueError) as error:
            raise MoeA2AError(f"cannot map a page of views: {error}") from error
        self.words: npt.NDArray[np.int64] = np.frombuffer(self._map, dtype=np.int64, count=_VIEW_BYTE // 8)
        if made:
            self.words[_VERSION_WORD] = _MAGIC
        elif self.words[_VERSION_WORD] != _MAGIC:
            raise MoeA2AError("the descriptor is not a page of this version of moe-a2a")

    # the watcher's side

    def write(self, view: View, data: bytes) -> None:
        """Publish a view, of which `data` is `encode_view`: first the words that waits look at, then the whole. Whoever
        has seen a word change reads a view of at least that epoch."""
        words = np.zeros(MAX_RANKS, dtype=np.int64)
        words[: view.max_ranks] = [slot.incarnation if slot.takes_part else 0 for slot in view.slots]
        sequence = int(self.words[_SEQUENCE]) | 1
        self.words[_SEQUENCE] = sequence
        self.words[FIRST_SLOT:FIRST_DEAD] = words
        self._map[_VIEW_BYTE : _VIEW_BYTE + len(data)] = data
        self.words[_LENGTH] = len(data)
        self.words[_EPOCH] = view.epoch
        self.words[_SEQUENCE] = sequence + 1

    def mark_dead(self, rank: int, incarnation: int) -> None:
        """Say that a process is gone for certain, before the group has agreed on a view without it."""
        self.words[FIRST_DEAD + rank] = incarnation

    def set_process(self, rank: int, process: Process) -> None:
        """Remember which process has a slot, for a watcher that comes after this one."""
        first = _FIRST_PROCESS + 3 * rank
        self.words[first : first + 3] = (process.incarnation, process.pid, process.started)

    def processes(self) -> dict[int, Process]:
        """rank -> what was remembered."""
        words = self.words[_FIRST_PROCESS:_FIRST_HEARD].reshape(MAX_RANKS, 3)
        return {int(rank): Process(*map(int, words[rank])) for rank in words[:, 0].nonzero()[0]}

    def beat(self, store_away: bool) -> None:
        """A sign of life, and whether the view is frozen."""
        self.words[_FLAGS] = STORE_AWAY if store_away else 0
        self.words[_BEAT] = time.monotonic_ns()

    @property
    def own_wait(self) -> int:
        """When the rank of this page last waited for others; 0 if never."""
        return int(self.words[_OWN_WAIT])

    def hear(self, ranks: Mapping[int, int]) -> None:
        """The host of these ranks has been heard of. ranks: rank -> when it last waited for others, 0 if never."""
        now = time.monotonic_ns()
        for rank, waited in ranks.items():
            self.words[_FIRST_WAIT + rank] = waited
            self.words[_FIRST_HEARD + rank] = now

    # the rank's side

    def say_that_it_waits(self) -> None:
        """Of this rank, for others: to be said again and again, for it is believed only for a moment."""
        self.words[_OWN_WAIT] = time.monotonic_ns()

    def heard(self, rank: int) -> float:
        """When the host of a rank was last heard of, time.monotonic(); 0 if never."""
        return int(self.words[_FIRST_HEARD + rank]) / 1e9

    def waited(self, rank: int) -> float:
        """When a rank last waited for others, as its host last said, time.monotonic(); 0 if never."""
        return int(self.words[_FIRST_WAIT + rank]) / 1e9

    @property
    def epoch(self) -> int:
        """0 before the first view."""
        return int(self.words[_EPOCH])

    @property
    def sequence(self) -> int:
        """Changes with every view, before its words do; odd while it is being written."""
        return int(self.words[_SEQUENCE])

    @property
    def store_away(self) -> bool:
        return bool(self.words[_FLAGS] & STORE_AWAY)

    @property
    def beat_age_s(self) -> float:
        """Seconds since the watcher's last sign of life; 0 if it has not begun."""
        last = int(self.words[_BEAT])
        return (time.monotonic_ns() - last) / 1e9 if last else 0.0

    def takes_part(self, rank: int, incarnation: int) -> bool:
        """Whether this process takes part, by the newest view."""
        return int(self.words[FIRST_SLOT + rank]) == incarnation

    def is_dead(self, rank: int, incarnation: int) -> bool:
        """Whether this process is gone for certain."""
        return int(self.words[FIRST_DEAD + rank]) == incarnation

    def deaths(self, slots: int) -> bytes:
        """Changes whenever a process of these first slots is found to be gone."""
        return self.words[FIRST_DEAD : FIRST_DEAD + slots].tobytes()

    @property
    def whole(self) -> bool:
        """Whether it holds a view, and not one that a watcher left half written."""
        sequence = int(self.words[_SEQUENCE])
        return sequence != 0 and sequence % 2 == 0

    def read(self) -> tuple[View | None, int]:
        """The newest view, None before the first, and its sequence. Raises MessageError if the page is broken."""
        for attempt in range(_TRIES):
            before = int(self.words[_SEQUENCE])
            if before == 0:
                return None, 0
            if before % 2 == 0:
                length = int(self.words[_LENGTH])
                data = self._map[_VIEW_BYTE : _VIEW_BYTE + min(length, MAX_VIEW_BYTES)]
                if int(self.words[_SEQUENCE]) == before:
                    return decode_view(data), before
            if attempt > 10:
                time.sleep(1e-4)
        raise MessageError("the page's view is half written, and stays so: its watcher died while it wrote")

    def address(self) -> int:
        """Of the first word, for those that map it elsewhere (pinned memory)."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
