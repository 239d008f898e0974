"""How a rank comes to its elastic group: it founds one with the others, or takes a slot of one that exists."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from moe_a2a.bootstrap import Bootstrap
from moe_a2a.config import Config, Options
from moe_a2a.elastic.keeper import Keeper
from moe_a2a.elastic.lookout import Lookout
from moe_a2a.elastic.options import MOST_RANKS, Elastic
from moe_a2a.elastic.places import HELD, Finder, Found, slot_host
from moe_a2a.elastic.rail import ElasticRail
from moe_a2a.elastic.shared import ElasticShared
from moe_a2a.elastic.windows import Windows
from moe_a2a.errors import ConfigError, JoinRefused, MoeA2AError
from moe_a2a.hosts import HostMap, own_label, own_network
from moe_a2a.membership.group import found_group, join_group
from moe_a2a.membership.member import Member, MemberOptions
from moe_a2a.membership.view import View
from moe_a2a.membership.wire import decode_json, encode_json, number, text
from moe_a2a.rendezvous import FORMAT_VERSION, Meeting, Rounds, check_memory, introduce, own_address
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.engine import Engine
from moe_a2a.transport.handover import FdServer
from moe_a2a.transport.memory import HostMemory, check_platform
from moe_a2a.transport.progress import Progress
from moe_a2a.transport.protocol import Transport
from moe_a2a.transport.rail import RemotePeer
from moe_a2a.transport.region import RegionLayout
from moe_a2a.transport.wait import Watch
from moe_a2a.transport.wire import RECORD_BYTES, Kind

#: Share of the time-out that waits inside a host may last: others wait for those who wait.
_FORWARD_SHARE = 0.8
#: Name under which the store has what the founders settled, and its limit.
_FACTS, _FACTS_BYTES = "facts", 1000


@dataclass
class Group:
    """What founding or joining leaves behind. started: [channels], the step that was the last one before this rank's
    first. peers, known: where ranks of other hosts are, and rank -> incarnation of all that this rank can reach."""

    meeting: Meeting
    member: Member
    keeper: Keeper
    lookout: Lookout
    shared: ElasticShared
    rail: ElasticRail | None
    started: list[int]
    peers: dict[int, RemotePeer]
    known: dict[int, int] = field(default_factory=dict)

    def take_in(self, ranks: Mapping[int, Found]) -> None:
        """Map the memory of processes of this host, and note where those of other hosts are."""
        for rank, found in ranks.items():
            self.known[rank] = found.incarnation
            if found.peer is not None:
                self.peers[rank] = found.peer
                continue
            try:
                self.meeting.arena.memory.map_peer(rank, found.fd)
            finally:
                os.close(found.fd)
        slots = self.member.view.slots
        held = {rank: slot.incarnation for rank, slot in enumerate(slots) if slot.state in HELD}
        if all(self.known.get(rank) == held[rank] for rank in held.keys() - {self.member.rank}):
            self.lookout.reachable = self.member.view.epoch


class _Built:
    """A rank's memory, and the ways to and from it, before it knows anybody."""

    def __init__(
        self,
        config: Config,
        options: Options,
        slots: int,
        several_hosts: bool,
        one_network: bool,
        timeout_s: float,
        stack: ExitStack,
    ) -> None:
        self.layout = RegionLayout.elastic(config, slots, several_hosts)
        check_memory(config, slots, self.layout.nbytes, self.layout.nbytes)
        self.config, self.options, self.slots, self.timeout_s, self.stack = config, options, slots, timeout_s, stack
        self.engine: Engine | None = None
        self._one_network = one_network
        self._several = several_hosts

    def open(self, member: Member) -> None:
        """Make the memory, and tell the others where it is."""
        options, stack, rank = self.options, self.stack, member.rank
        self.memory = HostMemory(self.layout.nbytes, self.slots, rank)
        stack.callback(self.memory.close)
        server = FdServer(self.memory.fd, None, options.timeout_s)
        stack.callback(server.close)
        windows = None
        if self._several:
            address = options.host_address or os.environ.get("MOE_A2A_HOST_ADDRESS") or own_address(self._one_network)
            self.engine = Engine.get(address, options.protocol, options.device_filter, options.metadata_server)
            # From here this rank's own writes read. Those of others come in by windows.
            start = self.memory.address(rank, self.layout.engine_start)
            self.engine.register(start, self.layout.nbytes - self.layout.engine_start)
            stack.callback(self.engine.unregister, start)
            windows = Windows(self.memory, self.engine, self.layout.lanes)
            stack.callback(windows.close)
        self.finder = Finder(member, self.layout.nbytes, windows, partial(self._reach, rank), self.timeout_s)
        self.finder.publish(server.name, server.token, self.engine.name if self.engine else "")

    def _reach(self, own: int, rank: int, peer: RemotePeer, limit_s: float) -> None:
        """Write a record that means nothing to a rank of another host."""
        assert self.engine is not None
        block, nothing = self.layout.blocks[0][0], RECORD_BYTES * Kind.PARTIALS_AWAY
        source = self.memory.address(own, block.host_slots[rank].outbox + nothing)
        target = peer.address + block.source_slots[own].inbox + nothing
        self.engine.reach(peer.engine, source, target, RECORD_BYTES, limit_s)

    def finish(self, member: Member, keeper: Keeper, found: Mapping[int, Found], started: list[int]) -> Group:
        config, options, rank, stack = self.config, self.options, member.rank, self.stack
        progress = Progress() if self.engine is not None else None
        if progress is not None:
            stack.callback(progress.close, options.timeout_s)
        # One place for every slot, whoever has it: which of them are on this host, every step's roll says.
        places = HostMap.from_labels([""] * self.slots)
        arena = Arena(config, places, rank, self.memory, {rank: member.incarnation}, self.layout)
        watch = Watch(self.memory, (), rank, progress)
        lookout = Lookout(member, keeper.accuse, progress, options.timeout_s)
        shared = ElasticShared(arena, lookout, _FORWARD_SHARE * options.timeout_s)
        peers: dict[int, RemotePeer] = {}
        rail = None
        if self.engine is not None and progress is not None:
            rail = ElasticRail(arena, self.engine, peers, lookout, progress, options.timeout_s)
        transports: tuple[Transport, ...] = (shared,) if rail is None else (rail, shared)
        meeting = Meeting(places, arena, watch, progress, transports, stack)
        group = Group(meeting, member, keeper, lookout, shared, rail, started, peers)
        group.take_in(found)
        stack.callback(keeper.close)
        keeper.start(member, self.finder, {r: f.incarnation for r, f in found.items()})
        return group


