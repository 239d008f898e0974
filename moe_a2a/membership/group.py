"""How a group comes to be, and how a process comes to it later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from moe_a2a.bootstrap import Bootstrap
from moe_a2a.errors import ConfigError, JoinRefused, MoeA2AError, StoreAway
from moe_a2a.hosts import own_label
from moe_a2a.membership.member import Member, MemberOptions
from moe_a2a.membership.store_process import start_store
from moe_a2a.membership.view import Endpoint, View
from moe_a2a.membership.wire import decode_json, encode_json

#: Of what the founders publish for those who join later.
_CHARTER = "charter"
_CHARTER_VERSION = 1
_MOST_CHARTER = 60_000
_PATIENCE_S = 3.0

T = TypeVar("T")


def found_group(
    bootstrap: Bootstrap,
    options: MemberOptions | None = None,
    max_ranks: int | None = None,
    channels: Sequence[str] = ("default",),
    charter: Mapping[str, Any] | None = None,
    on_change: Callable[[View], None] | None = None,
) -> Member:
    """Found a group of all ranks of `bootstrap`. Collective. Rank i gets slot i, and takes part from step 0.

    options: with store="" (or None) rank 0 starts a store for the group on its machine's loopback, and its watcher
    starts it again if it dies; ranks on several machines need a store that all of them reach.
    max_ranks: slots of the group for its whole life (None: as many as there are ranks now).
    charter: JSON values that everybody who joins later must have too (sizes, options).

    Raises ConfigError, on all ranks alike if they were given different things, StoreAway, RankLost.
    """
    slots = bootstrap.world_size if max_ranks is None else max_ranks
    said = {
        "version": _CHARTER_VERSION,
        "max_ranks": slots,
        "channels": list(channels),
        "charter": dict(charter or {}),
    }
    timeout_s = options.timeout_s if options is not None else 30.0
    url = options.store if options is not None else ""
    problem = ""
    starts = bootstrap.rank == 0 and not url
    if starts:
        try:
            url = start_store()
        except MoeA2AError as error:
            problem = str(error)
    host = own_label(options.host if options is not None else None)
    hello = {"said": said, "store": url, "started": starts, "problem": problem, "host": host}
    hellos = bootstrap.all_gather(hello, timeout_s)
    for rank, hello in enumerate(hellos):
        if hello["problem"]:
            raise ConfigError(f"rank {rank} could not start the store: {hello['problem']}")
        if hello["store"] not in ("", hellos[0]["store"]):
            raise ConfigError(
                f"store differs between ranks: rank 0 has {hellos[0]['store']}, rank {rank} has {hello['store']}; give "
                "every rank the same"
            )
        for field in said:
            if hello["said"][field] != hellos[0]["said"][field]:
                raise ConfigError(
                    f"{field} differs between ranks: rank 0 has {hellos[0]['said'][field]!r}, rank {rank} has "
                    f"{hello['said'][field]!r}; give every rank the same"
                )
    # All ranks of the host say that its watcher keeps the store, and so do those that join it there later.
    said["keeper"] = hellos[0]["host"] if hellos[0]["started"] else ""
    keep = said["keeper"] == host
    own = _with_store(options, hellos[0]["store"], keep)
    member: Member | None = None
    try:
        member = Member(own, on_change, bootstrap.rank)
        place = {"address": member.endpoint.address, "incarnation": member.incarnation, "host": member.host}
    except MoeA2AError as error:
        place = {"problem": str(error)}
    places = bootstrap.all_gather(place, timeout_s)
    failed = next((rank for rank, other in enumerate(places) if "problem" in other), None)
    if failed is not None or member is None:
        if member is not None:
            member.close()
        raise ConfigError(f"rank {failed} could not start: {places[failed or 0].get('problem')}")
    first = View.of([Endpoint(p["address"], p["incarnation"], p["host"]) for p in places], slots, channels)
    try:
        member.publish(_CHARTER, _encode_charter(said))  # by all: it has to outlive every one of them
        member.found(first)
        member.wait(lambda view: view.epoch >= 1)
        if not member.view.holds(member.rank, member.incarnation):
            raise ConfigError(
                f"the store {own.store} holds another group named {own.group!r}; give this one another name"
            )
        bootstrap.all_gather(True, timeout_s)
    except BaseException:
        member.close()
        raise
    return member


def join_group(
    options: MemberOptions,
    rank: int | None = None,
    charter: Mapping[str, Any] | None = None,
    on_change: Callable[[View], None] | None = None,
    prepare: Callable[[Member], None] | None = None,
) -> Member:
    """Take a slot of a group that exists: the given one, or the lowest that nobody holds. A member then activates it
    (`Member.activate`; `wait_active` here); until then the group goes on as if it was not there.

    charter: what this process was given. prepare: called with the member before it asks for the slot; its incarnation
    is known then, and its rank is not. A store that is away is waited for. Raises JoinRefused if the charter differs
    from the group's, or if the slot is taken; StoreAway.
    """
    member = Member(options, on_change)
    deadline = time.monotonic() + options.timeout_s
    try:
        said = _patient(lambda: member.lookup(_CHARTER), deadline)
        patience = time.monotonic() + min(_PATIENCE_S, options.timeout_s)
        while said is None and time.monotonic() < patience:  # the store may have lost it, and be given it again
            time.sleep(0.05)
            said = _patient(lambda: member.lookup(_CHARTER), deadline)
        if said is None:
            raise JoinRefused(f"the store {options.store} knows no group {options.group!r}")
        group = _decode_charter(said)
        _compare(group["charter"], dict(charter or {}))
        if group.get("keeper") == member.host:
            member.keep_store()
        if prepare is not None:
            prepare(member)
        slot, charter_bytes = -1 if rank is None else rank, said
        _patient(lambda: member._reserve(slot), deadline)
        _patient(lambda: member.publish(_CHARTER, charter_bytes), deadline)
    except BaseException:
        member.close()
        raise
    return member


def _patient(call: Callable[[], T], deadline: float) -> T:
    """Make a call of a member until the store answers. Requests may be made twice."""
    while True:
        try:
            return call()
        except StoreAway:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def _with_store(options: MemberOptions | None, url: str, keep: bool) -> MemberOptions:
    if options is None:
        return MemberOptions(url, keep_store=keep)
    return replace(options, store=url, keep_store=keep or options.keep_store)


def _encode_charter(said: Mapping[str, Any]) -> bytes:
    data = encode_json(said)
    if len(data) > _MOST_CHARTER:
        raise ConfigError(f"the charter takes {len(data)} bytes; allowed are {_MOST_CHARTER}")
    return data


def _decode_charter(data: bytes) -> dict[str, Any]:
    said = decode_json(data, _MOST_CHARTER, "a charter")
    if said.get("version") != _CHARTER_VERSION or not isinstance(said.get("charter"), dict):
        raise JoinRefused("the group runs another version of moe-a2a; install one version on all ranks")
    return said


def _compare(group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    own = json.loads(json.dumps(own))  # tuples are lists in JSON
    if group.get("format") != own.get("format"):
        raise JoinRefused("the group runs another version of moe-a2a; install one version on all ranks")
    for field in sorted({*group, *own}):
        if group.get(field) != own.get(field):
            raise JoinRefused(
                f"{field} differs: the group has {group.get(field)!r}, this process has {own.get(field)!r}; "
                "start it with the group's"
            )
