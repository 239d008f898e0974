"""The process of one rank of a chaos run: makes steps and checks them, does to itself what the board says, comes back
by itself when it was excluded, and tells the director what it sees."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moe_a2a.all_to_all import AllToAll
from moe_a2a.chaos import board as b
from moe_a2a.chaos.events import MOVES
from moe_a2a.chaos.network import enter
from moe_a2a.chaos.steps import Flight, Workload, WrongRows
from moe_a2a.config import Options
from moe_a2a.elastic.backend import ElasticBackend
from moe_a2a.elastic.options import Elastic
from moe_a2a.errors import ExcludedFromView, JoinRefused, MoeA2AError, StoreAway
from moe_a2a.membership.member import Member
from moe_a2a.membership.store import split_url
from moe_a2a.membership.wire import encode_view

_NAP_S = 2e-3
_AGAIN_S = 0.05
_RETRIES_S = 60.0
_SLOW_SHARE = 0.7


@dataclass(frozen=True)
class Place:
    """Where a rank runs. namespace: the network namespace of its host, "" for none; address: of the host."""

    host: str
    namespace: str = ""
    address: str = "127.0.0.1"


@dataclass(frozen=True)
class Run:
    """What all ranks of a run are given. store: of the group, "" if rank 0 is to start it; meeting: a TCPStore where
    founders meet."""

    load: Workload
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
    faulthandler.register(signal.SIGUSR1, 2, all_threads=True)
    if place.namespace:
        enter(place.namespace)
    threading.Thread(target=_end_with_the_director, args=(pipe,), daemon=True).start()
    code = 1
    try:
        _Rank(pipe, run, rank, place).live(joins)
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


class _Rank:
    def __init__(self, pipe: Connection, run: Run, rank: int, place: Place) -> None:
        self._pipe, self._run, self._rank, self._place = pipe, run, rank, place
        self._speak = threading.Lock()
        self._board = b.Board(Path(run.folder) / "board", run.load.ranks)
        self._row, self._scratch = self._board.ranks[rank], np.zeros(b.WIDTH, np.int64)
        self._row[b.OWNER] = os.getpid()
        self._a2a: AllToAll
        self._members: tuple[int, ...] = ()
        self._leaving = False

    def live(self, joins: bool) -> None:
        started = time.monotonic()
        self._a2a = self._patiently(self._join) if joins else self._found()
        self._watch()
        self._tell("in", self._a2a.elastic.store if self._a2a.elastic else "")
        came: float | None = started if joins else None
        while not self._board.ended:
            try:
                if self._next > self._board.last:
                    time.sleep(_NAP_S)
                    continue
                self._make_steps()
                if came is not None:
                    self._tell("came", time.monotonic() - came)
                    came = None
            except ExcludedFromView as error:
                self._tell("outside", str(error), self._leaving)
                self._leaving = False
                self._words[b.ARM_WHAT] = 0
                came = time.monotonic()
                self._patiently(self._rejoin)
                self._watch()
                self._tell("in", "")
        self._a2a.close()

    @property
    def _words(self) -> npt.NDArray[np.int64]:
        """This process's words of the board; others, that nobody reads, once another one has the slot."""
        return self._row if self._row[b.OWNER] == os.getpid() else self._scratch

    # coming

    def _options(self) -> dict[str, Any]:
        run, place = self._run, self._place
        host_address = place.address if place.namespace else None
        return {"options": Options(timeout_s=run.timeout_s, host=place.host, host_address=host_address)}

    def _elastic(self, join: bool) -> Elastic:
        run = self._run
        return Elastic(
            run.store,
            group=run.group,
            join=join,
            control_address=self._place.address,
            timeout_s=run.patience_s,
        )

    def _found(self) -> AllToAll:
        run = self._run
        _, host, port = split_url(run.meeting)
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
        founders: dict[str, Any] = {"store": store, "rank": self._rank, "world_size": run.load.ranks}
        return AllToAll(run.load.config(), elastic=self._elastic(False), **founders, **self._options())

    def _join(self) -> AllToAll:
        return AllToAll(self._run.load.config(), rank=self._rank, elastic=self._elastic(True), **self._options())

    def _rejoin(self) -> AllToAll:
        assert self._a2a.elastic is not None
        self._a2a.elastic.rejoin()
        return self._a2a

    def _patiently(self, come: Callable[[], AllToAll]) -> AllToAll:
        """A slot may be held by a process that died a moment ago, and the store may be away."""
        deadline = time.monotonic() + _RETRIES_S
        while True:
            try:
                return come()
            except (JoinRefused, StoreAway, ExcludedFromView, MoeA2AError) as error:
                self._tell("again", f"{type(error).__name__}: {error}")
                if time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN_S)

    # steps

    @property
    def _backend(self) -> ElasticBackend:
        backend = self._a2a._backend
        assert isinstance(backend, ElasticBackend)
        return backend

    @property
    def _next(self) -> int:
        return self._backend._number[0] + 1

    def _make_steps(self) -> None:
        """The next step, or the next two together: which, the number says, so that all ranks do the same."""
        number, began = self._next, time.monotonic()
        faulthandler.dump_traceback_later(_SLOW_SHARE * self._run.timeout_s)  # what it hangs on, if it does
        flights: list[Flight] = []
        left: ExcludedFromView | None = None
        for ahead in range(2 if number % 4 == 2 else 1):
            flight = Flight(self._run.load, self._a2a)
            try:
                self._reach(number + ahead, 0)
                flight.send(number + ahead)
            except ExcludedFromView as error:  # a rank that leaves still ends the step that is open
                left = error
                break
            flights.append(flight)
            self._reach(number + ahead, 1)
        for flight in flights:
            flight.receive()
            self._reach(flight.number, 2)
            flight.send_back()
            self._reach(flight.number, 3)
            flight.finish()
            self._report(flight, began)
            self._reach(flight.number, 4)
        faulthandler.cancel_dump_traceback_later()
        if left is not None:
            raise left

    def _reach(self, number: int, point: int) -> None:
        words = self._words
        words[b.STEP], words[b.POINT] = number, point
        what = int(words[b.ARM_WHAT])
        if what and number >= words[b.ARM_STEP] and point == words[b.ARM_POINT]:
            words[b.ARM_WHAT] = 0
            words[b.STRUCK] = time.monotonic_ns()
            if what >= b.LEAVE:
                assert self._a2a.elastic is not None
                self._leaving = True
                self._a2a.elastic.leave(what - b.LEAVE)
            else:
                os.kill(os.getpid(), what)

    def _report(self, flight: Flight, began: float) -> None:
        ended = time.monotonic()
        members, missing = tuple(sorted(flight.roll.incarnations)), flight.missing
        if missing:
            self._members = ()
            self._tell("short", flight.number, members, sorted(missing), sorted(flight.not_received))
        elif members != self._members:
            self._members = members
            self._tell("whole", flight.number, members, began, ended)
        words = self._words
        words[b.ROWS] += flight.rows
        words[b.STEPS] += 1
        words[b.DONE] = flight.number

    # views

    def _watch(self) -> None:
        """Tell of every view that this rank has, in a thread of its own."""
        self._members = ()
        threading.Thread(target=self._follow, args=(self._backend.member,), daemon=True).start()

    def _follow(self, member: Member) -> None:
        known = (0, False, 0)
        while member is self._backend.member:
            with contextlib.suppress(MoeA2AError):
                view = member.wait(lambda v: (v.epoch, member.frozen, member.watcher_pid) != known, 1.0)  # noqa: B023
                known = (view.epoch, member.frozen, member.watcher_pid)
                epoch, frozen, watcher = known
                digest = hashlib.sha256(encode_view(view)).hexdigest()[:16]
                held = {rank: view.slots[rank].incarnation for rank in view.ranks}
                with self._speak:
                    if member is self._backend.member:
                        said = (epoch, digest, held, frozen, member.incarnation, watcher)
                        self._pipe.send(("view", time.monotonic(), *said))

    def _tell(self, what: str, *content: Any) -> None:
        with self._speak:
            self._pipe.send((what, time.monotonic(), *content))


POINTS = {name: place for place, name in enumerate(MOVES)}
