"""What a recipe says: which processes run on which hosts, and what proves that they work. Renderers turn it into files.

Nothing here knows SGLang's flags or how a shell quotes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moe_a2a.errors import MoeA2AError

#: prefill and decode: the two halves of a language model's work. encode: the encoder of a vision-language model.
Role = Literal["prefill", "decode", "encode", "router"]


class RecipeError(MoeA2AError, ValueError):
    """A recipe that cannot work. The message has the option, the value that was given, and the rule."""


@dataclass(frozen=True)
class HostGpus:
    """GPUs of a host that one process of a server uses: `gpus` of them from number `first` on."""

    host: str
    gpus: int
    first: int = 0

    @property
    def last(self) -> int:
        return self.first + self.gpus - 1

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.first}-{self.last}"


@dataclass(frozen=True)
class Server:
    """One process on one host: a server, one node of a server that spans several hosts, or the router.

    name: unique in the plan and fit for a file's name, such as "prefill-0", or "prefill-0-node-1" for a server's second
        host.
    place: its host and GPUs; a router has 0 GPUs.
    port: where it serves HTTP. Nodes of a server other than its first one serve nothing there.
    command: words of the command line, unquoted. Renderers quote.
    env: environment variables beside those that the process inherits; values unquoted.
    ports: every port that the process listens on, `port` too, by what it is for.
    node: number of the host within the server; 0 is the one that requests go to.
    """

    role: Role
    name: str
    place: HostGpus
    port: int
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    node: int = 0

    @property
    def host(self) -> str:
        return self.place.host

    @property
    def url(self) -> str:
        return url(self.host, self.port)


@dataclass(frozen=True)
class Check:
    """A request that shows that something works. `body` is JSON for a POST; None is a GET. The answer must be 200."""

    name: str
    url: str
    body: str | None = None


@dataclass(frozen=True)
class Plan:
    """A whole deployment.

    name: of the recipe, such as "pd". title: a line about it.
    servers: in the order in which they may be started; any order works, since the router waits for them.
    router: takes the requests.
    checks: in the order in which to make them: first that each server is healthy, then a request that proves the rest.
    text: Markdown for whoever runs it: what moves where, what to expect, what does not work today.
    warnings: lines that a user should see at once.
    volumes: folders of the hosts that containers must see under the same path, such as that of a local model.
    image: the container image, for renderers that start containers.
    rdma: whether containers need the RDMA devices.
    """

    name: str
    title: str
    servers: tuple[Server, ...]
    router: Server
    checks: tuple[Check, ...]
    text: str
    warnings: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    image: str = ""
    rdma: bool = True

    @property
    def processes(self) -> tuple[Server, ...]:
        return (*self.servers, self.router)

    def of(self, role: Role) -> tuple[Server, ...]:
        """Servers of a role that take requests: one for each server, however many hosts it spans."""
        return tuple(server for server in self.servers if server.role == role and server.node == 0)


def url(host: str, port: int, scheme: str = "http") -> str:
    """scheme://host:port, with brackets around an IPv6 address."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
