"""The process of a host's watchers: one for all groups that this host's ranks have in one store.

It has a session of its own and is nobody's child. A group that comes later asks at its door, an abstract Unix socket
whose name follows from user, store, host label and what the environment says of membership; it then gets a watcher in
a thread: processes of their own, for each of the dozen groups of an engine, take a second and 200 MB each. It ends
with its last watcher.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict

from moe_a2a.errors import MessageError, MoeA2AError
from moe_a2a.membership.daemon import detach, log_file, settle, shared_secret
from moe_a2a.membership.settings import Settings, peer_credentials
from moe_a2a.membership.watcher import MOST_RANKS, Watcher
from moe_a2a.membership.wire import decode_json, encode_json

_log = logging.getLogger(__name__)

_REQUEST_BYTES = 65536
_ANSWER_S = 5.0
_START_S = 30.0
_NAP_S = 0.01
_STARTED, _RUNNING = b"started", b"running"


def start_watcher(settings: Settings) -> None:
    """Start a host's watcher of a group, unless it runs. Raises MoeA2AError if it cannot be started."""
    deadline = time.monotonic() + _START_S
    while not _ask_at_door(settings):
        with _first(settings) as first:
            if first:
                if not _ask_at_door(settings):  # somebody was faster, before this one was first
                    _start_process(settings)
                return
        if time.monotonic() > deadline:
            raise MoeA2AError(
                f"the watcher of host {settings.host} does not start; another process has begun to start it"
            )
        time.sleep(_NAP_S)


def _start_process(settings: Settings) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_a2a.membership.watcher_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    process.communicate(json.dumps(asdict(settings)).encode())
    if process.returncode != 0:
        raise MoeA2AError(f"the watcher of host {settings.host} did not start (its error is above)")


def _ask_at_door(settings: Settings) -> bool:
    """Whether a process has been there to take the group. Raises MoeA2AError if it would not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.settimeout(_ANSWER_S)
        try:
            door.connect(_door_name(settings))
            _, uid = peer_credentials(door)
            if uid != os.getuid():
                raise MoeA2AError(
                    f"the watcher of host {settings.host} belongs to user {uid}; this process to {os.getuid()}"
                )
            door.send(encode_json(asdict(settings)))
            answer = door.recv(_REQUEST_BYTES)
        except OSError:  # nobody there, or it is about to end, or it hangs: then its door is not taken for one
            return False
    if answer and answer not in (_STARTED, _RUNNING):
        raise MoeA2AError(f"the watcher of host {settings.host} did not start: {answer.decode(errors='replace')}")
    return bool(answer)


@contextlib.contextmanager
def _first(settings: Settings) -> Iterator[bool]:
    """Whether this is the only process that starts one at the moment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mark:
        try:
            mark.bind(_door_name(settings) + "-starts")
        except OSError:
            yield False
        else:
            yield True


def _door_name(settings: Settings) -> str:
    """Processes that would start a watcher with other secrets, or other logs, start a process of their own."""
    environment = sorted((key, value) for key, value in os.environ.items() if key.startswith("MOE_A2A_"))
    said = json.dumps([os.getuid(), settings.store, settings.host, settings.control_address, environment])
    return "\0moe_a2a-watchers-" + hashlib.sha256(said.encode()).hexdigest()[:24]


class House:
    """The watchers of this process."""

    def __init__(self, door: socket.socket | None, secret: bytes) -> None:
        """door: None if another process has it; then no group comes later."""
        self._door, self._secret = door, secret
        self._changed = threading.Condition()
        self._live = 0
        self._ending = False

    def open(self, settings: Settings) -> bytes:
        """Start a group's watcher. Returns _STARTED, _RUNNING if there is one, or nothing if this process ends."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(settings.socket_name)
        except OSError:
            listener.close()
            return _RUNNING
        listener.listen(MOST_RANKS)  # from here on, ranks know this process by its connection
        listener.setblocking(False)
        with self._changed:
            if self._ending:
                listener.close()
                return b""
            self._live += 1
        threading.Thread(target=self._watch, args=(settings, listener), daemon=True).start()
        return _STARTED

    def receive(self) -> None:
        """Take in groups that come later, in a thread."""
        if self._door is not None:
            threading.Thread(target=self._receive, args=(self._door,), daemon=True).start()

    def wait(self) -> None:
        """Until the last watcher has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._live == 0)
            self._ending = True

    def _watch(self, settings: Settings, listener: socket.socket) -> None:
        _log.info("watching host %s, group %s, store %s", settings.host, settings.group, settings.store)
        try:
            watcher = Watcher(settings, listener, self._secret)
            watcher.run()
            watcher.close()
        except BaseException:
            _log.exception("the watcher of group %s broke", settings.group)
            os._exit(1)  # its ranks start another one; hanging on to them would keep them from that
        with self._changed:
            self._live -= 1
            self._changed.notify()

    def _receive(self, door: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError):
                connection, _ = door.accept()
                with connection:
                    connection.settimeout(_ANSWER_S)
                    if peer_credentials(connection)[1] == os.getuid():
                        connection.send(self._answer(connection.recv(_REQUEST_BYTES)))

    def _answer(self, request: bytes) -> bytes:
        try:
            settings = Settings(**decode_json(request, _REQUEST_BYTES, "settings"))
            return self.open(settings)
        except (MessageError, TypeError) as error:
            return f"{type(error).__name__}: {error}".encode()[:2000]


def main() -> None:
    """Reads the settings of the first group as JSON from standard input."""
    settings = Settings(**decode_json(sys.stdin.buffer.read(), _REQUEST_BYTES, "settings"))
    secret = shared_secret()
    log = log_file(f"watcher-{settings.group}-{hashlib.sha256(settings.host.encode()).hexdigest()[:8]}")
    say = detach()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    door: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    assert door is not None
    try:
        door.bind(_door_name(settings))
        door.listen(MOST_RANKS)
    except OSError:
        door = None
    house = House(door, secret)
    if house.open(settings) == _RUNNING:  # of another process
        os.write(say, _RUNNING + b"\n")
        return
    settle(say, "started\n", log)
    house.receive()
    house.wait()
    os._exit(0)  # threads may be waiting for the store, and have nothing to finish


if __name__ == "__main__":
    main()
