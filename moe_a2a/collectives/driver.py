"""Drives a group's operations: whoever waits for one, else a thread, so that they go on while the caller computes.

Operations are generators that yield while they wait. Those of one lane (collectives; messages to a rank; messages from
a rank) run one after the other, in the order in which they were begun.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable

from moe_a2a.collectives.board import Steps
from moe_a2a.collectives.work import CollectiveWork
from moe_a2a.errors import MoeA2AError
from moe_a2a.transport.wait import Pause

#: Pause of the thread before it begins: a caller that waits at once drives by itself.
_THREAD_NAP_S = 100e-6


class Driver:
    def __init__(self) -> None:
        self._lanes: dict[Hashable, deque[tuple[CollectiveWork, Steps]]] = {}
        self._turn = threading.RLock()  # what is called when an operation ends may begin another one
        self._inside = False
        self._wake = threading.Condition()
        self._waiters = 0
        self._closing = False
        self._thread: threading.Thread | None = None

    def begin(self, lane: Hashable, work: CollectiveWork, steps: Steps, alone: bool) -> None:
        """Begin an operation, which ends its work. Its first stretch runs here, if none is before it. alone:
        the caller may not come back soon, so that the thread has to see to it."""
        with self._turn:
            queue = self._lanes.setdefault(lane, deque())
            queue.append((work, steps))
            if len(queue) == 1 and not self._inside:
                self._step(lane)
        if alone and self._lanes:
            with self._wake:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._loop, name="moe_a2a-collectives", daemon=True)
                    self._thread.start()
                self._wake.notify()

    def run(self, work: CollectiveWork, timeout_s: float | None) -> bool:
        """Drive until an operation has ended, or so many seconds are over; False in the latter case."""
        if work.is_completed():
            return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause = Pause()
        with self._wake:
            self._waiters += 1
        try:
            while True:
                ended = self.advance()
                if work.is_completed():
                    return True
                if deadline is not None and time.monotonic() > deadline:
                    return False
                if ended:
                    pause.reset()
                else:
                    pause.rest()
        finally:
            with self._wake:
                self._waiters -= 1
                if self._lanes and self._thread is not None:
                    self._wake.notify()

    def advance(self) -> bool:
        """Every lane goes on to its next wait, unless another thread is at it. True if an operation has ended."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            return not self._inside and sum(self._step(lane) for lane in list(self._lanes)) > 0
        finally:
            self._turn.release()

    @property
    def idle(self) -> bool:
        return not self._lanes

    def has(self, lane: Hashable) -> bool:
        return lane in self._lanes

    def close(self) -> None:
        """End the thread, and all operations."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        with self._turn:
            for queue in self._lanes.values():
                for work, steps in queue:
                    steps.close()
                    work.end(MoeA2AError(f"{work.name}: the group was closed before this had ended"))
            self._lanes.clear()

    def _step(self, lane: Hashable) -> bool:
        queue = self._lanes[lane]
        self._inside = True
        try:
            next(queue[0][1])
        except StopIteration:
            queue.popleft()
            if not queue:
                del self._lanes[lane]
            return True
        finally:
            self._inside = False
        return False

    def _loop(self) -> None:
        pause = Pause()
        while True:
            with self._wake:
                if self._closing:
                    return
                if not self._lanes or self._waiters:
                    self._wake.wait()
                    pause = Pause()
                    continue
            time.sleep(_THREAD_NAP_S)
            while self._lanes and not self._waiters and not self._closing:
                if self.advance():
                    pause.reset()
                else:
                    pause.rest()
