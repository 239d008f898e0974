"""Construction: ranks meet, compare what they were given, share memory and try the way to each other.

It goes in rounds. A rank that fails in a round says so in the next exchange, and every rank raises the same error: no
rank is left waiting for one that has already given up.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_a2a.bootstrap import Bootstrap
from moe_a2a.config import Config, Options
from moe_a2a.errors import ConfigError, EngineError, MoeA2AError, RankLost
from moe_a2a.hosts import HostMap, machine_id, own_label, own_network
from moe_a2a.transport.arena import Arena
from moe_a2a.transport.engine import Engine
from moe_a2a.transport.handover import FdServer, fetch_fd
from moe_a2a.transport.memory import HostMemory, available_memory, check_platform
from moe_a2a.transport.progress import Progress
from moe_a2a.transport.protocol import Transport
from moe_a2a.transport.rail import RailTransport, RemotePeer
from moe_a2a.transport.region import RegionLayout
from moe_a2a.transport.shared import SharedMemoryTransport
from moe_a2a.transport.wait import Watch, named

FORMAT_VERSION = 2
#: Share of the time-out that a rank may wait where others wait for it in turn, so that the origin is blamed and not
#: the forwarder.
_FORWARD_SHARE = 0.8
_ERRORS: dict[str, type[MoeA2AError]] = {e.__name__: e for e in (ConfigError, EngineError, RankLost, MoeA2AError)}

T = TypeVar("T")


@dataclass
class Meeting:
    """What construction leaves behind. transports: between hosts first, because the network is the slower way."""

    hosts: HostMap
    arena: Arena
    watch: Watch
    progress: Progress | None
    transports: tuple[Transport, ...]
    resources: ExitStack


class Rounds:
    """Exchanges in which a failure on one rank is raised on all."""

    def __init__(self, bootstrap: Bootstrap, timeout_s: float) -> None:
        self._bootstrap, self._timeout = bootstrap, timeout_s

    def run(self, work: Callable[[], T], publish: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """Do `work`, tell the others `publish(result)`. Returns (result, every rank's published value)."""
        failure: Exception | None = None
        result: T | None = None
        message: dict[str, Any]
        try:
            result = work()
            message = {"value": publish(result)}
        except Exception as error:
            failure = error
            message = {
                "error": str(error),
                "kind": type(error).__name__,
                "ranks": list(getattr(error, "ranks", ())),
            }
        answers = self._bootstrap.all_gather(message, self._timeout)
        if failure is not None:
            raise failure
        failed = [r for r, answer in enumerate(answers) if "error" in answer]
        if failed:
            first = answers[failed[0]]
            text = f"{named(failed)} could not start: {first['error']}"
            if first["kind"] == "RankLost":
                raise RankLost(text, first["ranks"])
            raise _ERRORS.get(first["kind"], MoeA2AError)(text)
        return result, [answer["value"] for answer in answers]  # type: ignore[return-value]


def introduce(
    rounds: Rounds, config: Config, options: Options, world: int, device: str, check: Callable[[], object]
) -> list[dict[str, Any]]:
    """The first round: everyone says what it was given. Returns what each rank said, once all of it fits together.

    device: "cpu" or "cuda". check: raises what speaks against this machine. Raises ConfigError on all ranks alike.
    """

    def hello() -> dict[str, Any]:
        check()
        config.local_experts(world)
        return {
            "version": FORMAT_VERSION,
            "device": {"device": device},
            "config": config.as_json(),
            "options": options.as_json(),
            "host": own_label(options.host),
            "machine": machine_id(),
            "network": own_network(),
            "incarnation": secrets.randbits(63),
        }

    _, hellos = rounds.run(hello, lambda said: said)
    _compare(hellos)
    return hellos


def meet(config: Config, options: Options, bootstrap: Bootstrap) -> Meeting:
    """Build the group. Collective. Raises ConfigError, EngineError or RankLost, on all ranks alike."""
    with ExitStack() as stack:
        meeting = _meet(config, options, bootstrap, stack)
        meeting.resources = stack.pop_all()
        return meeting


def _meet(config: Config, options: Options, bootstrap: Bootstrap, stack: ExitStack) -> Meeting:
    rounds = Rounds(bootstrap, options.timeout_s)
    rank, world = bootstrap.rank, bootstrap.world_size

    hellos = introduce(rounds, config, options, world, "cpu", check_platform)
    hosts = HostMap.from_labels([hello["host"] for hello in hellos])
    incarnations = {r: int(hello["incarnation"]) for r, hello in enumerate(hellos)}
    peers = hosts.peers(rank)
    one_network = len({hello["network"] for hello in hellos}) == 1
    several_hosts = len(hosts.ranks_of) > 1
    layout = RegionLayout.of(config, hosts, hosts.host_of[rank])
    machine_total = sum(
        RegionLayout.of(config, hosts, hosts.host_of[r]).nbytes
        for r, hello in enumerate(hellos)
        if hello["machine"] == hellos[rank]["machine"]
    )

    def open_memory() -> tuple[HostMemory, FdServer, Engine | None]:
        check_memory(config, world, layout.nbytes, machine_total)
        memory = HostMemory(layout.nbytes, len(peers), peers.index(rank))
        stack.callback(memory.close)
        server = FdServer(memory.fd, len(peers) - 1, options.timeout_s)
        stack.callback(server.close)
        engine = None
        if several_hosts:
            address = options.host_address or os.environ.get("MOE_A2A_HOST_ADDRESS") or own_address(one_network)
            engine = Engine.get(address, options.protocol, options.device_filter, options.metadata_server)
            start = memory.address(memory.index, layout.engine_start)
            engine.register(start, layout.nbytes - layout.engine_start)
            stack.callback(engine.unregister, start)
        return memory, server, engine

    (memory, server, engine), places = rounds.run(
        open_memory,
        lambda opened: {
            "socket": opened[1].name,
            "token": opened[1].token,
            "engine": opened[2].name if opened[2] else None,
            "address": opened[0].address(opened[0].index),
        },
    )
    progress = Progress() if engine is not None else None
    if progress is not None:
        stack.callback(progress.close, options.timeout_s)
    watch = Watch(memory, peers, rank, progress)
    stack.callback(watch.close)
    arena = Arena(config, hosts, rank, memory, incarnations)

    def connect() -> tuple[Transport, ...]:
        for index, peer in enumerate(peers):
            if peer != rank:
                fd, pid = fetch_fd(peer, places[peer]["socket"], places[peer]["token"], options.timeout_s)
                try:
                    memory.map_peer(index, fd)
                finally:
                    os.close(fd)
                watch.add_process(peer, pid)
        forward = _FORWARD_SHARE * options.timeout_s
        shared = SharedMemoryTransport(arena, watch, forward)
        if engine is None or progress is None:
            return (shared,)
        remote = {
            r: RemotePeer(places[r]["engine"], places[r]["address"])
            for r in range(world)
            if hosts.host_of[r] != arena.host
        }
        rail = RailTransport(arena, engine, remote, watch, progress, forward, options.timeout_s)
        rail.greet(options.timeout_s)
        return (rail, shared)

    transports, _ = rounds.run(connect, lambda _: True)
    server.close()
    return Meeting(hosts, arena, watch, progress, transports, stack)


def _compare(hellos: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError naming the field and the ranks that differ from rank 0."""
    for part in ("version", "device", "config", "options"):
        for rank, hello in enumerate(hellos):
            if hello[part] == hellos[0][part]:
                continue
            if part == "version":
                raise ConfigError(
                    f"rank {rank} runs another version of moe-a2a than rank 0; install one version on all ranks"
                )
            for field, value in hellos[0][part].items():
                if hello[part].get(field) != value:
                    raise ConfigError(
                        f"{field} differs between ranks: rank 0 has {value!r}, rank {rank} has "
                        f"{hello[part].get(field)!r}; "
                        "give every rank the same"
                    )


def check_memory(config: Config, world: int, region: int, machine_total: int) -> None:
    free = available_memory()
    if machine_total > free:
        raise ConfigError(
            f"communication buffers of this machine's ranks need {machine_total / 1e9:.2f} GB ({region / 1e9:.2f} GB "
            f"for this rank: "
            f"{len(config.channels)} channels x 2 parities x rows of {config.row_bytes} bytes for max_tokens_per_rank="
            f"{config.max_tokens_per_rank} and {world} ranks), but {free / 1e9:.2f} GB are free; lower "
            f"max_tokens_per_rank"
        )


def own_address(one_network: bool) -> str:
    """Where other hosts reach this rank, when nobody said."""
    if one_network:
        return "127.0.0.1"
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:
        found = set()
    usable = sorted(a for a in found if not a.startswith("127."))
    if not usable:
        raise ConfigError(
            f"this machine's own name {name!r} gives no address that other hosts could use; set Options.host_address "
            f"or "
            "MOE_A2A_HOST_ADDRESS to this machine's IP address"
        )
    return usable[0]
