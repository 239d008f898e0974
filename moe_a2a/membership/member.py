"""One rank's membership: the view it goes by, what it proposes, and how it comes and goes."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from moe_a2a.errors import (
    ConfigError,
    ExcludedFromView,
    MoeA2AError,
    StoreAway,
)
from moe_a2a.hosts import own_label
from moe_a2a.membership.line import Line
from moe_a2a.membership.page import Page
from moe_a2a.membership.registered import PROTOCOL, why_outside
from moe_a2a.membership.settings import Settings
from moe_a2a.membership.store import applied_name, check_group, split_url
from moe_a2a.membership.view import Endpoint, State, View
from moe_a2a.membership.wire import encode_view, number

_GOODBYE_S = 2.0
_SETTLE_NAP_S = 0.002


@dataclass(frozen=True)
class MemberOptions:
    """store: address of the group's store; "" lets `found_group` start one.
    group: its name there. host: label of this rank's host (None: found out, as
    Options.host). control_address: address of this machine where its watcher takes messages of other hosts' watchers,
    as the others reach it; loopback suits one machine only. keep_store: this host's watcher starts the store again if
    it dies (the store's own machine only). timeout_s: seconds that a call may wait for watcher and store.

    Raises ConfigError.
    """

    store: str = ""
    group: str = "default"
    host: str | None = None
    control_address: str = "127.0.0.1"
    keep_store: bool = False
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.store:
            split_url(self.store)
        check_group(self.group)
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s={self.timeout_s!r}; give seconds above 0")

    def settings(self) -> Settings:
        return Settings(self.store, self.group, own_label(self.host), self.control_address)


class Member:
    """A process's place in a group. Made by `found_group` or `join_group`; this makes one that has no slot yet.

    on_change: called with every new view, in a thread of this object; the page's words change before that. rank: the
    slot that it will have; -1 if that is yet to be seen.
    """

    def __init__(self, options: MemberOptions, on_change: Callable[[View], None] | None = None, rank: int = -1) -> None:
        if not options.store:
            raise ConfigError("store is empty; give the address of the group's store")
        settings = options.settings()
        self.options, self.host = options, settings.host
        self.rank, self.incarnation = rank, _new_incarnation()
        self.page = Page()
        self._on_change = on_change
        self._view: View | None = None
        self._sequence = 0
        self._reported = 0
        self._published: dict[str, bytes] = {}
        self._keep = options.keep_store
        self._closed = False
        self._line = Line(settings, self.page, self._hello, self._put_again, self._report)

    # what is the case

    @property
    def view(self) -> View:
        """The newest view. Raises StoreAway if there has been none."""
        sequence = self.page.sequence
        if sequence != self._sequence or sequence % 2:
            self._view, self._sequence = self.page.read()
        if self._view is None:
            raise StoreAway(f"there is no view of group {self.options.group!r} yet")
        return self._view

    @property
    def frozen(self) -> bool:
        """Whether the view cannot change at the moment because the store is away."""
        return self.page.store_away

    @property
    def closed(self) -> bool:
        return self._closed

    def check(self) -> None:
        """Raise ExcludedFromView if this process takes no part, by the newest view. Costs a look at one word."""
        if self.rank < 0 or not self.page.takes_part(self.rank, self.incarnation):
            raise ExcludedFromView(why_outside(self.view, self.rank, self.incarnation))

    def wait(self, until: Callable[[View], bool], timeout_s: float | None = None) -> View:
        """Wait for a view that is as wanted. Raises StoreAway if the view is frozen when the time is up, else
        MoeA2AError."""
        limit = self.options.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        with self._line.news:
            while True:
                if self.page.epoch and until(self.view):
                    return self.view
                left = deadline - time.monotonic()
                if left <= 0:
                    kind = StoreAway if self.frozen else MoeA2AError
                    raise kind(f"no view came that was waited for within {limit:g} s (epoch {self.page.epoch})")
                self._line.news.wait(min(left, 0.1))

    def wait_active(self, timeout_s: float | None = None) -> View:
        """Wait until a member has activated this one. Raises ExcludedFromView if it was found failed meanwhile."""

        def settled(view: View) -> bool:
            slot = view.slots[self.rank]
            return slot.incarnation != self.incarnation or slot.state is not State.READY

        view = self.wait(settled, timeout_s)
        self.check()
        return view

    # what it wants

    def propose_failed(self, ranks: Mapping[int, int], evidence: str) -> View:
        """Propose the view without these ranks, and return the view that has it.

        ranks: rank -> incarnation of the process that failed, as a step began with it (`View.incarnations`): a process
        that has taken the slot since then is not meant. Raises ExcludedFromView if this rank itself is outside, for
        instance because the others were faster; StoreAway if the store does not answer.
        """
        self._ask("failed", ranks=[list(pair) for pair in ranks.items()], note=evidence[:255])
        return self.view

    def activate(self, ranks: Mapping[int, int], first: Sequence[int]) -> View:
        """Let ranks that are ready take part, from these steps of each channel on. Raises JoinRefused if one is not
        ready, ExcludedFromView, StoreAway."""
        self._ask("join", ranks=[list(pair) for pair in ranks.items()], steps=list(first))
        return self.view

    def leave(self, ranks: Mapping[int, int] | None = None, last: Sequence[int] | None = None) -> View:
        """Take ranks out of the view in order (None: this one): at once, or from the steps `last` of each channel on;
        then a second call without `last` ends it. Raises ExcludedFromView, StoreAway."""
        mine = {self.rank: self.incarnation} if ranks is None else ranks
        steps = None if last is None else list(last)
        self._ask("leave", ranks=[list(pair) for pair in mine.items()], steps=steps)
        return self.view

    def strike(self, ranks: Mapping[int, int]) -> View:
        """Take note that ranks which failed are gone for good: they have LEFT then. ranks: rank -> incarnation. Raises
        ExcludedFromView, StoreAway."""
        self._ask("strike", ranks=[list(pair) for pair in ranks.items()])
        return self.view

    def settle(self, epoch: int, timeout_s: float, leavers: Iterable[str] = ()) -> bool:
        """Wait until every rank's page has a view of at least this epoch, which this member has seen. leavers: hosts
        whose ranks that view may be without, and that are to have it nevertheless. Returns False if a host's watcher
        has not said so in time; it may be gone."""
        deadline = time.monotonic() + timeout_s
        leavers = set(leavers)
        for host in (self.view.watchers().keys() | leavers) - {self.host}:
            while True:
                with contextlib.suppress(StoreAway):
                    said = self.lookup(applied_name(host))
                    if said is not None and said.isdigit() and int(said) >= epoch:
                        break
                if host not in self.view.watchers() and host not in leavers:
                    break
                if time.monotonic() > deadline:
                    return False
                time.sleep(_SETTLE_NAP_S)
        return True

    def refresh(self) -> View:
        """Look into the store now. Raises StoreAway if it does not answer."""
        self._ask("look")
        return self.view

    def publish(self, name: str, value: bytes) -> None:
        """Put up to 60 kB into the store, where all of the group can find it, for as long as this member lives: if the
        store loses its data, it is put there again."""
        self._ask("put", name=name, value=value.hex())
        self._published[name] = value

    def lookup(self, name: str) -> bytes | None:
        """What was published under a name, if anything."""
        value = self._ask("find", name=name).get("value")
        return None if value is None else bytes.fromhex(value)

    def rejoin(self, rank: int | None = None, prepare: Callable[[], None] | None = None) -> None:
        """Come back after being excluded: with a new incarnation, in the same slot unless told otherwise. Then a
        member has to activate it. prepare: called once the incarnation is known, before the slot is asked for. Raises
        JoinRefused if the slot is taken."""
        wanted = self.rank if rank is None else rank
        self.incarnation = _new_incarnation()
        if prepare is not None:
            prepare()
        self._reserve(wanted)

    def close(self) -> None:
        """Leave the group if this process is part of it, and let go of page and watcher. May be called twice."""
        if self._closed:
            return
        with contextlib.suppress(MoeA2AError):
            if self.rank >= 0 and self.page.takes_part(self.rank, self.incarnation):
                ranks = [[self.rank, self.incarnation]]
                self._ask("leave", _GOODBYE_S, ranks=ranks, steps=None)
        with contextlib.suppress(MoeA2AError):
            self._ask("goodbye", _GOODBYE_S)
        self._closed = True
        self._line.close(_GOODBYE_S)
        self.page.close()

    def __enter__(self) -> Member:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # the watcher

    @property
    def watcher_pid(self) -> int:
        """Of this host's watcher at the moment."""
        return self._line.watcher_pid

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self._line.watcher_address, self.incarnation, self.host)

    def _reserve(self, rank: int) -> None:
        self.rank = number(self._ask("reserve", rank=rank, incarnation=self.incarnation), "rank", 0, 1023)

    def keep_store(self) -> None:
        """Let this host's watcher start the store again if it dies. Only on the machine of the store."""
        self._keep = True
        self._ask("keep")

    def _ask(self, what: str, timeout_s: float | None = None, **content: Any) -> dict[str, Any]:
        return self._line.ask(what, self.options.timeout_s if timeout_s is None else timeout_s, **content)

    def _hello(self) -> dict[str, Any]:
        known = self._view.slots[self.rank].endpoint if self._view is not None and self.rank >= 0 else None
        address = known.address if known is not None and known.host == self.host else ""
        hello = {"hello": PROTOCOL, "rank": self.rank, "incarnation": self.incarnation, "address": address}
        return {**hello, "keep": self._keep}

    def _put_again(self) -> list[dict[str, Any]]:
        return [{"ask": "put", "name": name, "value": value.hex()} for name, value in list(self._published.items())]

    def _report(self) -> None:
        if self._on_change is not None and self.page.epoch > self._reported:
            view = self.view
            self._reported = view.epoch
            self._on_change(view)

    def found(self, first: View) -> None:
        """Put a group's first view into the store. All founders bring the same; any may be first."""
        self._ask("found", view=encode_view(first).decode())


def _new_incarnation() -> int:
    return secrets.randbits(62) + 1
