"""Which ranks share a host, and who receives for whom between hosts. Pure functions over labels, but for
`own_label`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HostMap:
    """The ranks of every host. Hosts are ordered by their lowest rank, ranks ascend within a host.

    ranks_of: for each host, its ranks.
    host_of: [R], the host index of each rank.
    """

    ranks_of: tuple[tuple[int, ...], ...]
    host_of: tuple[int, ...]

    @classmethod
    def from_labels(cls, labels: Sequence[str]) -> HostMap:
        """Group ranks by equal label. labels: one a rank, in rank order."""
        index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        ranks_of = tuple(tuple(r for r, other in enumerate(labels) if other == label) for label in index)
        return cls(ranks_of, tuple(index[label] for label in labels))

    def peers(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's host, itself included."""
        return self.ranks_of[self.host_of[rank]]

    def rail(self, host: int, rank: int) -> int:
        """The rail peer of `rank` on `host`: the rank there that it sends to, `ranks_of[host][i mod their number]`,
        with i the position of `rank` on its own host (DeepEP's rail-aligned forwarding, made free of GPU counts)."""
        there = self.ranks_of[host]
        return there[self.peers(rank).index(rank) % len(there)]

    def sources_railed_to(self, rank: int) -> tuple[int, ...]:
        """The ranks of other hosts whose rail peer on this rank's host is this rank."""
        here = self.host_of[rank]
        return tuple(s for s, h in enumerate(self.host_of) if h != here and self.rail(here, s) == rank)

    def remote_ranks(self, host: int) -> tuple[int, ...]:
        """All ranks that are not on `host`, ascending."""
        return tuple(r for r, h in enumerate(self.host_of) if h != host)

    def remote_hosts(self, host: int) -> tuple[int, ...]:
        """All hosts but `host`, ascending."""
        return tuple(h for h in range(len(self.ranks_of)) if h != host)


def machine_id() -> str:
    """An id that two processes share exactly if they run on one booted machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        return f.read().strip()


def own_network() -> str:
    """An id that two processes share exactly if they run on one machine and see one loopback device."""
    return f"{machine_id()}/{os.stat('/proc/self/ns/net').st_ino}"


def own_label(override: str | None) -> str:
    """This rank's host label: `override`, else $MOE_A2A_HOST, else boot id and network namespace.

    The network namespace takes part because memory is handed over through abstract Unix sockets, which end there.
    """
    if override is None:
        override = os.environ.get("MOE_A2A_HOST")
    if override:
        return override
    return own_network()
