"""Where a process group is agreed upon: the membership store, and the group's name there; and how founders meet."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_a2a.bootstrap import Bootstrap, StoreBootstrap
from moe_a2a.collectives.options import Options
from moe_a2a.errors import ConfigError, JoinRefused, MessageError
from moe_a2a.membership.member import Member, MemberOptions
from moe_a2a.membership.wire import decode_json, encode_json, text

#: What founders say in torch's store, for those who join.
_KEY = "moe_a2a/group"
_MOST = 1024
_NAP_S = 0.01


class MemberStore:
    """A key-value store (`bootstrap.KeyValue`) in the membership store of a group that exists: founders of its
    subgroups meet there, so that torch's store, which rank 0 often holds, is not needed any more."""

    def __init__(self, member: Member, name: str) -> None:
        self._member, self._name = member, name

    def set(self, key: str, value: str) -> None:
        self._member.publish(f"{self._name}/{key}", value.encode())

    def get(self, key: str) -> bytes:
        found = self._member.lookup(f"{self._name}/{key}")
        if found is None:
            raise MessageError(f"{key} is not in the store any more")
        return found

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        for key in keys:
            while self._member.lookup(f"{self._name}/{key}") is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody set {key}")
                time.sleep(_NAP_S)


class Address:
    """Of one process group.

    store: torch's, for this group alone. name: torch's name of the group. parent: the address of the default group if
    this is a subgroup of one of ours; then it has the same membership store, and needs torch's no more.

    Without a parent, Options.store and Options.group, or MOE_A2A_STORE and MOE_A2A_GROUP, come first. A process that
    takes the slot of a dead rank 0 needs them, or a rendezvous that outlived it (torchrun's): otherwise torch's store
    went with the rank, and nobody says where the group is.
    """

    def __init__(self, store: Any, name: str, options: Options, parent: Address | None = None) -> None:
        self._store, self._name, self._parent = store, _clean(name), parent
        self._url = options.store or os.environ.get("MOE_A2A_STORE", "")
        self._group = options.group or os.environ.get("MOE_A2A_GROUP", "")
        self._found: MemberOptions | None = None
        #: The member of this group, once there is one: founders of subgroups meet through it.
        self.member: Member | None = None

    def bootstrap(self, rank: int, size: int) -> Bootstrap:
        """For founders."""
        parent = self._parent.member if self._parent is not None else None
        if parent is not None:
            return StoreBootstrap(MemberStore(parent, f"found/{self._name}"), rank, size)
        return StoreBootstrap(self._store, rank, size)

    def settle(self, bootstrap: Bootstrap, timeout_s: float) -> MemberOptions:
        """What founders agree on: the store (empty: rank 0 is to start one) and the group's name. Collective."""
        known = self._inherited()
        if known is None:
            name = f"{self._group or secrets.token_hex(6)}.{self._name}"
            said = bootstrap.all_gather({"store": self._url, "group": name}, timeout_s)
            known = MemberOptions(said[0]["store"], said[0]["group"], timeout_s=timeout_s)
            if self._group and known.group != name:
                raise ConfigError(f"group differs between ranks: rank 0 has {known.group!r}, this one has {name!r}")
        return known

    def settled(self, member: Member) -> None:
        """Say where the group is, to those who join and to subgroups."""
        self.member, self._found = member, member.options
        said = encode_json({"store": member.options.store, "group": member.options.group})
        if self._inherited() is None:
            with contextlib.suppress(dist.DistError, RuntimeError):  # gone with rank 0: then nobody looks there
                self._store.set(_KEY, said.decode())

    def find(self, timeout_s: float) -> MemberOptions:
        """For those who join. Raises JoinRefused if nobody says where the group is."""
        if self._parent is not None:
            self._parent.find(timeout_s)
        known = self._found or self._inherited()
        if known is None and self._url and self._group:
            known = MemberOptions(self._url, f"{self._group}.{self._name}", timeout_s=timeout_s)
        if known is None:
            try:
                self._store.wait([_KEY], timedelta(seconds=timeout_s))
                said = decode_json(bytes(self._store.get(_KEY)), _MOST, "the address of a group")
            except (dist.DistError, RuntimeError) as error:
                reason = str(error).splitlines()[0][:200]
                raise JoinRefused(
                    f"torch's store does not say where the group is within {timeout_s:g} s ({reason}); give its "
                    "membership store and name as Options.store and Options.group, or MOE_A2A_STORE and MOE_A2A_GROUP, "
                    "to founders and joiners"
                ) from error
            known = MemberOptions(text(said, "store"), text(said, "group"), timeout_s=timeout_s)
        self._found = known
        return known

    def _inherited(self) -> MemberOptions | None:
        """Of a subgroup whose default group is known."""
        found = self._parent._found if self._parent is not None else None
        if found is None:
            return None
        base = found.group.rpartition(".")[0]
        return replace(found, group=f"{base}.{self._name}")


def _clean(name: str) -> str:
    """As the membership store takes names of groups."""
    return re.sub(r"[^0-9A-Za-z_-]", "_", name)[:60]