def found(config: Config, options: Options, elastic: Elastic, bootstrap: Bootstrap, stack: ExitStack) -> Group:
    """Found a group. Collective. Raises ConfigError, EngineError, RankLost, StoreAway, on all ranks alike."""
    slots = bootstrap.world_size if elastic.max_ranks is None else elastic.max_ranks
    if slots < bootstrap.world_size:
        raise ConfigError(f"max_ranks={slots} for {bootstrap.world_size} ranks; give as many or more")
    rounds = Rounds(bootstrap, elastic.timeout_s)
    hellos = introduce(rounds, config, options, slots, "cpu", check_platform)
    several = len({hello["host"] for hello in hellos}) > 1
    one_network = len({hello["network"] for hello in hellos}) == 1
    built = _Built(config, options, slots, several, one_network, elastic.timeout_s, stack)
    keeper = Keeper(elastic.timeout_s)
    charter = _charter(config, options)
    member = found_group(
        bootstrap, _member_options(options, elastic), slots, config.channels, charter, keeper.on_change
    )
    stack.callback(member.close)
    # By all, as the charter: it has to outlive every one of them.
    member.publish(_FACTS, _facts(slots, several, own_network() if one_network else ""))
    rounds.run(lambda: built.open(member), lambda _: True)
    ways, _ = rounds.run(built.finder.find_all, lambda _: True)
    group = built.finish(member, keeper, ways, [0] * len(config.channels))
    rounds.run(lambda: None, lambda _: True)
    return group


def join(config: Config, options: Options, elastic: Elastic, rank: int | None, stack: ExitStack) -> Group:
    """Take a slot of a group that exists, and wait until its ranks let this one take part.

    Raises JoinRefused with the reason, StoreAway, ConfigError, EngineError, MoeA2AError (the group makes no steps).
    """
    check_platform()
    keepers: list[Keeper] = []

    def on_change(view: View) -> None:
        for keeper in keepers:
            keeper.on_change(view)

    member = join_group(_member_options(options, elastic), rank, _charter(config, options), on_change)
    stack.callback(member.close)
    try:
        slots, several, network = _read_facts(member, elastic)
        hosts = {slot_host(member.view, r) for r in member.view.ranks}
        if not several and hosts != {member.host}:
            raise JoinRefused(
                f"the group was founded on one host, {', '.join(sorted(hosts))}, and this process is on "
                f"{member.host}; a group that is to span hosts has to be founded on two of them"
            )
        built = _Built(config, options, slots, several, network == own_network(), elastic.timeout_s, stack)
        keeper = Keeper(elastic.timeout_s)
        built.open(member)
        member.publish(_FACTS, _facts(slots, several, network))
        group = built.finish(member, keeper, built.finder.find_all(), [])
        keepers.append(keeper)
        keeper.on_change(member.view)
        view = member.wait_active(elastic.timeout_s)
    except BaseException:
        with contextlib.suppress(MoeA2AError):
            member.leave()
        raise
    group.started = [step - 1 for step in view.slots[member.rank].first]
    return group


def _member_options(options: Options, elastic: Elastic) -> MemberOptions:
    return MemberOptions(
        elastic.store,
        elastic.group,
        own_label(options.host),
        elastic.control_address,
        timeout_s=elastic.timeout_s,
    )


def _charter(config: Config, options: Options) -> dict[str, Any]:
    """What everybody must have alike."""
    return {"format": FORMAT_VERSION, **config.as_json(), **options.as_json()}


def _facts(slots: int, several_hosts: bool, network: str) -> bytes:
    return encode_json({"slots": slots, "several_hosts": several_hosts, "network": network})


def _read_facts(member: Member, elastic: Elastic) -> tuple[int, bool, str]:
    """(slots, whether the group spans hosts, the network that all founders shared, or "")."""
    data = member.lookup(_FACTS)
    if data is None:
        raise JoinRefused(f"group {elastic.group!r} in {elastic.store} has no ranks that dispatch and combine")
    facts = decode_json(data, _FACTS_BYTES, "the facts of a group")
    slots = number(facts, "slots", 1, MOST_RANKS)
    if elastic.max_ranks not in (None, slots):
        raise JoinRefused(f"max_ranks differs: the group has {slots}, this process has {elastic.max_ranks}")
    return slots, facts.get("several_hosts") is True, text(facts, "network")
