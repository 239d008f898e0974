"""A thread that drives transfers between hosts, so that they go on while the caller computes.

Tasks are generators that yield while they wait. The thread sleeps when there is none.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Generator

_PR_SET_TIMERSLACK = 29
_SPINS = 30
_NAP_S = 20e-6


class Task:
    """A transfer in progress. `error` is set if it failed; `done` once it ended either way."""

    def __init__(self, run: Generator[None, None, None]) -> None:
        self.run = run
        self.done = False
        self.error: BaseException | None = None

    def advance(self) -> bool:
        """Go on to the next wait. True if the task has ended."""
        try:
            next(self.run)
        except StopIteration:
            self.done = True
        except BaseException as error:  # the waiting caller raises it
            self.error = error
            self.done = True
        return self.done


class Progress:
    """The thread. `start` hands it a task; `close` lets the tasks at hand end first."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="moe_a2a-progress", daemon=True)
        self._thread.start()

    def start(self, run: Generator[None, None, None]) -> Task:
        task = Task(run)
        # The first stretch runs here: a transfer is posted without waiting for the thread to be scheduled.
        if not task.advance():
            with self._wake:
                self._tasks.append(task)
                self._wake.notify()
        return task

    def close(self, timeout_s: float) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        # The kernel rounds naps up by 50 us unless told otherwise; for this thread only.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
        idle = 0
        while True:
            with self._wake:
                while not self._tasks:
                    if self._closing:
                        return
                    self._wake.wait()
                    idle = 0
                tasks = list(self._tasks)
            ended = [task for task in tasks if task.advance()]
            if ended:
                idle = 0
                with self._wake:
                    self._tasks = [task for task in self._tasks if not task.done]
                continue
            idle += 1
            if idle < _SPINS:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)
