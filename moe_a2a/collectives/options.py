"""What a process group of the backend is given besides torch's own arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from moe_a2a.errors import ConfigError
from moe_a2a.membership.store import split_url

#: A rank says which ranks failed with a bit for each slot in one word.
MOST_SLOTS = 64
OnFailure = Literal["reconcile", "deferred", "framework"]
_SMALLEST_CHUNK, _LARGEST_CHUNK = 4096, 1 << 30


@dataclass(frozen=True)
class Options:
    """For `init_process_group("moe_a2a", pg_options=Options(...))` and `new_group`. Equal on all ranks, but for
    `joining`, `host` and the addresses. Raises ConfigError.

    slots: numbered places of the group for its whole life, up to 64; None: as many as there are ranks at the start.
        `init_process_group(world_size=...)` says how many ranks found the group; they get the first slots.
    joining: this process takes a slot of a group that exists. It starts alone: until `join()` its collectives involve
        nobody else. `rank` is the slot that it wants, `world_size` what `size()` says until then.
    on_failure: what an operation does that lost a rank.
        "reconcile": waits until the group's view is without that rank, and then fails; the next one runs among the
        survivors. "deferred": fails at once, as does every later one until `sync_after_failure()`. "framework": fails
        at once, as does every later one until somebody calls `deactivate()`.
    raises: `Work.wait()` of an operation that lost a rank raises RankLost; if False it returns False, and the caller
        has to ask `work.succeeded`.
    collective_timeout_s, p2p_timeout_s: seconds that an operation may wait for a rank before that is taken for lost;
        None: the group's timeout, as torch was given it.
    reconcile_s: seconds that a failed operation may wait for the new view, and join, activate, deactivate,
        sync_after_failure for theirs.
    store: address of the membership store, "tcp://..." or "etcd://..."; "": rank 0 starts one on its machine's
        loopback, and says where in torch's store.
    group: name of the group in the membership store; "": made up, and said in torch's store.
    host: label of this rank's host (None: found out, or MOE_A2A_HOST). Ranks of one host share memory.
    host_address: this machine's address for data of other hosts (None: found out, or MOE_A2A_HOST_ADDRESS).
    control_address: this machine's address for the watchers of other hosts.
    protocol, device_filter: of the Transfer Engine between hosts. engine: a `mooncake.engine.TransferEngine` to be used
        in place of one of our own; initialised with "P2PHANDSHAKE", and it has to outlive the group.
    chunk_bytes: bytes that an operation moves at a time. A rank's memory is 4 times as much, half a MiB for each slot,
        and between hosts as much again for each slot; what is not used is only addresses, unless RDMA pins it.
    """

    slots: int | None = None
    joining: bool = False
    on_failure: OnFailure = "reconcile"
    raises: bool = True
    collective_timeout_s: float | None = None
    p2p_timeout_s: float | None = None
    reconcile_s: float = 30.0
    store: str = ""
    group: str = ""
    host: str | None = None
    host_address: str | None = None
    control_address: str = "127.0.0.1"
    protocol: str = "tcp"
    device_filter: str = ""
    engine: Any = None
    chunk_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        if self.slots is not None and not 1 <= self.slots <= MOST_SLOTS:
            raise ConfigError(f"slots={self.slots}; allowed is 1 to {MOST_SLOTS}, or None for the ranks at the start")
        if self.on_failure not in get_args(OnFailure):
            raise ConfigError(f"on_failure={self.on_failure!r}; allowed: {', '.join(get_args(OnFailure))}")
        for name in ("collective_timeout_s", "p2p_timeout_s", "reconcile_s"):
            seconds = getattr(self, name)
            if not (seconds is None and name != "reconcile_s") and not seconds > 0:
                raise ConfigError(f"{name}={seconds!r}; give seconds above 0")
        if not _SMALLEST_CHUNK <= self.chunk_bytes <= _LARGEST_CHUNK or self.chunk_bytes % 4096:
            raise ConfigError(
                f"chunk_bytes={self.chunk_bytes}; allowed are multiples of 4096 from {_SMALLEST_CHUNK} to "
                f"{_LARGEST_CHUNK}"
            )
        if self.store:
            split_url(self.store)
