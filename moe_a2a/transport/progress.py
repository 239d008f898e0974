"""Drives transfers between hosts: whoever waits for something, else a thread, so that they go on while the caller
computes.

Tasks are generators that yield while they wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator

from moe_a2a.transport.wire import NO_RANK

#: Pause between two looks at the tasks while nobody waits, and before the first: a caller that sends and then waits
#: drives them itself.
_THREAD_NAP_S = 150e-6


class Task:
    """A transfer in progress. `error` is set if it failed; `done` once it ended either way. to: the rank that it is
    for, if that is settled."""

    def __init__(self, run: Generator[None, None, None], to: int) -> None:
        self._run, self.to = run, to
        self.done = False
        self.error: BaseException | None = None

    def advance(self) -> bool:
        """Go on to the next wait. True if the task has ended."""
        try:
            next(self._run)
        except StopIteration:
            self.done = True
        except BaseException as error:  # the waiting caller raises it
            self.error = error
            self.done = True
        return self.done


class Progress:
    """The tasks of one transport and the thread that drives them when nobody else does."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._wake = threading.Condition()
        self._driver = threading.Lock()
        self._waiters = 0
        self._closing = False
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="moe_a2a-progress", daemon=True)
        self._thread.start()

    def start(self, run: Generator[None, None, None], to: int = NO_RANK) -> Task:
        """Begin a task: its first stretch runs here, so that a transfer is posted at once."""
        task = Task(run, to)
        if task.advance():
            if task.error is not None:
                raise task.error
        else:
            with self._wake:
                self._tasks.append(task)
                if not self._waiters:
                    self._wake.notify()
        return task

    def drive(self) -> bool:
        """Advance all tasks, unless another thread is at it. True if one has ended. Raises the first error of a task,
        now and ever after: a transfer that failed is not made again."""
        if self._failed is not None:
            raise self._failed
        if not self._tasks or not self._driver.acquire(blocking=False):
            return False
        try:
            ended = [task for task in list(self._tasks) if task.advance()]
        finally:
            self._driver.release()
        if ended:
            self._failed = next((task.error for task in ended if task.error is not None), None)
            with self._wake:
                self._tasks = [task for task in self._tasks if not task.done]
        return bool(ended)

    def settle(self, timeout_s: float) -> None:
        """Give the tasks at hand a last chance: after a failure, reports to other ranks may be among them."""
        deadline = time.monotonic() + timeout_s
        while self._tasks and time.monotonic() < deadline:
            time.sleep(_THREAD_NAP_S)

    def __enter__(self) -> Progress:
        """The caller drives from here to the end of the block; the thread rests."""
        with self._wake:
            self._waiters += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._wake:
            self._waiters -= 1
            if self._tasks:
                self._wake.notify()

    def close(self, timeout_s: float) -> None:
        """Let the tasks at hand end, at most `timeout_s`, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._tasks or self._waiters:
                    if self._closing and not self._tasks:
                        return
                    self._wake.wait()
            time.sleep(_THREAD_NAP_S)
            if not self._waiters:
                with contextlib.suppress(Exception):  # the caller's next wait raises it
                    self.drive()


@contextlib.contextmanager
def driving(progress: Progress | None) -> Iterator[Callable[[], bool]]:
    """For the length of a wait: a call that advances a rank's own transfers, if it has any."""
    if progress is None:
        yield lambda: False
        return
    with progress:
        yield progress.drive
