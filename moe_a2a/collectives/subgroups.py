"""Subgroups of a group of ours: founded and joined through the membership store of the default group.

torch's store is often rank 0's, and goes with it. The membership store does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from moe_a2a.collectives.options import Options
from moe_a2a.errors import MessageError, MoeA2AError
from moe_a2a.membership.member import Member

_NAP_S = 0.01


class SubgroupStore:
    """What a process group asks of torch's store, answered by the membership store of the default group while this
    process belongs to that; by torch's store before.

    member_of: gives this process's member of the default group, None while it is alone. name: the subgroup's.
    """

    def __init__(self, member_of: Callable[[], Member | None], store: Any, name: str) -> None:
        self._member_of, self._store, self._name = member_of, store, name

    def set(self, key: str, value: str) -> None:
        member = self._member_of()
        if member is None:
            self._store.set(key, value)
        else:
            member.publish(self._key(key), value.encode())

    def get(self, key: str) -> bytes:
        member = self._member_of()
        if member is None:
            return bytes(self._store.get(key))
        found = member.lookup(self._key(key))
        if found is None:
            raise MessageError(f"{key} of subgroup {self._name} is not in the membership store")
        return found

    def check(self, keys: Sequence[str]) -> bool:
        member = self._member_of()
        if member is None:
            return bool(self._store.check(list(keys)))
        return all(member.lookup(self._key(key)) is not None for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta = timedelta(seconds=300)) -> None:
        """Raises MoeA2AError, or what torch's store raises."""
        member = self._member_of()
        if member is None:
            self._store.wait(list(keys), timeout)
            return
        deadline = time.monotonic() + timeout.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise MoeA2AError(
                    f"within {timeout.total_seconds():g} s nobody set {', '.join(keys)} of subgroup {self._name}"
                )
            time.sleep(_NAP_S)

    def _key(self, key: str) -> str:
        return f"subgroup/{self._name}/{key}"


def within(member_of: Callable[[], Member | None], store: Any, name: str, options: Options) -> tuple[Any, Options]:
    """Store and options of a subgroup of a group of ours, from torch's store and what the caller gave: it shares the
    default group's membership store, unless the caller named another one."""
    member = member_of()
    if member is not None and not options.store:
        options = replace(options, store=member.options.store)
    return SubgroupStore(member_of, store, name), options
