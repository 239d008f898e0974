"""A watcher's way to the store: threads that may wait for it, so that the watcher itself never does."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_a2a.errors import MoeA2AError, StoreAway
from moe_a2a.membership.store import BEAT_S, Store, open_store, recall, split_url
from moe_a2a.membership.store_process import start_store
from moe_a2a.membership.view import View

_log = logging.getLogger(__name__)

_WATCH_S = 2.0
_RECALL_S = 2.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
#: A store that has said nothing for so long is away, whatever its connections say.
_SILENCE_S = 6.0


class StoreLink:
    """Follows the store and carries out changes. What happens is told by `post`, which runs a function in the watcher's
    loop.

    known: gives the newest view that the watcher has. on_view: a view came; on_silent: hosts whose lease ended;
    on_away: `away` has changed.
    keep: start the store again where it was if it dies (only the watcher of the store's own machine can).
    """

    def __init__(
        self,
        url: str,
        group: str,
        host: str,
        post: Callable[[Callable[[], None]], None],
        known: Callable[[], View | None],
        on_view: Callable[[View], None],
        on_silent: Callable[[tuple[str, ...]], None],
        on_away: Callable[[], None],
    ) -> None:
        self._url, self._group, self._host = url, group, host
        self.keep = False
        self._closing = False
        self._post, self._known = post, known
        self._on_view, self._on_silent, self._on_away = on_view, on_silent, on_away
        self._work: queue.SimpleQueue[Callable[[Store], None]] = queue.SimpleQueue()
        self._published: dict[str, bytes] = {}  # by ranks of this host
        self._connected = False
        self._heard = time.monotonic()
        self._announced = 0.0
        self._store: Store | None = None
        self._opening = threading.Lock()
        runs = (("follow", self._follow), ("change", self._change))
        self._threads = [threading.Thread(target=run, name=f"moe_a2a-{name}", daemon=True) for name, run in runs]
        for thread in self._threads:
            thread.start()

    @property
    def away(self) -> bool:
        """Whether the view is frozen because the store does not answer."""
        return not self._connected or time.monotonic() - self._heard > _SILENCE_S

    def submit(self, work: Callable[[Store], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """Run `work(store)` on a thread, then `done(result, None)` or `done(None, error)` in the watcher's loop."""

        def run(store: Store) -> None:
            try:
                result = work(store)
            except Exception as error:
                failure = error  # `error` ends with this block
                self._post(lambda: done(None, failure))
            else:
                self._post(lambda: done(result, None))

        self._work.put(run)

    def publish(self, store: Store, name: str, value: bytes) -> None:
        """Put a value, and put it again if the store loses it."""
        self._published[name] = value
        store.put(name, value)

    def close(self) -> bool:
        """Let go of the store. Returns whether its threads have ended; they may hang on a store that does."""
        self._closing = True
        self._work.put(lambda store: None)
        for thread in self._threads:
            thread.join(2 * _SILENCE_S)
        return not any(thread.is_alive() for thread in self._threads)

    def _client(self) -> Store:
        with self._opening:
            if self._store is None:
                self._store = open_store(self._url, self._group)
            return self._store

    def _change(self) -> None:
        while not self._closing:
            run = self._work.get()
            try:
                store = self._client()
            except Exception as error:
                run(_Unreachable(error))
            else:
                run(store)

    def _follow(self) -> None:
        pause = _SHORTEST_PAUSE_S
        while not self._closing:
            try:
                self._look()
                pause = _SHORTEST_PAUSE_S
            except StoreAway as error:
                if self._connected:
                    _log.warning("the view is frozen: %s", error)
                self._say(False)
                if self.keep and "refused" in str(error):
                    self._revive()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            except Exception:  # what the store holds or says may be anything; without this thread nothing comes in
                _log.exception("the store cannot be used")
                self._say(False)
                time.sleep(_LONGEST_PAUSE_S)
        if self._store is not None:
            self._store.close()

    def _look(self) -> None:
        store = self._client()
        known = self._known()
        if not self._connected:
            for name, value in list(self._published.items()):  # before the view: who sees that may look for these
                if store.find(name) is None:
                    store.put(name, value)
            newest = store.get()
            if newest is None and known is not None:
                newest = recall(store, known, self._host, _RECALL_S)
                _log.warning("the store had lost its data; it now has epoch %d", newest.epoch)
            self._tell(newest)
            self._heard = time.monotonic()
            self._say(True)
        self._heard = time.monotonic()
        known = self._known()
        self._tell(store.watch(known.epoch if known else 0, _WATCH_S))
        self._heard = time.monotonic()
        if self._heard - self._announced > BEAT_S:
            store.announce(self._host)
            self._announced = self._heard
            silent = store.silent()
            if silent:
                self._post(lambda: self._on_silent(silent))

    def _say(self, connected: bool) -> None:
        if self._connected != connected:
            self._connected = connected
            self._post(self._on_away)

    def _tell(self, view: View | None) -> None:
        known = self._known()
        if view is None or (known is not None and view.epoch <= known.epoch):
            return
        seen = threading.Event()

        def take() -> None:
            self._on_view(view)
            seen.set()

        if self._closing:
            return
        self._post(take)
        seen.wait(_WATCH_S)  # so that the next look begins at this view

    def _revive(self) -> None:
        _, host, port = split_url(self._url)
        try:
            start_store(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            _log.warning("the store had died, and was started again")
        except MoeA2AError as error:  # somebody else was first, or it cannot be had: the next look shows
            _log.info("the store was not started here: %s", error)


class _Unreachable:
    """Stands for a store that could not be opened: whatever is asked of it raises why."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error
