"""Which ports a deployment uses, on which host, and that none is used twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_a2a.recipes.plan import RecipeError, Role, Server

#: First port of each kind; further servers of a host count up, unless a flag says otherwise.
HTTP: dict[Role, int] = {"prefill": 30000, "decode": 30100, "encode": 30200}
ROUTER = 8000
BOOTSTRAP = 8998
ENCODER_BOOTSTRAP = 8900
RENDEZVOUS = 20000

#: SGLang 0.5.17 to 0.5.23 (`PortArgs.init_new`): with data-parallel attention, a server without --dist-init-addr meets
#: on its HTTP port plus this, and its processes talk on the next six ports.
_RENDEZVOUS_OFFSET = 233
_DERIVED = 6
_HIGHEST = 65535


def given(option: str, values: Sequence[int], count: int) -> list[int | None]:
    """What --OPTION says for each of `count` servers: nothing, one value for all, or one each. Raises RecipeError."""
    for value in values:
        if not 1024 <= value <= _HIGHEST:
            raise RecipeError(f"{option} {value}: give a port from 1024 to {_HIGHEST}")
    if not values:
        return [None] * count
    if len(values) not in (1, count):
        raise RecipeError(
            f"{option} is given {len(values)} times for {count} servers; give it once, or once for each of them"
        )
    return [*values] * (count if len(values) == 1 else 1)


def internal(http: int, rendezvous: int | None) -> dict[str, int]:
    """Ports of a server with data-parallel attention, beside those that its flags name.

    rendezvous: the port of --dist-init-addr, if it is given.
    """
    if rendezvous is None:
        below = http + _RENDEZVOUS_OFFSET > _HIGHEST
        rendezvous = http - _RENDEZVOUS_OFFSET if below else http + _RENDEZVOUS_OFFSET
    base = rendezvous + 1 if rendezvous + _DERIVED <= _HIGHEST else rendezvous - _DERIVED - 1
    return {"rendezvous": rendezvous, **{f"internal {i}": base + i for i in range(_DERIVED)}}


_OPTIONS = {"bootstrap": "--bootstrap-port", "encoder bootstrap": "--encoder-bootstrap-port"}


def _option(server: Server, what: str) -> str:
    if what == "http":
        return "--port" if server.role == "router" else f"--{server.role}-port"
    return _OPTIONS.get(what, "")


def check(servers: Iterable[Server]) -> None:
    """No port of a host has two uses. Raises RecipeError."""
    taken: dict[tuple[str, int], tuple[Server, str]] = {}
    for server in servers:
        for what, port in server.ports.items():
            if port > _HIGHEST:
                raise RecipeError(f"{_option(server, what)} {port} of {server.name}: ports end at {_HIGHEST}")
            other = taken.setdefault((server.host, port), (server, what))
            if other != (server, what):
                raise RecipeError(_clash(server, what, *other, port))


def _clash(server: Server, what: str, other: Server, others: str, port: int) -> str:
    options = dict.fromkeys(name for name in (_option(server, what), _option(other, others)) if name)
    named = " and ".join(f"{name} {port}" for name in options) or f"port {port}"
    if what == others == "bootstrap":
        rule = (
            "two prefill servers of one host need two bootstrap ports; leave the option out, or give it once for each "
            "prefill server"
        )
    else:
        rule = "a port of a host has one use; leave the option out, or give ports further apart"
    return f"{named}: {other.name} ({others}) and {server.name} ({what}) of {server.host} would share it; {rule}"
