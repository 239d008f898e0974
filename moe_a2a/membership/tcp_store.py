"""A group's views in a torch.distributed TCPStore, which keeps them in memory and needs nothing installed.

Key "after/<epoch>" holds the view that came after that epoch. TCPStore sets a key that does not exist for one caller
only: that is the compare-and-set, and the keys are a log that nobody can rewrite. Keys of views long gone are
overwritten by a mark, and not deleted, so that a late proposal cannot begin a second log in the middle.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from moe_a2a.errors import ConfigError, MessageError, StoreAway
from moe_a2a.membership.store import MAX_VALUE_BYTES
from moe_a2a.membership.view import View
from moe_a2a.membership.wire import decode_view, encode_view
from moe_a2a.sockets import hang_up, sockets_to

#: Views that stay readable; a member that is further behind begins again at the head.
KEPT_VIEWS = 64
_GONE = b"-"
_CONNECT_S = 2.0
_ANSWER_S = 3.0
_TIMEVAL = struct.Struct("ll")
T = TypeVar("T")


class TcpStore:
    """A `Store`. host, port: of a TCPStore that `moe-a2a store` or `start_store` serves. Raises StoreAway."""

    def __init__(self, host: str, port: int, group: str) -> None:
        self.url = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
        self._prefix = f"moe_a2a/{group}/"
        self._head = self._prefix + "head"  # the epoch whose successor is a good place to begin reading
        # A wait keeps its connection busy, so that it has one of its own.
        self._calls, self._waits = _Connection(host, port), _Connection(host, port)
        self._newest = 0  # newest epoch seen in the life of the store that `_calls` talks to
        self._calls.call(lambda client: None)

    def get(self) -> View | None:
        return self._calls.call(lambda client: self._seen(self._read_newest(client, 0)))

    def compare_and_set(self, epoch: int, view: View) -> View:
        data = encode_view(view).decode()

        def exchange(client: dist.TCPStore) -> View:
            if self._calls.renewed or epoch != self._newest:
                # An empty store would take a view that follows one it never had.
                found = self._seen(self._read_newest(client, 0))
                if (found.epoch if found else 0) != epoch:
                    if found is None:
                        raise StoreAway(f"the store {self.url} has lost its data")
                    return found
            holds = client.compare_set(self._key(epoch), "", data)
            if holds == data.encode():
                self._advance_head(client, epoch)
                if epoch >= KEPT_VIEWS:
                    client.set(self._key(epoch - KEPT_VIEWS), _GONE.decode())
                self._newest = view.epoch
                return view
            found = decode_view(holds) if holds != _GONE else self._read_newest(client, 0)
            assert found is not None
            self._newest = found.epoch
            return found

        return self._calls.call(exchange)

    def watch(self, epoch: int, timeout_s: float) -> View | None:
        def wait(client: dist.TCPStore) -> View | None:
            if self._waits.renewed:
                newest = self._read_newest(client, 0)
                self._waits.renewed = False
                if newest is None and epoch:
                    raise StoreAway(f"the store {self.url} has lost its data")
                if newest is not None and newest.epoch > epoch:
                    return newest
            try:
                client.wait([self._key(epoch)], timedelta(seconds=timeout_s))
            except dist.DistNetworkError:
                raise
            except dist.DistStoreError:  # the time is up
                return None
            return self._read_newest(client, epoch)

        return self._waits.call(wait)

    def put(self, name: str, value: bytes) -> None:
        if len(value) > MAX_VALUE_BYTES:
            raise ConfigError(f"{name} has {len(value)} bytes; the store takes {MAX_VALUE_BYTES}")
        self._calls.call(lambda client: client.set(f"{self._prefix}value/{name}", value.hex()))

    def find(self, name: str) -> bytes | None:
        key = f"{self._prefix}value/{name}"
        data = self._calls.call(lambda client: client.get(key) if client.check([key]) else None)
        try:
            return None if data is None else bytes.fromhex(data.decode())
        except ValueError as error:
            raise MessageError(f"{name} in the store {self.url} was not put there by this version: {error}") from error

    def announce(self, host: str) -> None:
        """A TCPStore has no leases. It would not outlive its machine anyway."""

    def silent(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        self._calls.drop()
        self._waits.drop()

    def _key(self, epoch: int) -> str:
        return f"{self._prefix}after/{epoch}"

    def _seen(self, view: View | None) -> View | None:
        self._newest = view.epoch if view is not None else 0
        self._calls.renewed = False
        return view

    def _read_newest(self, client: dist.TCPStore, epoch: int) -> View | None:
        """Follow the log from `epoch` to its end; from the head if `epoch` is 0. None if nothing comes after it."""
        view: View | None = None
        while True:
            if epoch == 0 and client.check([self._head]):
                epoch = _number(client.get(self._head))
            key = self._key(epoch)
            if not client.check([key]):
                return view
            data = client.get(key)
            if data == _GONE:  # far behind
                epoch, view = 0, None
                continue
            view = decode_view(data)
            epoch = view.epoch

    def _advance_head(self, client: dist.TCPStore, epoch: int) -> None:
        """Let readers begin at the view that came after `epoch`, unless they begin later already."""
        holds = client.compare_set(self._head, "", str(epoch))
        while _number(holds) < epoch:
            holds = client.compare_set(self._head, holds.decode(), str(epoch))


class _Connection:
    """A client of the store that is made when needed, and again after a failure. renewed: it was made since the last
    look at the newest view."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._lock = threading.Lock()
        self._client: dist.TCPStore | None = None
        self.renewed = False

    def call(self, work: Callable[[dist.TCPStore], T]) -> T:
        """Raises StoreAway if there is no connection to be had, or if it ends meanwhile."""
        with self._lock:
            if self._client is not None:
                # A connection that ended while nobody used it says nothing about the store: begin again, once. What was
                # under way is looked for before it is done again (`renewed`).
                try:
                    return work(self._client)
                except (dist.DistError, OSError) as error:
                    if isinstance(error, StoreAway):
                        self._client = None
                        raise
                    self._client = None
            try:
                self._client = self._connect()
                self.renewed = True
                return work(self._client)
            except (dist.DistError, OSError) as error:
                self._client = None
                if isinstance(error, StoreAway):
                    raise
                reason = str(error).splitlines()[0][:200]
                raise StoreAway(f"the store tcp://{self._host}:{self._port} does not answer: {reason}") from error

    def _connect(self) -> dist.TCPStore:
        # torch tries again and again, for longer than its time limit: ask first.
        socket.create_connection((self._host, self._port), timeout=_CONNECT_S).close()
        # torch reads an answer without a time limit: a store that hangs would hang its users for ever.
        before = sockets_to(self._port)
        patience = threading.Timer(_CONNECT_S, lambda: hang_up(sockets_to(self._port) - before))
        patience.start()
        try:
            timeout = timedelta(seconds=_CONNECT_S)
            client = dist.TCPStore(self._host, self._port, is_master=False, timeout=timeout, wait_for_workers=False)
        finally:
            patience.cancel()
        for fd in sockets_to(self._port) - before:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(_ANSWER_S), 0))
        return client

    def drop(self) -> None:
        with self._lock:
            self._client = None


def _number(data: bytes) -> int:
    if not data.isdigit():
        raise MessageError(f"the store holds {data[:40]!r} where the number of an epoch belongs")
    return int(data)
