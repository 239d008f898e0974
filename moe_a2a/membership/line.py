"""A rank's line to its host's watcher, which is started if there is none, and again if it dies or hangs."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_a2a.errors import ConfigError, ExcludedFromView, JoinRefused, MessageError, MoeA2AError, StoreAway
from moe_a2a.membership.page import Page
from moe_a2a.membership.settings import Settings, peer_credentials
from moe_a2a.membership.watcher_process import start_watcher
from moe_a2a.membership.wire import MAX_REQUEST_BYTES, decode_json, encode_json, number, text

_ERRORS: dict[str, type[MoeA2AError]] = {
    error.__name__: error for error in (ConfigError, ExcludedFromView, JoinRefused, MessageError, StoreAway)
}
#: A watcher that gives no sign of life for so long hangs: it is ended, and another one started.
HANGS_S = 5.0
_LOOK_S = 1.0
_START_S = 30.0


class Line:
    """hello: what to greet a watcher with. page: what it writes into. again: requests for a watcher that takes over;
    its answers go nowhere. heard: called after every message, in a thread of this object.

    news: tells those who wait that there was a message. watcher_pid, watcher_address: of the watcher at the moment; the
    address is where it takes messages of other hosts.
    """

    def __init__(
        self,
        settings: Settings,
        page: Page,
        hello: Callable[[], Mapping[str, Any]],
        again: Callable[[], Iterable[Mapping[str, Any]]],
        heard: Callable[[], None],
    ) -> None:
        """Raises MoeA2AError if there is no way to a watcher."""
        self._settings, self._page = settings, page
        self._hello, self._again, self._heard = hello, again, heard
        self.news = threading.Condition()
        self.watcher_pid, self.watcher_address = 0, ""
        self._ids = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._connection: socket.socket | None = None
        self._closed = False
        self._connect()
        self._thread = threading.Thread(target=self._listen, name="moe_a2a-member", daemon=True)
        self._thread.start()

    def ask(self, what: str, timeout_s: float, **content: Any) -> dict[str, Any]:
        """Ask the watcher, and ask again if it dies meanwhile: all requests may be made twice."""
        deadline = time.monotonic() + timeout_s
        asked_of: socket.socket | None = None
        key = next(self._ids)
        request = encode_json({"id": key, "ask": what, **content})
        if len(request) > MAX_REQUEST_BYTES:
            raise ConfigError(f"{what} takes {len(request)} bytes; allowed are {MAX_REQUEST_BYTES}")
        if self._closed:
            raise MoeA2AError("this member is closed; make a new one")
        with self.news:
            while key not in self._answers:
                if self._connection is not None and self._connection is not asked_of:
                    asked_of = self._connection
                    with contextlib.suppress(OSError):  # then it has died, and the thread will see
                        asked_of.send(request)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise StoreAway(f"{what}: the store {self._settings.store} did not answer within {timeout_s:g} s")
                self.news.wait(min(left, 0.1))
            answer = self._answers.pop(key)
        if "error" in answer:
            raise _ERRORS.get(str(answer.get("kind")), MoeA2AError)(str(answer["error"]))
        return answer

    def close(self, timeout_s: float) -> None:
        with self.news:
            self._closed = True
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=timeout_s)

    def _connect(self) -> None:
        """Find this host's watcher, or start it. Raises MoeA2AError."""
        name = f"the watcher of host {self._settings.host}"
        deadline = time.monotonic() + _START_S
        started = False
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(self._settings.socket_name)
                break
            except OSError as error:
                connection.close()
                if time.monotonic() > deadline:
                    raise MoeA2AError(f"{name} cannot be reached: {error}") from error
                if not started:
                    start_watcher(self._settings)
                    started = True
                else:
                    time.sleep(0.01)
        pid, uid = peer_credentials(connection)
        if uid != os.getuid():
            connection.close()
            raise MoeA2AError(f"{name} belongs to user {uid}; this process to {os.getuid()}")
        try:
            connection.settimeout(_START_S)
            socket.send_fds(connection, [encode_json(self._hello())], [self._page.fd])
            answer = decode_json(connection.recv(MAX_REQUEST_BYTES), MAX_REQUEST_BYTES, "the watcher's welcome")
            if "error" in answer:
                raise _ERRORS.get(str(answer.get("kind")), MoeA2AError)(str(answer["error"]))
            self.watcher_address = text(answer, "welcome")
        except (OSError, MessageError) as error:
            connection.close()
            raise MoeA2AError(f"{name} does not answer: {error}") from error
        connection.settimeout(_LOOK_S)
        with self.news:
            self._connection, self.watcher_pid = connection, pid
            self.news.notify_all()

    def _listen(self) -> None:
        while not self._closed:
            connection = self._connection
            assert connection is not None
            try:
                data = connection.recv(MAX_REQUEST_BYTES)
            except TimeoutError:
                if self._page.beat_age_s > HANGS_S:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.watcher_pid, signal.SIGKILL)
                continue
            except OSError:
                data = b""
            if not data:
                connection.close()
                if not self._closed:
                    self._reconnect()
                continue
            with contextlib.suppress(MessageError):
                self._take(decode_json(data, MAX_REQUEST_BYTES, "a message of the watcher"))

    def _reconnect(self) -> None:
        """The watcher died. Another one takes this rank over; until then nobody sees ranks of this host die."""
        with self.news:
            self._connection = None
        while not self._closed:
            try:
                self._connect()
                assert self._connection is not None
                for request in self._again():
                    with contextlib.suppress(OSError):
                        self._connection.send(encode_json({"id": 0, **request}))
                return
            except MoeA2AError:
                time.sleep(0.5)

    def _take(self, message: dict[str, Any]) -> None:
        with self.news:
            if message.get("id"):
                self._answers[number(message, "id")] = message
            self.news.notify_all()
        self._heard()
