"""A rank as its host's watcher knows it: a connection, a process, a page, and what it asks for."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moe_a2a.errors import ExcludedFromView, JoinRefused, MessageError, MoeA2AError
from moe_a2a.membership.page import Page
from moe_a2a.membership.store import Store, change
from moe_a2a.membership.view import Endpoint, State, View, join, leave, mark_failed, reserve, strike
from moe_a2a.membership.wire import (
    MAX_REQUEST_BYTES,
    decode_json,
    decode_view,
    encode_json,
    incarnations,
    number,
    text,
)

if TYPE_CHECKING:
    from moe_a2a.membership.watcher import Watcher

#: Of the messages between a rank and its watcher.
PROTOCOL = 1
_VALUE_CHARACTERS = 120_000


class Registered:
    """rank: -1 until it has a slot. pidfd: -1 if its process cannot be watched from here (another pid namespace): then
    the end of the connection tells. address: where the view says that its host takes messages, "" if it says nothing.
    keep: its watcher starts the store again if it dies.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        """Reads the greeting, which must be there. Raises MessageError, MoeA2AError."""
        self.connection, self.pid, self.said_goodbye = connection, pid, False
        connection.settimeout(2.0)
        try:
            data, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 1)
        except OSError as error:
            raise MessageError(f"no greeting: {error}") from error
        try:
            hello = decode_json(data, MAX_REQUEST_BYTES, "a greeting")
            if hello.get("hello") != PROTOCOL:
                raise MessageError(
                    f"this host's watcher speaks version {PROTOCOL}, this rank version {str(hello.get('hello'))[:10]}; "
                    "run one version of moe-a2a on a host"
                )
            self.rank = number(hello, "rank", -1, 1023)
            self.incarnation = number(hello, "incarnation", 1)
            self.address = text(hello, "address")
            self.keep = hello.get("keep") is True
            if not fds:
                raise MessageError("a greeting without a page")
            self.page = Page(fds[0])
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self.pidfd = -1
        if pid > 0:
            with contextlib.suppress(OSError):  # dead already: the end of the connection tells
                self.pidfd = os.pidfd_open(pid)
        connection.setblocking(False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Without waiting: a rank that does not read its messages still has its page."""
        with contextlib.suppress(OSError):
            self.connection.send(encode_json(message))

    def receive(self) -> bytes | None:
        """The next message; None at the end."""
        try:
            return self.connection.recv(MAX_REQUEST_BYTES) or None
        except BlockingIOError:
            return b"{}"
        except OSError:
            return None

    def close(self) -> None:
        self.connection.close()
        self.page.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def handle(self, data: bytes, watcher: Watcher) -> None:
        """Carry out a request and answer it, now or when the store has."""
        try:
            request = decode_json(data, MAX_REQUEST_BYTES, "a request")
            if not request:
                return
            number_ = number(request, "id")
        except MessageError as error:
            self.send({"id": 0, "error": str(error), "kind": "MessageError"})
            return
        try:
            self._handle(request, number_, watcher)
        except MoeA2AError as error:
            self._fail(number_, error)

    def _handle(self, request: Mapping[str, Any], number_: int, watcher: Watcher) -> None:
        what = text(request, "ask")

        def submit(work: Callable[[Store], View | None], extra: Callable[[View], dict[str, Any]] | None = None) -> None:
            def done(view: View | None, error: Exception | None) -> None:
                if error is not None:
                    self._fail(number_, error)
                    return
                if view is not None:
                    more = extra(view) if extra is not None else {}
                    watcher.adopt(view, ours=True)
                    self.send({"id": number_, "epoch": view.epoch, **more})
                else:
                    self.send({"id": number_, "epoch": 0})

            watcher.link.submit(work, done)

        if what == "found":
            first = decode_view(text(request, "view", MAX_REQUEST_BYTES).encode())
            submit(lambda store: store.compare_and_set(0, first))
        elif what == "look":
            submit(lambda store: store.get())
        elif what == "reserve":
            self._reserve(request, submit, watcher)
        elif what in ("failed", "join", "leave", "strike"):
            transition = self._transition(what, request)
            submit(lambda store: change(store, transition))
        elif what == "put":
            name, value = text(request, "name"), _bytes(request)
            submit(lambda store: watcher.link.publish(store, name, value))
        elif what == "find":
            self._find(text(request, "name"), number_, watcher)
        elif what == "keep":
            watcher.link.keep = True
            self.send({"id": number_, "epoch": 0})
        elif what == "goodbye":
            self.said_goodbye = True
            self.send({"id": number_, "epoch": 0})
        else:
            raise MessageError(f"a request for {what[:40]!r}, which this version does not know")

    def _reserve(self, request: Mapping[str, Any], submit: Callable[..., None], watcher: Watcher) -> None:
        wanted, incarnation = number(request, "rank", -1, 1023), number(request, "incarnation", 1)
        assert watcher.channel is not None
        endpoint = Endpoint(watcher.channel.address, incarnation, watcher.settings.host)

        def take(view: View) -> View:
            held = [r for r, slot in enumerate(view.slots) if slot.incarnation == incarnation]
            if held and wanted < 0:
                return reserve(view, held[0], endpoint)
            return reserve(view, wanted if wanted >= 0 else view.open_slot(), endpoint)

        def keep(view: View) -> dict[str, Any]:
            rank = next(r for r, slot in enumerate(view.slots) if slot.incarnation == incarnation)
            self.rank, self.incarnation = rank, incarnation
            watcher.share_processes()
            return {"rank": rank}

        submit(lambda store: change(store, take), keep)

    def _transition(self, what: str, request: Mapping[str, Any]) -> Callable[[View], View]:
        ranks, me = incarnations(request), (self.rank, self.incarnation)
        steps = request.get("steps")
        if steps is not None and not isinstance(steps, list):
            raise MessageError("a request whose steps are no list")
        note = text(request, "note") if what == "failed" else ""

        def propose(view: View) -> View:
            own = {rank: incarnation for rank, incarnation in ranks.items() if (rank, incarnation) == me}
            # A rank that takes no part may leave, and may be the first to come back to a group that nobody is left in.
            alone = what == "leave" or (what == "join" and not view.ranks)
            if not view.holds(*me) and not (alone and len(own) == len(ranks)):
                raise ExcludedFromView(why_outside(view, *me))
            if what == "failed":
                return mark_failed(view, ranks, note)
            if what == "strike":
                return strike(view, ranks)
            if what == "join":
                if steps is None:
                    raise JoinRefused("joining needs the first step of each channel")
                return join(view, ranks, steps)
            return leave(view, ranks, steps)

        return propose

    def _find(self, name: str, number_: int, watcher: Watcher) -> None:
        def done(value: bytes | None, error: Exception | None) -> None:
            if error is not None:
                self._fail(number_, error)
            else:
                self.send({"id": number_, "epoch": 0, "value": None if value is None else value.hex()})

        watcher.link.submit(lambda store: store.find(name), done)

    def _fail(self, number_: int, error: Exception) -> None:
        self.send({"id": number_, "error": str(error)[:2000], "kind": type(error).__name__})


def why_outside(view: View, rank: int, incarnation: int) -> str:
    """What to tell a process that does not take part."""
    slot = view.slots[rank] if 0 <= rank < view.max_ranks else None
    if slot is None or slot.incarnation != incarnation:
        return f"rank {rank} is another process now (epoch {view.epoch}); rejoin() takes another slot"
    if slot.state is State.READY:
        return f"rank {rank} waits to be activated (epoch {view.epoch})"
    why = f": {slot.note}" if slot.note else ""
    return f"rank {rank} is {slot.state.value} in the group's view (epoch {view.epoch}){why}; rejoin() comes back"


def _bytes(request: Mapping[str, Any]) -> bytes:
    try:
        return bytes.fromhex(text(request, "value", _VALUE_CHARACTERS))
    except ValueError as error:
        raise MessageError(f"a value that is not hexadecimal: {error}") from error
