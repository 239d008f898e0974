"""The processes of a chaos run, what they have said, and waits for what they are to say."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import os
import secrets
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from moe_a2a.chaos import board as b
from moe_a2a.chaos.network import Network, inside, listener
from moe_a2a.chaos.rank import MAKERS, Place, Run, log_file, serve
from moe_a2a.chaos.steps import Workload
from moe_a2a.membership.store import split_url
from moe_a2a.membership.store_process import start_store

#: Ranks are forked from a process that has loaded everything and done nothing.
_server = mp.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch.distributed", *MAKERS.values(), "moe_a2a.elastic.group"])
_TICK_S = 0.005
_LONGEST_END_S = 8.0
_MOST_NOTES, _MOST_LOG = 200, 6000


class Hang(Exception):
    """Something did not happen in time."""


@dataclass
class Seen:
    """A view as a rank told of it."""

    at: float
    epoch: int
    digest: str
    held: dict[int, int]
    frozen: bool


@dataclass
class Live:
    """A process of a rank. whole: (number, members, began, ended) of its first step with other members, or after one
    that was not whole; short: step -> (its missing, those of them that dispatch did not bring); outside: times at which
    it found itself excluded; came: times and seconds of its ways back."""

    process: Any
    pipe: Connection
    views: list[Seen] = field(default_factory=list)
    whole: list[tuple[int, tuple[int, ...], float, float]] = field(default_factory=list)
    short: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    short_at: float = 0.0
    outside: list[tuple[float, str, bool]] = field(default_factory=list)
    came: list[tuple[float, float]] = field(default_factory=list)
    inside: bool = False
    ended: bool = False
    stopped: bool = False
    incarnation: int = 0
    watcher: int = 0
    first: int = 0

    @property
    def runs(self) -> bool:
        return self.inside and not self.ended and not self.stopped

    @property
    def view(self) -> Seen | None:
        return self.views[-1] if self.views else None


class Group:
    """One group from its founding on. makes: what its ranks make (rank.MAKERS). wrong: takes what must not be, as
    (kind, text); note: what is worth saying."""

    _names = itertools.count()

    def __init__(
        self,
        load: Workload,
        makes: str,
        hosts: int,
        timeout_s: float,
        network: Network | None,
        wrong: Callable[[str, str], None],
        note: Callable[[str], None],
    ) -> None:
        self.load, self.hosts, self.timeout_s, self.network = load, hosts, timeout_s, network
        self._wrong, self._note = wrong, note
        self._folder = tempfile.TemporaryDirectory(prefix="moe-a2a-chaos-")
        self.board = b.Board(Path(self._folder.name) / "board", load.ranks, make=True)
        self.store_url = self._meeting = ""
        self._meeting_store: TCPStore | None = None
        self._digests: dict[int, str] = {}
        self._watchers: dict[int, int] = {}
        self._expected_end: set[int] = set()
        self._checked = [0, 0]
        if network is not None:
            self.start_store(0)
            self._meeting = self.store_url
        else:
            self._meeting_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self._meeting = f"tcp://127.0.0.1:{self._meeting_store.port}"
        self.run = Run(
            load,
            makes,
            f"chaos-{os.getpid()}-{next(self._names)}-{secrets.token_hex(3)}",
            timeout_s,
            max(20.0, 5 * timeout_s),
            self._folder.name,
            self.store_url,
            self._meeting,
        )
        self.lives: dict[int, Live] = {}
        #: Processes that were stopped, and whose slots have others by now.
        self.ghosts: list[tuple[int, Live]] = []
        for rank in range(load.ranks):
            self.start(rank, joins=False)

    # places

    def host_of(self, rank: int) -> int:
        return rank * self.hosts // self.load.ranks

    def ranks_of(self, hosts: Iterable[int]) -> set[int]:
        return {rank for rank in range(self.load.ranks) if self.host_of(rank) in hosts}

    @property
    def everybody(self) -> set[int]:
        return set(range(self.load.ranks))

    def place(self, rank: int) -> Place:
        host = self.host_of(rank)
        if self.network is None:
            return Place(f"host-{host}")
        return Place(f"host-{host}", self.network.name(host), self.network.address(host))

    def start_store(self, port: int) -> None:
        """On the store's own machine of the network."""
        assert self.network is not None
        with inside(self.network.name(self.network.store)):
            self.store_url = start_store(f"{self.network.address(self.network.store)}:{port}", idle_s=60.0)

    def store_pid(self) -> int:
        """The process that serves the store. Raises LookupError."""
        port = split_url(self.store_url)[2]
        with inside(self.network.name(self.network.store) if self.network else ""):
            return listener(port)

    # processes

    def start(self, rank: int, joins: bool) -> Live:
        ours, theirs = _server.Pipe()
        run = Run(**{**self.run.__dict__, "store": self.store_url}) if joins else self.run
        words = self.board.ranks[rank]
        self._checked = [self._checked[0] + int(words[b.STEPS]), self._checked[1] + int(words[b.ROWS])]
        words[:] = 0
        process = _server.Process(target=serve, args=(theirs, run, rank, self.place(rank), joins), daemon=True)
        process.start()
        theirs.close()
        live = self.lives[rank] = Live(process, ours)
        self._expected_end.discard(rank)
        return live

    def supersede(self, rank: int) -> Live:
        """A new process takes the slot of one that is stopped, and may wake up. Returns the old one."""
        old = self.lives[rank]
        self.ghosts.append((rank, old))
        self.start(rank, joins=True)
        return old

    def lay(self, ghost: Live) -> None:
        """End a process whose slot has another one."""
        ghost.process.kill()
        ghost.process.join()
        ghost.ended = True
        self.ghosts = [(rank, live) for rank, live in self.ghosts if live is not ghost]

    def expect_end(self, ranks: Iterable[int]) -> None:
        """These processes are to end; all others are not."""
        self._expected_end.update(ranks)

    def signal(self, rank: int, number: int) -> None:
        live = self.lives[rank]
        if number == signal.SIGKILL:
            self._expected_end.add(rank)
        live.stopped = number == signal.SIGSTOP
        os.kill(live.process.pid, number)

    def kill_watcher(self, host: int) -> int:
        """Returns the process that was killed."""
        pid = self._watchers[host]
        _kill(pid, "moe_a2a.membership.watcher_process")
        return pid

    # what they say

    def pump(self, timeout_s: float = _TICK_S) -> None:
        """Take in what was said."""
        pipes = {live.pipe: (rank, live) for rank, live in [*self.lives.items(), *self.ghosts] if not live.ended}
        for pipe in wait(list(pipes), timeout_s):
            rank, live = pipes[pipe]  # type: ignore[index]
            try:
                for _ in range(100):
                    self._take(rank, live, *live.pipe.recv())
                    if not live.pipe.poll(0):
                        break
            except (EOFError, OSError):
                live.ended, live.inside = True, False
                live.process.join()
                if live is self.lives.get(rank) and rank not in self._expected_end:
                    self._wrong("ended", f"rank {rank} ended with {live.process.exitcode}")

    def _take(self, rank: int, live: Live, what: str, at: float, *said: Any) -> None:
        if what == "view":
            epoch, digest, held, frozen, live.incarnation, watcher = said
            if self._digests.setdefault(epoch, digest) != digest:
                self._wrong("views", f"rank {rank} has another view of epoch {epoch} than others")
            if watcher != live.watcher and live is self.lives.get(rank):
                live.watcher = self._watchers[self.host_of(rank)] = watcher
            live.views.append(Seen(at, epoch, digest, held, frozen))
        elif what == "whole":
            live.whole.append(said)
            live.first = live.first or said[0]
        elif what == "short":
            number, _, missing, not_received = said
            live.short[number] = (missing, not_received)
            live.short_at = at
            live.first = live.first or number
        elif what == "in":
            live.inside = True
            self.store_url = said[0] or self.store_url
        elif what == "came":
            live.came.append((at, said[0]))
        elif what == "outside":
            live.inside, live.first = False, 0
            live.outside.append((at, *said))
            live.short.clear()
        elif what == "again" and live is self.lives.get(rank):
            self._note(f"rank {rank} tries again: {said[0][:_MOST_NOTES]}")
        elif what == "again":
            pass
        elif what == "wrong":
            self._wrong("rows", said[0])
            self._expected_end.add(rank)
        else:
            self._wrong("errors", f"rank {rank}: {said[0]}")
            self._expected_end.add(rank)

    def until(self, true: Callable[[], bool], patience_s: float, what: str) -> None:
        """Raises Hang."""
        deadline = time.monotonic() + patience_s
        while not true():
            if time.monotonic() > deadline:
                raise Hang(f"{what} did not happen within {patience_s:g} s")
            self.pump()

    def let_pass(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.pump(min(left, 0.05))

    def forget(self) -> None:
        """What was said before the next event."""
        for live in self.lives.values():
            live.views = live.views[-1:]
            live.whole, live.came, live.outside = live.whole[-1:], [], []
            live.short.clear()

    # what is the case

    @property
    def checked(self) -> tuple[int, int]:
        """(steps, rows and sums) that ranks of this group have checked."""
        steps, rows = self.board.ranks[:, b.STEPS].sum(), self.board.ranks[:, b.ROWS].sum()
        return self._checked[0] + int(steps), self._checked[1] + int(rows)

    def agree(self, ranks: Iterable[int], members: Iterable[int]) -> bool:
        """Whether these ranks have one and the same view, with exactly these members."""
        newest = [self.lives[rank].view for rank in ranks]
        wanted = set(members)
        return (
            all(view is not None and not view.frozen and view.held.keys() == wanted for view in newest)
            and len({(view.epoch, view.digest) for view in newest if view is not None}) == 1
        )

    def whole_since(self, ranks: Iterable[int], members: Iterable[int]) -> bool:
        """Whether the last that each of these ranks told is a whole step with exactly these members."""
        wanted = tuple(sorted(members))
        lives = [self.lives[rank] for rank in ranks]
        return all(
            live.inside and live.whole and live.whole[-1][1] == wanted and live.whole[-1][3] > live.short_at
            for live in lives
        )

    def check_both_sides(self) -> None:
        """A rank that went on without another one's tokens has told it so: the other one's step is not whole either."""
        done = {rank: int(self.board.ranks[rank][b.DONE]) for rank in self.lives}
        sides: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank, live in self.lives.items():
            for number, (_, not_received) in live.short.items():
                for other in not_received:
                    sides[other, number].append(rank)
        for (other, number), ranks in sides.items():
            live = self.lives[other]
            if live.first and live.first <= number <= done[other] and number not in live.short:
                self._wrong("rows", f"step {number} is whole for rank {other}, and ranks {ranks} left it out")

    def dump(self) -> str:
        """Where everybody is, and the stacks of all processes that run."""
        for live in self.lives.values():
            if not live.ended:
                os.kill(live.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        parts = []
        for rank, live in self.lives.items():
            words = self.board.ranks[rank]
            seen = live.view
            parts.append(
                f"rank {rank}: inside {live.inside}, ended {live.ended}, stopped {live.stopped}, step {words[b.STEP]}, "
                f"point {words[b.POINT]}, done {words[b.DONE]}, view {seen}, whole {live.whole[-1:]}, "
                f"short {list(live.short.items())[-1:]}"
            )
            with contextlib.suppress(OSError):
                parts.append(log_file(self.run, rank).read_text(errors="replace")[-_MOST_LOG:])
        return "\n".join(parts)

    def close(self, kindly: bool = True) -> None:
        """End everything that was started here."""
        self.expect_end(self.lives)
        self.board.end()
        self.board.resume()
        deadline = time.monotonic() + (_LONGEST_END_S if kindly else 0.0)
        for live in self.lives.values():
            with contextlib.suppress(OSError):
                os.kill(live.process.pid, signal.SIGCONT)
        while time.monotonic() < deadline and not all(live.ended for live in self.lives.values()):
            self.pump()
        for live in [*self.lives.values(), *(ghost for _, ghost in self.ghosts)]:
            live.process.kill()
            live.process.join()
            live.pipe.close()
        for pid in self._watchers.values():
            _kill(pid, "moe_a2a.membership.watcher_process")
        with contextlib.suppress(LookupError):
            _kill(self.store_pid(), "store")
        self._folder.cleanup()


def _kill(pid: int, word: str) -> None:
    """Kill a process if a word of its command line begins so: its number may be another one's by now."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(given.startswith(word.encode()) for given in words):
            os.kill(pid, signal.SIGKILL)
