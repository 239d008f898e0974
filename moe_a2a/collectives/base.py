"""How a process comes to a group, and what it then holds: its membership, its memory, and the ways to the others."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

from moe_a2a.bootstrap import StoreBootstrap
from moe_a2a.collectives.options import Options
from moe_a2a.collectives.region import LINE, Layout
from moe_a2a.elastic.keeper import Keeper
from moe_a2a.elastic.places import Finder, Found, slot_host
from moe_a2a.elastic.windows import Windows
from moe_a2a.errors import ConfigError, JoinRefused
from moe_a2a.hosts import own_label, own_network
from moe_a2a.membership.group import found_group, join_group
from moe_a2a.membership.member import Member, MemberOptions
from moe_a2a.membership.view import View
from moe_a2a.membership.wire import decode_json, encode_json, number, text
from moe_a2a.rendezvous import Rounds, own_address
from moe_a2a.transport.engine import P2P, Engine
from moe_a2a.transport.handover import FdServer
from moe_a2a.transport.memory import HostMemory, check_platform
from moe_a2a.transport.rail import RemotePeer

#: Compared when a process joins: two versions whose regions differ must not meet.
FORMAT_VERSION = 1
_WHERE, _FACTS, _FACTS_BYTES = "moe_a2a/where", "facts", 1000


class TorchStore(Protocol):
    """The part of torch's store that a group uses."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def wait(self, keys: Any, timeout: Any, /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


@dataclass
class Base:
    """member, keeper: None while this process is alone. peers: where the ranks of other hosts are. known: rank ->
    incarnation of those that this process can reach, itself included. founded: it was there from the first operation
    on."""

    rank: int
    incarnation: int
    layout: Layout
    memory: HostMemory
    stack: ExitStack
    member: Member | None = None
    keeper: Keeper | None = None
    engine: Engine | None = None
    peers: dict[int, RemotePeer] = field(default_factory=dict)
    known: dict[int, int] = field(default_factory=dict)
    founded: bool = False

    def take_in(self, ranks: Mapping[int, Found]) -> None:
        """Map the memory of processes of this host, and note where those of other hosts are."""
        for rank, found in ranks.items():
            if found.peer is not None:
                self.peers[rank] = found.peer
            else:
                self.peers.pop(rank, None)
                try:
                    self.memory.map_peer(rank, found.fd)
                finally:
                    os.close(found.fd)
            self.known[rank] = found.incarnation

    def take_in_found(self) -> None:
        if self.keeper is not None and self.keeper.has_found:
            self.take_in(self.keeper.take_found())

    def close(self) -> None:
        self.stack.close()


def alone(rank: int, slots: int, options: Options) -> Base:
    """A process that has not come to its group yet."""
    check_platform()
    layout = Layout(slots, options.chunk_bytes, False)
    stack = ExitStack()
    memory = HostMemory(layout.nbytes, slots, rank)
    stack.callback(memory.close)
    return Base(rank, 0, layout, memory, stack, known={rank: 0})


def found(store: TorchStore, rank: int, size: int, timeout_s: float, options: Options) -> Base:
    """Found a group of `size` ranks. Collective. Raises ConfigError, EngineError, RankLost, StoreAway on all alike."""
    slots = size if options.slots is None else options.slots
    bootstrap = StoreBootstrap(store, rank, size)
    rounds = Rounds(bootstrap, timeout_s)

    def hello() -> dict[str, Any]:
        check_platform()
        if slots < size:
            raise ConfigError(f"slots={slots} for {size} ranks; give as many or more")
        name = options.group or (f"pg-{secrets.token_hex(8)}" if rank == 0 else "")
        return {"host": own_label(options.host), "network": own_network(), "group": name, "said": charter(options)}

    _, hellos = rounds.run(hello, lambda said: said)
    network = hellos[0]["network"] if len({said["network"] for said in hellos}) == 1 else ""
    several = len({said["host"] for said in hellos}) > 1
    name = options.group or hellos[0]["group"]
    with ExitStack() as stack:
        built = _Built(slots, several, bool(network), timeout_s, options, stack)
        keeper = Keeper(timeout_s)
        given = _member_options(options, options.store, name, timeout_s)
        member = found_group(bootstrap, given, slots, charter=charter(options), on_change=keeper.on_change)
        stack.callback(member.close)
        # By all, as the charter: it has to outlive every one of them.
        member.publish(_FACTS, encode_json({"slots": slots, "several_hosts": several, "network": network}))
        if rank == 0:
            store.set(_WHERE, encode_json({"store": member.options.store, "group": name}).decode())
        rounds.run(lambda: built.open(member), lambda _: True)
        ways, _ = rounds.run(built.finder.find_all, lambda _: True)
        base = built.finish(member, keeper, ways)
        rounds.run(lambda: None, lambda _: True)
        base.stack, base.founded = stack.pop_all(), True
        return base


