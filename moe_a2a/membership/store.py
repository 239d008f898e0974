"""Where a group agrees: a store that keeps the newest view, and changes it by compare-and-set on the epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

from moe_a2a.errors import ConfigError, MessageError, StoreAway
from moe_a2a.membership.view import View, reborn
from moe_a2a.membership.wire import decode_view, encode_view

#: The largest value of `put`.
MAX_VALUE_BYTES = 1 << 20
_RECALL_NAP_S = 0.02


class Store(Protocol):
    """One group's part of a store. All calls raise StoreAway if the store does not answer, and MessageError if what it
    holds is not this version's. A store may be used by several threads; `watch` then keeps none of the others waiting.
    """

    url: str

    def get(self) -> View | None:
        """The newest view; None before the first, or after the store has lost its data."""
        ...

    def compare_and_set(self, epoch: int, view: View) -> View:
        """Make `view` the newest if the newest has this epoch (0: if there is none).

        Returns `view`, or else a view that came after `epoch` first. After StoreAway the outcome is unknown: look
        again with `get`.
        """
        ...

    def watch(self, epoch: int, timeout_s: float) -> View | None:
        """Wait for a view that is newer than `epoch`. Returns the newest there is, or None when the time is up."""
        ...

    def put(self, name: str, value: bytes) -> None:
        """Publish up to 1 MiB under a name."""
        ...

    def find(self, name: str) -> bytes | None:
        """What was published under a name, if anything."""
        ...

    def announce(self, host: str) -> None:
        """Say that this host lives, to begin with and then at least every `beat_s` seconds."""
        ...

    def silent(self) -> tuple[str, ...]:
        """Hosts that announced themselves once and have not for longer than the store's lease. Not all stores know."""
        ...

    def close(self) -> None: ...


#: Seconds between two announcements.
BEAT_S = 2.0


def open_store(url: str, group: str) -> Store:
    """A client of the store of a group.

    url: "tcp://host:port" (`start_store`, `moe-a2a store`), "etcd://host:port" or "etcds://host:port" (TLS). User,
    password and certificates of etcd come from the environment (docs/membership.md), so that no command line shows
    them. Raises ConfigError, StoreAway.
    """
    check_group(group)
    scheme, host, port = split_url(url)
    if scheme == "tcp":
        from moe_a2a.membership.tcp_store import TcpStore

        return TcpStore(host, port, group)
    from moe_a2a.membership.etcd_store import EtcdStore

    return EtcdStore(host, port, group, tls=scheme == "etcds")


def split_url(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of a store's address. Raises ConfigError."""
    allowed = "give tcp://HOST:PORT, etcd://HOST:PORT or etcds://HOST:PORT"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"store={url!r}: {error}; {allowed}") from error
    if parts.scheme not in ("tcp", "etcd", "etcds") or not host or not port or parts.path or parts.username:
        raise ConfigError(f"store={url!r}; {allowed} (etcd's user and password come from the environment)")
    return parts.scheme, host, port


def check_group(group: str) -> None:
    if not 1 <= len(group) <= 100 or not all(c.isalnum() or c in "-_." for c in group):
        raise ConfigError(f"group={group!r}; give 1 to 100 letters, digits, '-', '_' or '.'")


def applied_name(host: str) -> str:
    """Where the watcher of a host says which epoch its ranks' pages have."""
    return f"applied/{host}"


def change(store: Store, transition: Callable[[View], View], known: View | None = None) -> View:
    """Bring a change into the group's view, however many others do so at the same time. Returns the view that has it.

    transition: a pure function of view.py; it is applied again to whatever others agreed on meanwhile, and what it
    raises is raised here. known: a view to begin with, which saves a look; only for changes that an old view cannot
    make look done or refused.
    """
    view = known if known is not None else store.get()
    if view is None:
        raise StoreAway(f"the store {store.url} holds no view of this group")
    while True:
        wanted = transition(view)
        if wanted is view:
            return view
        found = store.compare_and_set(view.epoch, wanted)
        if found == wanted:
            return wanted
        view = found


def recall(store: Store, known: View, host: str, patience_s: float) -> View:
    """Give a store that lost its data a view again: the newest that any watcher of the group knows. Returns it.

    Every watcher says what it knows; once all hosts of the view have, or `patience_s` is over, the newest becomes the
    first of a new life. Watchers that do so together agree, because only one can be first.
    """
    store.put(f"recall/{host}", encode_view(known))
    deadline = time.monotonic() + patience_s
    best, missing = known, set(known.watchers()) - {host}
    while missing and time.monotonic() < deadline:
        found = store.get()
        if found is not None:
            return found
        for other in list(missing):
            said = store.find(f"recall/{other}")
            if said is not None:
                missing.discard(other)
                try:
                    view = decode_view(said)
                except MessageError:
                    continue
                if view.epoch > best.epoch:
                    best = view
                    missing |= set(view.watchers()) - set(known.watchers()) - {host}
        time.sleep(_RECALL_NAP_S)
    return store.compare_and_set(0, reborn(best))
