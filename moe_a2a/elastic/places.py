"""Where the processes of a group are reached: what each says of itself in the store, and how the others find it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_a2a.elastic.windows import Window, Windows
from moe_a2a.errors import EngineError, MoeA2AError, RankLost
from moe_a2a.hosts import own_network
from moe_a2a.membership.member import Member
from moe_a2a.membership.view import State, View
from moe_a2a.membership.wire import decode_json, encode_json, incarnations, text
from moe_a2a.transport.handover import fetch_fd
from moe_a2a.transport.rail import RemotePeer

_PLACE_BYTES = 16384
_AGAIN_S = 0.01
#: A process that hangs while it joins holds up the search for others no longer than this.
_LONGEST_LOOK_S = 0.5
T = TypeVar("T")
HELD = (State.READY, State.ACTIVE, State.LEAVING)


@dataclass(frozen=True)
class Place:
    """Where a process of the group is reached. socket, token: where its host's ranks fetch its memory; engine: name of
    its Transfer Engine, "" without; network: as `hosts.own_network`; windows: by rank, those that it gave to the
    processes of other hosts that were there before it."""

    socket: str
    token: str
    engine: str
    network: str
    windows: Mapping[int, Window]

    def encode(self) -> bytes:
        texts = {name: getattr(self, name) for name in ("socket", "token", "engine", "network")}
        return encode_json({**texts, **_windows_json(self.windows)})

    @classmethod
    def decode(cls, data: bytes) -> Place:
        """Raises MessageError."""
        said = decode_json(data, _PLACE_BYTES, "the place of a rank")
        socket, token, engine, network = (text(said, name) for name in ("socket", "token", "engine", "network"))
        return cls(socket, token, engine, network, _windows_of(said))

    def publish(self, member: Member) -> None:
        member.publish(_place_name(member.rank, member.incarnation), self.encode())


def _windows_json(windows: Mapping[int, Window]) -> dict[str, Any]:
    return {
        "windows": [[rank, window.incarnation] for rank, window in windows.items()],
        "origins": [[rank, window.origin] for rank, window in windows.items()],
    }


def _windows_of(said: Mapping[str, Any]) -> dict[int, Window]:
    origins = incarnations(said, "origins")
    return {rank: Window(of, origins[rank]) for rank, of in incarnations(said, "windows").items() if rank in origins}


def _place_name(rank: int, incarnation: int) -> str:
    return f"place/{rank}/{incarnation}"


def _window_name(owner: int, incarnation: int, rank: int) -> str:
    """Where a process says which window it gave to a rank last."""
    return f"window/{owner}/{incarnation}/{rank}"


def slot_host(view: View, rank: int) -> str:
    """The label of a slot's host, "" if nobody has had it."""
    endpoint = view.slots[rank].endpoint
    return endpoint.host if endpoint else ""


def others(member: Member) -> dict[int, int]:
    """rank -> incarnation of the processes of other hosts that hold a slot."""
    view = member.view
    return {
        rank: slot.incarnation
        for rank, slot in enumerate(view.slots)
        if slot.state in HELD and slot_host(view, rank) != member.host
    }


@dataclass(frozen=True)
class Found:
    """A process that has been found. On the own host, fd: its memory, to be mapped and closed. On another one, peer:
    where this rank writes."""

    incarnation: int
    fd: int = -1
    peer: RemotePeer | None = None


