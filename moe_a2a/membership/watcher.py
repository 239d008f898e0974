"""A host's watcher: the process that sees ranks die and keeps the view in their pages (DESIGN.md D6).

Ranks talk to it over an abstract Unix socket, whose name follows from store, group and host label, so that there is one
watcher for each. It ends when its last rank is gone. watcher_process.py has the process that it runs in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial

from moe_a2a.errors import ConfigError, MessageError, MoeA2AError
from moe_a2a.membership.control import Alive, Channel, Died, Message, NewView
from moe_a2a.membership.deaths import SECOND_HAND_S, Deaths, matters
from moe_a2a.membership.link import StoreLink
from moe_a2a.membership.page import Page, Process
from moe_a2a.membership.registered import Registered
from moe_a2a.membership.settings import Settings, peer_credentials
from moe_a2a.membership.store import applied_name, change
from moe_a2a.membership.view import View, move_watcher
from moe_a2a.membership.wire import encode_json, encode_view

_log = logging.getLogger(__name__)

#: Seconds without a rank after which a watcher ends, and those that it waits for the first.
LINGER_S, FIRST_S = 5.0, 60.0
BEAT_S = 0.2
MOST_RANKS = 1024
_LONG_AGO_MS = 3_600_000
_GONE = "its process is gone"


class Watcher:
    def __init__(self, settings: Settings, listener: socket.socket, secret: bytes) -> None:
        self.settings, self._listener, self._secret = settings, listener, secret
        self.view: View | None = None
        self._encoded = b""
        self.channel: Channel | None = None
        self._ranks: dict[int, Registered] = {}  # by descriptor of the connection
        self._sender: tuple[int, int] | None = None  # (rank, incarnation) in whose name the others are told
        self._inherited: set[int] = set()  # incarnations
        self._alive: dict[tuple[int, int], int] = {}  # (rank, incarnation) of a sender -> its clock
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._run_posted)
        self._last_user, self._allowed = time.monotonic(), FIRST_S
        self.link = StoreLink(
            settings.store,
            settings.group,
            settings.host,
            self.post,
            lambda: self.view,
            self.adopt,
            self._silent,
            self._beat,
        )
        self._deaths = Deaths(lambda: self.view, self.link.submit, self._changed)

    def close(self) -> None:
        """Once `run` has returned."""
        ended = self.link.close()
        self._selector.close()
        for file in (self._listener, self.channel):
            if file is not None:
                file.close()
        if ended:  # nobody is left who would write into what has this number next
            os.close(self._wake_r)
            os.close(self._wake_w)

    def post(self, work: Callable[[], None]) -> None:
        """Run a function in this loop; from any thread."""
        self._posted.put(work)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"x")

    def run(self) -> None:
        """Until the last rank is gone."""
        beat = 0.0
        while True:
            now = time.monotonic()
            if now - beat >= BEAT_S:
                beat = now
                self._beat()
                self._tell_of_waits()
            if self._ranks:
                self._last_user, self._allowed = now, LINGER_S
            elif now - self._last_user > self._allowed:
                return
            for key, _ in self._selector.select(SECOND_HAND_S if self._deaths.pending else BEAT_S):
                key.data()
            self._deaths.propose()

    def _beat(self) -> None:
        """A sign of life for the ranks of this host, and whether the view is frozen."""
        for rank in self._ranks.values():
            rank.page.beat(self.link.away)

    def _tell_of_waits(self) -> None:
        """Tell all ranks that this host is there, and which of its ranks wait for others themselves: who hangs is to be
        blamed for it, not who waits for him."""
        now = time.monotonic_ns()
        ranks = {rank.rank: rank for rank in self._ranks.values() if self._matters(rank.rank, rank.incarnation)}
        waited = {number: rank.page.own_wait for number, rank in ranks.items()}
        self._hear_of(waited)
        if ranks and self.view is not None:
            ago = {number: max(1, (now - last) // 1_000_000) for number, last in waited.items() if last}
            alive = Alive(now, {number: rank.incarnation for number, rank in ranks.items()}, ago)
            self._tell(set(self.view.watchers().values()), alive)

    def _take_alive(self, sender: tuple[int, int], alive: Alive) -> None:
        if alive.at <= self._alive.get(sender, 0):  # recorded, and sent again
            return
        self._alive[sender] = alive.at
        now = time.monotonic_ns()
        waited = {rank: now - ms * 1_000_000 for rank, ms in alive.waited.items() if ms < _LONG_AGO_MS}
        self._hear_of({rank: waited.get(rank, 0) for rank, inc in alive.ranks.items() if self._matters(rank, inc)})

    def _hear_of(self, waited: Mapping[int, int]) -> None:
        for rank in self._ranks.values():
            rank.page.hear(waited)

    def _run_posted(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        while not self._posted.empty():
            self._posted.get()()

    # views

    def adopt(self, view: View, ours: bool = False) -> None:
        """Take over a newer view: into the pages first, then tell the ranks and, if it was made here, the others."""
        before = self.view
        if before is not None and view.epoch <= before.epoch:
            return
        self.view, self._encoded = view, encode_view(view)
        for rank in self._ranks.values():
            rank.page.write(view, self._encoded)
        if ours:
            addresses = set(view.watchers().values())
            if before is not None:
                addresses |= set(before.watchers().values())
            self._tell(addresses, view)
        for rank in list(self._ranks.values()):
            rank.send({"epoch": view.epoch})
        hosts = view.watchers().keys() | (before.watchers().keys() if before is not None else set())
        if hosts - {self.settings.host}:  # they may wait for this (`Member.settle`)
            name, said = applied_name(self.settings.host), str(view.epoch).encode()
            self.link.submit(lambda store: store.put(name, said), lambda _, error: None)
        if self.channel is not None:
            self._check_address(view, self.channel.address)

    def _check_address(self, view: View, address: str) -> None:
        host = self.settings.host
        if view.watchers().get(host, address) != address:
            self.link.submit(lambda store: change(store, lambda v: move_watcher(v, host, address)), self._changed)

    def _changed(self, view: View | None, error: Exception | None) -> None:
        if view is not None:
            self.adopt(view, ours=True)
        elif error is not None:
            _log.info("a change did not come through: %s", error)

    # deaths

    def _matters(self, rank: int, incarnation: int) -> bool:
        return matters(self.view, rank, incarnation)

    def died(self, ranks: Mapping[int, int], note: str) -> None:
        """Processes of this host are gone: the ranks of all hosts may know at once, and the view follows."""
        ranks = {rank: incarnation for rank, incarnation in ranks.items() if self._matters(rank, incarnation)}
        if not ranks or self.view is None:
            return
        _log.info("ranks %s: %s", sorted(ranks), note)
        self._mark(ranks, note, 0.0)
        self._sender = next(iter(ranks.items()))
        self._tell(set(self.view.watchers().values()), Died(dict(ranks), note))

    def _mark(self, ranks: Mapping[int, int], note: str, delay_s: float) -> None:
        self._deaths.add(ranks, note, delay_s)
        for rank, incarnation in ranks.items():
            for registered in self._ranks.values():
                registered.page.mark_dead(rank, incarnation)

    def _silent(self, hosts: tuple[str, ...]) -> None:
        """The store says that these hosts' leases have ended."""
        if self.view is not None:
            gone = {
                rank: slot.incarnation
                for rank, slot in enumerate(self.view.slots)
                if slot.endpoint and slot.endpoint.host in hosts and slot.endpoint.host != self.settings.host
            }
            known = {rank: incarnation for rank, incarnation in gone.items() if self._matters(rank, incarnation)}
            self._deaths.add(known, "its host's lease has ended", 0.0)

    # other hosts

    def open_channel(self, address: str) -> Channel:
        """Where this host takes messages; at the port that its ranks' endpoints already name, if it can be had."""
        if self.channel is None:
            host = self.settings.control_address
            known, _, port = address.rpartition(":")
            try:
                self.channel = Channel(host, int(port) if known.strip("[]") == host else 0, self._secret)
            except ConfigError:
                self.channel = Channel(host, 0, self._secret)
            self._selector.register(self.channel.socket, selectors.EVENT_READ, self._hear)
        return self.channel

    def _tell(self, addresses: set[str], content: View | Died | Alive) -> None:
        """In the name of a rank of this host; of the last one that died, if there is none left."""
        alive = ((rank.rank, rank.incarnation) for rank in self._ranks.values() if rank.rank >= 0)
        self._sender = next(alive, self._sender)
        if self._sender is not None and self.channel is not None:
            said = NewView(content) if isinstance(content, View) else content
            self.channel.tell(addresses, Message(self.settings.group, *self._sender, said))

    def _hear(self) -> None:
        assert self.channel is not None
        message = self.channel.heard()
        if isinstance(message, MessageError):
            _log.warning("ignored %s", message)
        elif message is not None and message.group == self.settings.group:
            if not self._matters(message.rank, message.incarnation):
                _log.info("ignored a message of rank %d, which is outside the view", message.rank)
            elif isinstance(message.content, Died):
                known = {r: i for r, i in message.content.ranks.items() if self._matters(r, i)}
                self._mark(known, message.content.note, SECOND_HAND_S)
            elif isinstance(message.content, Alive):
                self._take_alive((message.rank, message.incarnation), message.content)
            else:
                self.adopt(message.content.view)

    # ranks of this host

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            pid, uid = peer_credentials(connection)
            if uid != os.getuid() or len(self._ranks) >= MOST_RANKS:
                connection.close()
            else:
                self._selector.register(connection, selectors.EVENT_READ, lambda: self._greet(connection, pid))

    def _greet(self, connection: socket.socket, pid: int) -> None:
        self._selector.unregister(connection)
        try:
            rank = Registered(connection, pid)
            channel = self.open_channel(rank.address)
        except MoeA2AError as error:
            _log.warning("refused process %d: %s", pid, error)
            with contextlib.suppress(OSError):
                connection.send(encode_json({"error": str(error), "kind": type(error).__name__}))
            connection.close()
            return
        self._ranks[connection.fileno()] = rank
        self.link.keep |= rank.keep
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(rank))
        if rank.pidfd >= 0:
            self._selector.register(rank.pidfd, selectors.EVENT_READ, lambda: self._lose(rank))
        held = rank.page.read()[0] if rank.page.whole else None  # of a watcher before this one
        if self.view is not None:
            rank.page.write(self.view, self._encoded)
        rank.page.beat(self.link.away)
        rank.send({"welcome": channel.address})
        if held is not None:
            self.adopt(held)
        self._inherit(rank.page)
        self.share_processes()

    def share_processes(self) -> None:
        """Write down which processes this host's slots have, for a watcher that comes after this one."""
        for rank in self._ranks.values():
            if rank.rank >= 0 and rank.pid > 0:
                process = Process.of(rank.incarnation, rank.pid)
                for other in self._ranks.values():
                    other.page.set_process(rank.rank, process)

    def _inherit(self, page: Page) -> None:
        """Watch the processes that the watcher before this one watched, and that may never come here themselves."""
        here = {rank.incarnation for rank in self._ranks.values()} | self._inherited
        for rank, process in page.processes().items():
            if process.incarnation in here or not self._matters(rank, process.incarnation):
                continue
            self._inherited.add(process.incarnation)
            fd = process.open()
            if fd < 0:
                self.died({rank: process.incarnation}, _GONE)
            else:
                self._selector.register(fd, selectors.EVENT_READ, partial(self._lose_inherited, fd, rank, process))

    def _lose_inherited(self, fd: int, rank: int, process: Process) -> None:
        self._selector.unregister(fd)
        os.close(fd)
        self.died({rank: process.incarnation}, _GONE)

    def _serve(self, rank: Registered) -> None:
        request = rank.receive()
        if request is None:
            if rank.said_goodbye:
                self._forget(rank)
            elif rank.pidfd < 0:
                self._lose(rank)
            else:  # its process is ending; or it let go of the connection and lives, and will come again
                self._selector.unregister(rank.connection)
            return
        rank.handle(request, self)

    def _lose(self, rank: Registered) -> None:
        if rank not in self._ranks.values():  # it said goodbye a moment ago
            return
        self._forget(rank)
        self.died({rank.rank: rank.incarnation}, _GONE)

    def _forget(self, rank: Registered) -> None:
        for file in (rank.connection, rank.pidfd):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(file)
        self._ranks = {fd: other for fd, other in self._ranks.items() if other is not rank}
        rank.close()
