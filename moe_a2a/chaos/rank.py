"""The process of one rank of a chaos run: makes steps of some kind and checks them, does to itself what the board says,
comes back by itself when it was excluded, and tells the director what it sees."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moe_a2a.chaos import board as b
from moe_a2a.chaos.network import enter
from moe_a2a.chaos.steps import Workload, WrongRows
from moe_a2a.errors import ExcludedFromView, MoeA2AError
from moe_a2a.membership.member import Member
from moe_a2a.membership.store import split_url
from moe_a2a.membership.wire import encode_view

_NAP_S = 2e-3
_LOOK_S = 0.1
_AGAIN_S = 0.05
_RETRIES_S = 60.0
_SLOW_SHARE = 0.7
#: What ranks can make -> where that is.
MAKERS = {"steps": "moe_a2a.chaos.step_rank", "collectives": "moe_a2a.chaos.collective_rank"}


@dataclass(frozen=True)
class Place:
    """Where a rank runs. namespace: the network namespace of its host, "" for none; address: of the host."""

    host: str
    namespace: str = ""
    address: str = "127.0.0.1"

    @property
    def host_address(self) -> str | None:
        """For data of other hosts; None for hosts that are played, which find it out."""
        return self.address if self.namespace else None


@dataclass(frozen=True)
class Run:
    """What all ranks of a run are given. makes: one of MAKERS. store: of the group, "" if rank 0 is to start it;
    meeting: a TCPStore where founders meet."""

    load: Workload
    makes: str
    group: str
    timeout_s: float
    patience_s: float
    folder: str
    store: str = ""
    meeting: str = ""


def serve(pipe: Connection, run: Run, rank: int, place: Place, joins: bool) -> None:
    """A process's whole life. Tells (what, time, ...) by `pipe`; ends when the other end does."""
    torch.set_num_threads(1)
    log = os.open(log_file(run, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)  # the engine and torch say much when peers go
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2, all_threads=True)
    if place.namespace:
        enter(place.namespace)
    threading.Thread(target=_end_with_the_director, args=(pipe,), daemon=True).start()
    code = 1
    try:
        importlib.import_module(MAKERS[run.makes]).make(pipe, run, rank, place).live(joins)
        code = 0
    except WrongRows as error:
        pipe.send(("wrong", time.monotonic(), str(error)))
    except BaseException:
        pipe.send(("error", time.monotonic(), traceback.format_exc()))
    os._exit(code)


def log_file(run: Run, rank: int) -> Path:
    """What a rank's process says, its stacks included if it is sent SIGUSR1."""
    return Path(run.folder) / f"rank-{rank}.log"


