"""Words that the processes of a chaos run share: who is where in which step, and what is to happen there.

A file that all map. Each word has one writer at a time, and is stored whole (x86-64).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

#: Of a rank. STEP, POINT: where it is; DONE: its last whole or faulted step; STEPS, ROWS: how many were checked.
#: ARM_*: at which step and point it is to do what (a signal's number, or LEAVE); STRUCK: when it did
#: (CLOCK_MONOTONIC, ns); OWNER: the process that has the slot, the only one that may write here.
STEP, POINT, DONE, STEPS, ROWS, ARM_STEP, ARM_POINT, ARM_WHAT, STRUCK, OWNER = range(10)
LEAVE = 1000
WIDTH = 16
_FOREVER = (1 << 62) - 1


class Board:
    """ranks: int64 [ranks, words]."""

    def __init__(self, path: Path, ranks: int, make: bool = False) -> None:
        mapped: npt.NDArray[np.int64] = np.memmap(path, np.int64, "w+" if make else "r+", shape=(ranks + 1, WIDTH))
        self.ranks, self._all = mapped[1:], mapped[0]
        if make:
            self.resume()

    @property
    def last(self) -> int:
        """The last step that is to be made for now."""
        return int(self._all[0])

    @property
    def ended(self) -> bool:
        return bool(self._all[1])

    def pause(self) -> int:
        """Let nobody begin a step that comes some steps after the newest of all. Returns the last one."""
        # Steps 4i + 2 and 4i + 3 are in flight together.
        last = (int(self.ranks[:, STEP].max()) // 4 + 3) * 4 + 1
        self._all[0] = last
        return last

    def resume(self) -> None:
        self._all[0] = _FOREVER

    def end(self) -> None:
        self._all[1] = 1
