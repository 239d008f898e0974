"""Command lines of servers and of the router: what all recipes share."""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_a2a.recipes import ports
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.models import Model
from moe_a2a.recipes.plan import Check, HostGpus, RecipeError, Role, Server, url
from moe_a2a.recipes.releases import Release

PYTHON = "python3"

#: How long the router waits for a request, from its first byte to its last: as long as SGLang's benchmark client does.
#: The router's own half hour cuts the streams of a long queue (docs/troubleshooting.md, "Requests dropped").
REQUEST_SECONDS = 21600

#: What the router listens on if its host is a name.
ALL_ADDRESSES = "0.0.0.0"

#: --transfer: SGLang's backends for the KV cache that recipes know.
TRANSFERS = ("mooncake", "mooncake_tcp", "nixl")

#: Policies that the router has for prefill and for decode servers.
POLICIES = ("random", "round_robin", "cache_aware", "power_of_two")


@dataclass(frozen=True)
class Settings:
    """What servers of all roles share.

    ib_devices: of `hosts.ib_devices`.
    extra: flags that the user adds to every server.
    given_image: --image.
    """

    release: Release
    model: Model
    transfer: str = "mooncake"
    ib_devices: str | None = None
    modelscope: bool = False
    extra: tuple[str, ...] = ()
    given_image: str | None = None

    def __post_init__(self) -> None:
        if self.ib_devices is not None and self.transfer != "mooncake":
            raise RecipeError(
                f"--ib-devices {self.ib_devices} with --transfer {self.transfer}: only mooncake over RDMA uses them; "
                "leave one of the two out"
            )

    @property
    def image(self) -> str:
        """For containers: SGLang's published image of the release, which does not have this package, or --image."""
        return self.given_image or f"lmsysorg/sglang:v{self.release.version}"

    @property
    def image_with_this_package(self) -> str:
        """What a user has to build, or --image."""
        return self.given_image or f"sglang-moe-a2a:v{self.release.version}"

    @property
    def volumes(self) -> tuple[str, ...]:
        return (self.model.path,) if self.model.is_local else ()

    @property
    def env(self) -> dict[str, str]:
        # Not "1", which SGLang's benchmark client takes for no.
        return {"SGLANG_USE_MODELSCOPE": "true"} if self.modelscope else {}

    @property
    def model_flags(self) -> tuple[str, ...]:
        return ("--model-path", self.model.path, *self.model.flags)

    @property
    def transfer_flags(self) -> tuple[str, ...]:
        devices = ("--disaggregation-ib-device", self.ib_devices) if self.ib_devices is not None else ()
        return ("--disaggregation-transfer-backend", self.transfer, *devices)


@dataclass(frozen=True)
class Ports:
    """Ports that options give: nothing, one for all servers of the role, or one each."""

    http: Mapping[Role, Sequence[int]] = field(default_factory=dict)
    bootstrap: Sequence[int] = ()
    router: int = ports.ROUTER


@dataclass(frozen=True)
class Kind:
    """Flags and environment of the servers of a role, beside those that follow from their hosts.

    data_parallel_attention: whether SGLang opens ports for it.
    ports: more that it listens on: what for, the flag, and the first server's number on a host.
    """

    role: Role
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    data_parallel_attention: bool = False
    ports: tuple[tuple[str, str, int], ...] = ()


def build(settings: Settings, kind: Kind, groups: Sequence[Group], given: Ports) -> tuple[Server, ...]:
    """All servers of a role, one `Server` for each of their hosts."""
    http = ports.given(f"--{kind.role}-port", given.http.get(kind.role, ()), len(groups))
    bootstrap: list[int | None] = [None] * len(groups)
    if kind.role == "prefill":
        bootstrap = ports.given("--bootstrap-port", given.bootstrap, len(groups))
    seen: Counter[str] = Counter()
    found: list[Server] = []
    for number, one in enumerate(groups):
        nth = max(seen[place.host] for place in one.places)
        listening = {"http": http[number] or ports.HTTP[kind.role] + 10 * nth}
        if kind.role == "prefill":
            listening["bootstrap"] = bootstrap[number] or ports.BOOTSTRAP + nth
        listening |= {what: base + nth for what, _, base in kind.ports}
        if len(one.places) > 1:
            listening["rendezvous"] = ports.RENDEZVOUS + 10 * nth
        found += _server(settings, kind, number, one, listening)
        seen.update(place.host for place in one.places)
    return tuple(found)