def _end_with_the_director(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(0)


class Rank(ABC):
    """What every rank does, whatever its steps are."""

    def __init__(self, pipe: Connection, run: Run, rank: int, place: Place) -> None:
        self._pipe, self.run, self.rank, self.place = pipe, run, rank, place
        self._speak = threading.Lock()
        self._board = b.Board(Path(run.folder) / "board", run.load.ranks)
        self._row, self._scratch = self._board.ranks[rank], np.zeros(b.WIDTH, np.int64)
        self._row[b.OWNER] = os.getpid()
        self._members: tuple[int, ...] = ()
        self._leaving = False
        self._began = float("inf")

    def meeting(self) -> dist.Store:
        """Where founders meet."""
        _, host, port = split_url(self.run.meeting)
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))

    # of its steps

    @abstractmethod
    def found(self) -> None:
        """Found the group with all others."""

    @abstractmethod
    def join(self) -> None:
        """Come to the group as a new process."""

    @abstractmethod
    def rejoin(self) -> None:
        """Come back to it."""

    @abstractmethod
    def make_steps(self) -> None:
        """The next ones, with `reach` at every point. Raises WrongRows, ExcludedFromView."""

    @abstractmethod
    def leave(self, steps: int) -> None:
        """Leave in order, after so many steps if they are counted."""

    @abstractmethod
    def close(self) -> None: ...

    @property
    @abstractmethod
    def member(self) -> Member | None: ...

    @property
    @abstractmethod
    def next(self) -> int:
        """Number of the next step."""

    # its life

    def live(self, joins: bool) -> None:
        started = time.monotonic()
        if joins:
            self._patiently(self.join)
        else:
            self.found()
        self._watch()
        self._tell("in", self.member.options.store if self.member else "")
        threading.Thread(target=self._say_what_is_slow, daemon=True).start()
        came: float | None = started if joins else None
        while not self._board.ended:
            try:
                if self.next > self._board.last:
                    time.sleep(_NAP_S)
                    continue
                self._began = time.monotonic()
                self.make_steps()
                self._began = float("inf")
                if came is not None:
                    self._tell("came", time.monotonic() - came)
                    came = None
            except ExcludedFromView as error:
                self._tell("outside", str(error), self._leaving)
                self._leaving = False
                self._words[b.ARM_WHAT] = 0
                came = time.monotonic()
                self._patiently(self.rejoin)
                self._watch()
                self._tell("in", "")
        self.close()

    @property
    def _words(self) -> npt.NDArray[np.int64]:
        """This process's words of the board; others, that nobody reads, once another one has the slot."""
        return self._row if self._row[b.OWNER] == os.getpid() else self._scratch

    def _patiently(self, come: Callable[[], None]) -> None:
        """A slot may be held by a process that died a moment ago, and the store may be away."""
        deadline = time.monotonic() + _RETRIES_S
        while True:
            try:
                return come()
            except MoeA2AError as error:
                self._tell("again", f"{type(error).__name__}: {error}")
                if time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN_S)

    def _say_what_is_slow(self) -> None:
        """Write down the stacks of a step that may hang. (Not by faulthandler's timer: it reads the stacks of threads
        that go on meanwhile, and has crashed a rank.)"""
        said = 0.0
        while True:
            time.sleep(_LOOK_S)
            began = self._began
            if began != said and time.monotonic() - began > _SLOW_SHARE * self.run.timeout_s:
                said = began
                for frame in sys._current_frames().values():
                    sys.stderr.write("slow:\n" + "".join(traceback.format_stack(frame)))

    # steps

    def reach(self, number: int, point: int) -> None:
        """Say where this rank is, and do to itself what is to be done there."""
        words = self._words
        words[b.STEP], words[b.POINT] = number, point
        what = int(words[b.ARM_WHAT])
        if what and number >= words[b.ARM_STEP] and point == words[b.ARM_POINT]:
            words[b.ARM_WHAT] = 0
            words[b.STRUCK] = time.monotonic_ns()
            if what >= b.LEAVE:
                self._leaving = True
                self.leave(what - b.LEAVE)
            else:
                os.kill(os.getpid(), what)

    def report(
        self,
        number: int,
        members: Collection[int],
        missing: Collection[int],
        not_received: Collection[int],
        rows: int,
        began: float,
    ) -> None:
        """Tell of a step that has ended. missing: ranks for whose
        lack it was not whole; none: it was. rows: that were checked."""
        ended, ranks = time.monotonic(), tuple(sorted(members))
        if missing:
            self._members = ()
            self._tell("short", number, ranks, sorted(missing), sorted(not_received))
        elif ranks != self._members:
            self._members = ranks
            self._tell("whole", number, ranks, began, ended)
        words = self._words
        words[b.ROWS] += rows
        words[b.STEPS] += 1
        words[b.DONE] = number

    # views

    def _watch(self) -> None:
        """Tell of every view that this rank has, in a thread of its own."""
        self._members = ()
        threading.Thread(target=self._follow, args=(self.member,), daemon=True).start()

    def _follow(self, member: Member) -> None:
        known = (0, False, 0)
        while member is self.member:
            try:
                view = member.wait(lambda v: (v.epoch, member.frozen, member.watcher_pid) != known, 1.0)  # noqa: B023
            except MoeA2AError:
                time.sleep(_NAP_S)
                continue
            known = (view.epoch, member.frozen, member.watcher_pid)
            epoch, frozen, watcher = known
            digest = hashlib.sha256(encode_view(view)).hexdigest()[:16]
            held = {rank: view.slots[rank].incarnation for rank in view.ranks}
            with self._speak:
                if member is self.member:
                    said = (epoch, digest, held, frozen, member.incarnation, watcher)
                    self._pipe.send(("view", time.monotonic(), *said))

    def _tell(self, what: str, *content: Any) -> None:
        with self._speak:
            self._pipe.send((what, time.monotonic(), *content))
