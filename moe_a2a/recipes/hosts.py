"""What users write for hosts, GPUs and RDMA devices, and the rules that hold between them."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from moe_a2a.recipes.plan import HostGpus, RecipeError

_PLACE = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]+)(?::(?P<first>[0-9]+)(?:-(?P<last>[0-9]+))?)?")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_DEVICE = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Group:
    """The hosts of one server, as given: `text` for messages, whether each place named its GPUs by number."""

    option: str
    text: str
    places: tuple[HostGpus, ...]
    numbered: tuple[bool, ...]

    @property
    def gpus(self) -> int:
        return sum(place.gpus for place in self.places)


def group(option: str, text: str, default_gpus: int) -> Group:
    """Read HOST[:GPUS][,HOST[:GPUS]...], the hosts of one server. Raises RecipeError.

    GPUS: a number (the first ones of the host) or a range such as 4-7; without it, `default_gpus`. An IPv6 address is
    in brackets.
    """
    places, numbered = [], []
    for part in text.split(","):
        found = _PLACE.fullmatch(part.strip())
        host = _host(found["host"]) if found is not None else None
        if found is None or host is None:
            raise RecipeError(
                f"{option} {text!r}: {part!r} is not HOST[:GPUS]; give a name or an address and a number or a range of "
                "GPUs, such as 192.0.2.10:8, 192.0.2.10:4-7 or [2001:db8::10]:8; with commas, the hosts of one server"
            )
        _check_reachable(option, text, host)
        if found["last"] is not None:
            first, last = int(found["first"]), int(found["last"])
            if last < first:
                raise RecipeError(f"{option} {text}: GPUs {first}-{last} end before they begin; give {last}-{first}")
            places.append(HostGpus(host, last - first + 1, first))
        else:
            gpus = int(found["first"]) if found["first"] is not None else default_gpus
            if gpus < 1:
                raise RecipeError(
                    f"{option} {text}: {host} has 0 GPUs; give how many, 1 or more, or a range: {host}:0-0 is GPU 0"
                )
            places.append(HostGpus(host, gpus))
        numbered.append(found["last"] is not None)
    return Group(option, text, tuple(places), tuple(numbered))


def check_groups(groups: Sequence[Group], gpus_per_node: int) -> None:
    """GPUs exist, no two servers share one, and hosts can reach each other. Raises RecipeError."""
    every_host = {place.host for one in groups for place in one.places}
    for one in groups:
        if len(every_host) > 1 and any(_is_loopback(place.host) for place in one.places):
            raise RecipeError(
                f"{one.option} {one.text}: a loopback address, which the other hosts cannot reach; give the host's "
                "address in their network"
            )
    for one in groups:
        for place in one.places:
            if place.last >= gpus_per_node:
                raise RecipeError(
                    f"{one.option} {one.text}: GPUs up to number {place.last} of {place.host}, but a node has "
                    f"{gpus_per_node}, numbers 0 to {gpus_per_node - 1}; give fewer, or --gpus-per-node"
                )
        hosts = [place.host for place in one.places]
        for host in hosts:
            if hosts.count(host) > 1:
                raise RecipeError(
                    f"{one.option} {one.text}: {host} is in one server twice; a server has one process a host, so name "
                    "each host once"
                )
        sizes = {place.gpus for place in one.places}
        if len(sizes) > 1:
            raise RecipeError(
                f"{one.option} {one.text}: hosts with {' and '.join(map(str, sorted(sizes)))} GPUs; a server has "
                "equally many on each of its hosts"
            )
    placed = [(one, place, named) for one in groups for place, named in zip(one.places, one.numbered, strict=True)]
    for (one, here, named), (other, there, also_named) in combinations(placed, 2):
        if here.host != there.host or here.last < there.first or there.last < here.first:
            continue
        given = f"{one.option} {one.text} and {other.option} {other.text}"
        if not (named and also_named):
            raise RecipeError(
                f"{given}: {here.host} is there twice, and GPUs would be shared; give another host, or say which GPUs "
                f"each has, such as {here.host}:0-3 and {here.host}:4-7"
            )
        first, last = max(here.first, there.first), min(here.last, there.last)
        shared = f"GPU {first} is" if first == last else f"GPUs {first} to {last} are"
        raise RecipeError(f"{given}: {shared} in both; a GPU belongs to one server")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def ib_devices(text: str, places: Iterable[HostGpus]) -> str | None:
    """The value of SGLang's --disaggregation-ib-device, or None for its own choice. Raises RecipeError.

    text: "auto", names with commas ("mlx5_0,mlx5_1"), a map from GPU to names as JSON ('{"0": "mlx5_0", ...}'), or a
        file with such a map. A map must have every GPU of `places`.
    """
    option = "--ib-devices"
    given = text.strip()
    if given.lower() == "auto":
        return None
    if given.endswith(".json"):
        try:
            given = Path(given).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise RecipeError(f"{option} {text}: cannot be read ({error.strerror}); give a file with a map") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{option} {text}: not JSON ({error}); give a file with a map") from error
        if not given.startswith("{"):
            raise RecipeError(f'{option} {text}: has no map in it, such as {{"0": "mlx5_0"}}; give a file with one')
    if not given.startswith("{"):
        _devices(option, text, given)
        return given
    try:
        content = json.loads(given, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise RecipeError(f'{option} {text}: not JSON ({error}); a map looks like {{"0": "mlx5_0"}}') from error
    for gpu, names in content:
        if not re.fullmatch(r"0|[1-9]\d*", gpu) or not isinstance(names, str):
            raise RecipeError(
                f'{option} {text}: {gpu!r}: {names!r} is not a GPU and its devices, such as "0": "mlx5_0"'
            )
        _devices(option, text, names)
    found = dict(content)
    if len(found) < len(content):
        twice = next(gpu for gpu, _ in content if sum(gpu == other for other, _ in content) > 1)
        raise RecipeError(f"{option} {text}: GPU {twice} is in the map twice; name all of its devices at once")
    needed = {gpu for place in places for gpu in range(place.first, place.last + 1)}
    missing = sorted(needed - {int(gpu) for gpu in found})
    if missing:
        raise RecipeError(
            f"{option} {text}: no devices for GPU {', '.join(map(str, missing))}; a map names those of every GPU that "
            "a server uses, by its number on the host"
        )
    return json.dumps(found)


def _devices(option: str, text: str, names: str) -> None:
    for name in names.split(","):
        if not _DEVICE.fullmatch(name.strip()):
            raise RecipeError(
                f"{option} {text}: {name!r} is not the name of a device; `ls /sys/class/infiniband` on the host has "
                "them"
            )


def check_host(option: str, text: str) -> str:
    """A host without GPUs, such as the router's, as `group` has it. Raises RecipeError."""
    host = _host(text)
    if host is None:
        raise RecipeError(f"{option} {text!r} is not a name or an address, such as 192.0.2.10 or [2001:db8::10]")
    _check_reachable(option, text, host)
    return host


def check_router(host: str, groups: Sequence[Group]) -> None:
    """A router on a loopback address is on the one host of all servers. Raises RecipeError."""
    if _is_loopback(host) and any(place.host != host for one in groups for place in one.places):
        raise RecipeError(
            f"--router {host}: a loopback address, and which host it is of does not show; give the host's address in "
            "the servers' network"
        )


def _host(text: str) -> str | None:
    """A host by its one spelling, so that equal hosts are equal words; None if it is no host.

    Names are in small letters, and IPv6 addresses short and without their brackets.
    """
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1])) if text.endswith("]") and "%" not in text else None
        except ValueError:
            return None
    name = text.lower()
    if re.fullmatch(r"[0-9.]+", name):  # no name, since resolvers take it for an address
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            return None
    return name if len(name) <= 253 and all(_LABEL.fullmatch(label) for label in name.split(".")) else None


def _check_reachable(option: str, text: str, host: str) -> None:
    """The address is one that others can ask. Raises RecipeError."""
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return
    if wildcard:
        raise RecipeError(
            f"{option} {text}: stands for all addresses of a host, and nobody can send there; give the one that the "
            "other hosts use"
        )