def _server(settings: Settings, kind: Kind, number: int, one: Group, listening: dict[str, int]) -> list[Server]:
    """The processes of one server."""
    first = one.places[0]
    mode = ("--disaggregation-mode", kind.role, *settings.transfer_flags) if kind.role in ("prefill", "decode") else ()
    meeting = listening.get("rendezvous")
    processes = []
    for node, place in enumerate(one.places):
        command = [PYTHON, "-m", "sglang.launch_server", *settings.model_flags, "--host", place.host]
        command += ["--port", str(listening["http"]), *mode]
        if "bootstrap" in listening:
            command += ["--disaggregation-bootstrap-port", str(listening["bootstrap"])]
        for what, flag, _ in kind.ports:
            command += [flag, str(listening[what])]
        command += ["--tp-size", str(one.gpus)]
        if place.first:
            command += ["--base-gpu-id", str(place.first)]
        if meeting is not None:
            address = url(first.host, meeting).removeprefix("http://")
            command += ["--dist-init-addr", address, "--nnodes", str(len(one.places)), "--node-rank", str(node)]
        command += [*kind.flags, *settings.extra]
        mine = dict(listening) if node == 0 else {}
        if node == 0 and kind.data_parallel_attention:
            mine |= ports.internal(listening["http"], meeting)
        name = f"{kind.role}-{number}" + (f"-node-{node}" if node else "")
        env = {**settings.env, **_own_address(place.host), **kind.env}
        processes.append(Server(kind.role, name, place, listening["http"], tuple(command), env, mine, node))
    return processes


def _own_address(host: str) -> dict[str, str]:
    """Where the KV cache is to be sent to. Without it SGLang chooses among the host's addresses by itself."""
    try:
        return {"SGLANG_HOST_IP": str(ipaddress.ip_address(host))}
    except ValueError:  # a name
        return {}


def _bound(host: str) -> str:
    """What the router listens on: it takes addresses only, IPv6 ones in brackets. With a name, all IPv4 addresses."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # A place holder is an address by the time that a script runs.
        return host if host.endswith(".invalid") else ALL_ADDRESSES
    return f"[{address}]" if address.version == 6 else str(address)


@dataclass(frozen=True)
class Policy:
    """--policy, --prefill-policy and --decode-policy of the router."""

    prefill: str = "cache_aware"
    decode: str = "round_robin"


def router(host: str, port: int, servers: Sequence[Server], policy: Policy) -> Server:
    """sglang-router in front of prefill and decode servers."""
    command = [PYTHON, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    command += ["--host", _bound(host), "--port", str(port)]
    command += ["--prefill-policy", policy.prefill, "--decode-policy", policy.decode]
    # Weights of hundreds of GiB take longer than the router's half hour on some file systems.
    command += ["--worker-startup-timeout-secs", "3600", "--request-timeout-secs", str(REQUEST_SECONDS)]
    for server in servers:
        if server.node == 0 and server.role == "prefill":
            command += ["--prefill", server.url, str(server.ports["bootstrap"])]
        if server.node == 0 and server.role == "decode":
            command += ["--decode", server.url]
    return Server("router", "router", HostGpus(host, 0), port, tuple(command), ports={"http": port})


def checks(servers: Sequence[Server], gate: Server, path: str, body: Mapping[str, object]) -> tuple[Check, ...]:
    """Every server is healthy, the router is, and one request goes the whole way."""
    healthy = [Check(f"{server.name} is healthy", f"{server.url}/health") for server in servers if server.node == 0]
    return (
        *healthy,
        Check("the router is healthy", f"{gate.url}/health"),
        Check("a request goes the whole way", f"{gate.url}{path}", json.dumps(body)),
    )


#: Eight tokens, greedily: the shortest request that prefills on one server and decodes on another.
GENERATE = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