def enter(store: TorchStore | None, rank: int, options: Options, timeout_s: float) -> Base:
    """Take a slot of a group that exists, make memory, and find all others; a member has yet to activate this process
    (`Base.member.wait_active`). Raises JoinRefused, StoreAway, ConfigError, EngineError, MoeA2AError."""
    check_platform()
    url, name = options.store, options.group
    if not (url and name):
        url, name = _where(store, options, timeout_s)
    keepers: list[Keeper] = []

    def on_change(view: View) -> None:
        for keeper in keepers:
            keeper.on_change(view)

    with ExitStack() as stack:
        member = join_group(_member_options(options, url, name, timeout_s), rank, charter(options), on_change)
        stack.callback(member.close)
        data = member.lookup(_FACTS)
        if data is None:
            raise JoinRefused(f"group {name!r} in {url} is no process group")
        member.publish(_FACTS, data)
        facts = decode_json(data, _FACTS_BYTES, "the facts of a group")
        slots, several = number(facts, "slots", 1, 64), facts.get("several_hosts") is True
        hosts = {slot_host(member.view, other) for other in member.view.ranks}
        if not several and hosts - {member.host}:  # nobody may be left
            raise JoinRefused(
                f"the group was founded on one host, {', '.join(sorted(hosts))}, and this process is on {member.host}; "
                "a group that is to span hosts has to be founded on two of them"
            )
        built = _Built(slots, several, text(facts, "network") == own_network(), timeout_s, options, stack)
        keeper = Keeper(timeout_s)
        built.open(member)
        base = built.finish(member, keeper, built.finder.find_all())
        keepers.append(keeper)
        keeper.on_change(member.view)
        base.stack = stack.pop_all()
        return base


def charter(options: Options) -> dict[str, Any]:
    """What all ranks must have alike, those who join later too."""
    fields = ("on_failure", "chunk_bytes", "protocol")
    return {"format": FORMAT_VERSION, **{name: getattr(options, name) for name in fields}}


class _Built:
    """A rank's memory, and the ways to and from it, before it knows anybody."""

    def __init__(
        self, slots: int, several: bool, one_network: bool, timeout_s: float, options: Options, stack: ExitStack
    ) -> None:
        self.layout = Layout(slots, options.chunk_bytes, several)
        self._one_network, self._timeout, self._options, self._stack = one_network, timeout_s, options, stack
        self.engine: Engine | None = None

    def open(self, member: Member) -> None:
        """Make the memory, and tell the others where it is."""
        options, stack, layout, rank = self._options, self._stack, self.layout, member.rank
        self.memory = HostMemory(layout.nbytes, layout.slots, rank)
        stack.callback(self.memory.close)
        server = FdServer(self.memory.fd, None, 30.0)
        stack.callback(server.close)
        windows = None
        if layout.several_hosts:
            host = options.host_address or os.environ.get("MOE_A2A_HOST_ADDRESS") or own_address(self._one_network)
            if options.engine is None:
                self.engine = Engine.get(host, options.protocol, options.device_filter, P2P)
            else:
                self.engine = Engine.around(options.engine, host, options.protocol)
            # What this rank publishes, which its own writes read. Those of others come in by windows.
            address = self.memory.address(rank)
            self.engine.register(address, layout.published)
            stack.callback(self.engine.unregister, address)
            lanes = tuple((layout.mirror(slot), layout.published) for slot in range(layout.slots))
            windows = Windows(self.memory, self.engine, lanes)
            stack.callback(windows.close)
        self.finder = Finder(member, layout.nbytes, windows, partial(self._reach, rank), self._timeout)
        self.finder.publish(server.name, server.token, self.engine.name if self.engine else "")

    def _reach(self, own: int, rank: int, peer: RemotePeer, limit_s: float) -> None:
        """Write the first line, which nobody reads in a mirror, to a rank of another host."""
        assert self.engine is not None
        target = peer.address + self.layout.mirror(own)
        self.engine.reach(peer.engine, self.memory.address(own), target, LINE, limit_s)

    def finish(self, member: Member, keeper: Keeper, ways: Mapping[int, Found]) -> Base:
        base = Base(member.rank, member.incarnation, self.layout, self.memory, self._stack, member, keeper, self.engine)
        base.known[member.rank] = member.incarnation
        base.take_in(ways)
        self._stack.callback(keeper.close)
        keeper.start(member, self.finder, {rank: found.incarnation for rank, found in ways.items()})
        return base


def _where(store: TorchStore | None, options: Options, timeout_s: float) -> tuple[str, str]:
    """Address of the membership store and name of the group, as rank 0 said in torch's store."""
    if store is None:
        raise ConfigError("Options.store and Options.group are needed: torch's store is not there to ask")
    try:
        store.wait([_WHERE], timedelta(seconds=timeout_s))
        said = decode_json(store.get(_WHERE), _FACTS_BYTES, "where a group is")
    except RuntimeError as error:
        raise JoinRefused(f"torch's store does not say where the group is within {timeout_s:g} s: {error}") from error
    return options.store or text(said, "store"), options.group or text(said, "group")


def _member_options(options: Options, url: str, name: str, timeout_s: float) -> MemberOptions:
    return MemberOptions(url, name, own_label(options.host), options.control_address, timeout_s=timeout_s)
