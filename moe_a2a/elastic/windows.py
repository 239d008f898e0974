"""Where the engine takes in what ranks of other hosts write.

A write may still be under way when its sender has been given up, and go on when the slot has another process: one that
was stopped in the middle wakes up, or a network comes back. So each process that holds a slot is given a mapping of the
slot's lane (transport/region.py) of its own, registered under an address that only it is told. With the next process
that mapping becomes memory that nobody reads, and late writes end there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from moe_a2a.errors import EngineError, MoeA2AError
from moe_a2a.transport.engine import Engine
from moe_a2a.transport.memory import HostMemory, forget


@dataclass(frozen=True)
class Window:
    """incarnation: of the process that writes here. origin: what it adds to offsets of the region."""

    incarnation: int
    origin: int


class Windows:
    """The windows of one rank's region. lanes: (start, bytes) by slot."""

    def __init__(self, memory: HostMemory, engine: Engine, lanes: tuple[tuple[int, int], ...]) -> None:
        self._memory, self._engine, self._lanes = memory, engine, lanes
        self._given: dict[int, Window] = {}
        self._lock = threading.Lock()
        self._closed = False

    def give(self, rank: int, incarnation: int) -> Window:
        """The window of a process, made if it is new; then that of its predecessor is no more. Raises EngineError,
        MoeA2AError."""
        with self._lock:
            if self._closed:
                raise MoeA2AError("this rank has closed its memory")
            window = self._given.get(rank)
            if window is None or window.incarnation != incarnation:
                self._take_back(rank)
                start, nbytes = self._lanes[rank]
                address = self._memory.window(start, nbytes)
                try:
                    self._engine.register(address, nbytes)
                except EngineError:
                    forget(address, nbytes)
                    raise
                window = self._given[rank] = Window(incarnation, address - start)
            return window

    def close(self) -> None:
        """Before the memory is."""
        with self._lock:
            self._closed = True
            for rank in list(self._given):
                self._take_back(rank)

    def _take_back(self, rank: int) -> None:
        window = self._given.pop(rank, None)
        if window is not None:
            start, nbytes = self._lanes[rank]
            self._engine.unregister(window.origin + start)
            forget(window.origin + start, nbytes)