class Finder:
    """Finds the way to processes that hold a slot, and gives those of other hosts a window.

    nbytes: what a region must have. windows: None in groups on one host. reach: writes to a rank of another host for
    the first time, which connects to it: no step has to wait for that.
    """

    def __init__(
        self,
        member: Member,
        nbytes: int,
        windows: Windows | None,
        reach: Callable[[int, RemotePeer, float], None],
        timeout_s: float,
    ) -> None:
        self._member, self._nbytes, self._windows, self._timeout = member, nbytes, windows, timeout_s
        self._reach = reach
        self._told: dict[int, Window] = {}

    def publish(self, socket: str, token: str, engine: str) -> None:
        """Tell the others where this process is, and those of other hosts that are there where to write. Arguments as
        in `Place`."""
        if self._windows is not None:
            for rank, incarnation in others(self._member).items():
                self._told[rank] = self._windows.give(rank, incarnation)
        Place(socket, token, engine, own_network(), self._told).publish(self._member)

    def find_all(self) -> dict[int, Found]:
        """The ways to all that take part. Those who wait to be activated come later. Raises MoeA2AError."""
        ways, member = {}, self._member
        for rank in member.view.ranks:
            if rank != member.rank:
                try:
                    ways[rank] = self.find(rank, member.view.slots[rank].incarnation)
                except MoeA2AError:
                    if member.view.slots[rank].takes_part:
                        raise
        return ways

    def find(self, rank: int, incarnation: int, patient: bool = True) -> Found:
        """patient: wait until it says how it is reached. Raises MoeA2AError."""
        member, limit = self._member, self._timeout if patient else 0.0
        deadline = time.monotonic() + limit
        place = self._read(rank, incarnation, _place_name(rank, incarnation), deadline, Place.decode)
        if slot_host(member.view, rank) == member.host:
            return Found(incarnation, fd=self._insist(rank, incarnation, deadline, lambda: self._fetch(rank, place)))
        # Give before taking: two that come at the same time wait for each other.
        self._give(rank, incarnation)

        def own_window(data: bytes) -> Window | None:
            window = _windows_of(decode_json(data, _PLACE_BYTES, "a window")).get(member.rank)
            return window if window and window.incarnation == member.incarnation else None

        own = place.windows.get(member.rank)
        if own is None or own.incarnation != member.incarnation:
            own = self._read(rank, incarnation, _window_name(rank, incarnation, member.rank), deadline, own_window)
        peer = RemotePeer(place.engine, own.origin)
        self._insist(rank, incarnation, deadline, lambda: self._reach(rank, peer, _LONGEST_LOOK_S))
        return Found(incarnation, peer=peer)

    def _insist(self, rank: int, incarnation: int, deadline: float, reach: Callable[[], T]) -> T:
        """Try until it works, the time is up, or the process has lost its slot: one that hangs answers nobody."""
        while True:
            try:
                return reach()
            except (EngineError, RankLost):
                if time.monotonic() > deadline or not self._holds(rank, incarnation):
                    raise
            time.sleep(_AGAIN_S)

    def _give(self, rank: int, incarnation: int) -> None:
        assert self._windows is not None  # of a group that spans hosts
        window = self._windows.give(rank, incarnation)
        if self._told.get(rank) != window:
            name = _window_name(self._member.rank, self._member.incarnation, rank)
            self._member.publish(name, encode_json(_windows_json({rank: window})))
            self._told[rank] = window

    def _read(self, rank: int, incarnation: int, name: str, deadline: float, take: Callable[[bytes], T | None]) -> T:
        """What `take` makes of what a process published, or will; None is for something older."""
        while True:
            data = self._member.lookup(name)
            taken = None if data is None else take(data)
            if taken is not None:
                return taken
            if not self._holds(rank, incarnation):
                raise MoeA2AError(f"rank {rank} is gone")
            if time.monotonic() > deadline:
                raise MoeA2AError(f"rank {rank} does not say how it is reached")
            time.sleep(_AGAIN_S)

    def _holds(self, rank: int, incarnation: int) -> bool:
        slot = self._member.view.slots[rank]
        return slot.incarnation == incarnation and slot.state in HELD

    def _fetch(self, rank: int, place: Place) -> int:
        fd, _ = fetch_fd(rank, place.socket, place.token, _LONGEST_LOOK_S)
        size = os.fstat(fd).st_size
        if size != self._nbytes:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise MoeA2AError(
                f"the memory of rank {rank} has {size} bytes, not {self._nbytes}; give every rank the same Config"
            )
        return fd
