"""What a group agrees on (`Config`) and what each rank may choose for itself (`Options`)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_a2a.errors import ConfigError

#: Columns that share one FP8 scale (DeepSeek-V3's 1x128 tiles).
GROUP = 128

#: SMs of a GPU that a contiguous step uses, unless `Options.num_sms` says otherwise.
DEFAULT_SMS = 24

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
MAX_TOP_K = 32
MAX_EXPERTS = 1024


def _whole(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; give an int")
    if value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ConfigError(f"{name}={value}; allowed is {allowed}")
    return value


@dataclass(frozen=True)
class Config:
    """Sizes of one EP group. Equal on every rank; checked at construction and between ranks.

    num_experts: routed experts E of the whole group, 1 to 1024, divisible by the number of ranks.
    hidden_size: H, columns of a token's hidden state, a multiple of 128.
    top_k: K, experts per token, 1 to 32.
    max_tokens_per_rank: M, the most tokens one rank may bring to one dispatch. Buffers grow with it.
    dtype: payload of dispatch (unless FP8) and of combine: bfloat16, float16 or float32.
    channels: one name per micro-batch that may be in flight; each has its own buffers (two for two-batch overlap).

    Raises ConfigError.
    """

    num_experts: int
    hidden_size: int
    top_k: int
    max_tokens_per_rank: int
    dtype: torch.dtype = torch.bfloat16
    channels: tuple[str, ...] = ("default",)

    def __post_init__(self) -> None:
        _whole("num_experts", self.num_experts, 1, MAX_EXPERTS)
        _whole("hidden_size", self.hidden_size, GROUP)
        if self.hidden_size % GROUP:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of {GROUP}; pad the model's hidden size"
            )
        _whole("top_k", self.top_k, 1, MAX_TOP_K)
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} is more than num_experts={self.num_experts}; lower top_k")
        _whole("max_tokens_per_rank", self.max_tokens_per_rank, 1)
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype}; allowed are {', '.join(f'torch.{n}' for n in _DTYPES.values())}")
        channels = self.channels
        if (
            not isinstance(channels, (tuple, list))
            or not channels
            or not all(isinstance(c, str) and c for c in channels)
        ):
            raise ConfigError(
                f"channels={channels!r}; give a tuple of one or more non-empty names, such as ('default',)"
            )
        if len(set(channels)) != len(channels):
            raise ConfigError(f"channels={channels!r} names a channel twice; every name must differ")
        object.__setattr__(self, "channels", tuple(channels))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of `dtype`: the wire row of combine and the largest wire row of dispatch."""
        return self.hidden_size * self.dtype.itemsize

    @property
    def groups(self) -> int:
        """Columns groups that share one FP8 scale: H / 128."""
        return self.hidden_size // GROUP

    def local_experts(self, world_size: int) -> int:
        """E_l, experts per rank. Raises ConfigError if E does not divide by the number of ranks."""
        if self.num_experts % world_size:
            fits = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0 and n <= 2 * world_size]
            raise ConfigError(
                f"num_experts={self.num_experts} does not divide by {world_size} ranks; "
                f"use one of {fits} ranks, or add redundant experts"
            )
        return self.num_experts // world_size

    def as_json(self) -> dict[str, Any]:
        """Plain values, for comparison between ranks."""
        return {**asdict(self), "dtype": _DTYPES[self.dtype], "channels": list(self.channels)}


@dataclass(frozen=True)
class Options:
    """Knobs with defaults that are right. `host`, `host_address`, `device_filter` and `num_sms` may differ between
    ranks.

    timeout_s: seconds that a wait may last before the missing ranks are named (RankLost). Equal on every rank.
    host: label of this rank's host; ranks with one label map each other's memory. None: environment variable
        MOE_A2A_HOST if set, else found out from the machine's boot id and network namespace.
    protocol: how the Transfer Engine moves rows between hosts: "tcp", "rdma", or "efa" where the engine has it.
    device_filter: RDMA devices, comma separated ("mlx5_0,mlx5_1"); "" lets the engine choose.
    metadata_server: "P2PHANDSHAKE" needs no server; "etcd://...", "http://...", "redis://..." go to the engine as
        given.
    host_address: address or name under which other hosts reach this rank's engine. None: environment variable
        MOE_A2A_HOST_ADDRESS if set, 127.0.0.1 if all ranks are on one machine and in one network namespace, else this
        machine's own address.
    fp8_only: GPU ranks only, equal on every rank: dispatches carry FP8 rows and nothing else, in smaller buffers.
    recv_capacity: GPU ranks only, equal on every rank: rows that the buffers of a channel have room for, R or more.
        Contiguous and grouped steps then go in rounds of W = recv_capacity // R tokens of each rank, and masked ones
        take at most W. None: R * M rows, which is also what a larger number means, or as many as fit 8 GiB a channel.
    num_sms: GPU ranks only: the most SMs that dispatch and combine of the contiguous and grouped layouts take from the
        GEMMs beside them, 2 or more. None: 24.

    Raises ConfigError.
    """

    timeout_s: float = 30.0
    host: str | None = None
    protocol: str = "tcp"
    device_filter: str = ""
    metadata_server: str = "P2PHANDSHAKE"
    host_address: str | None = None
    fp8_only: bool = False
    num_sms: int | None = None
    recv_capacity: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.timeout_s, (int, float)) or not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            raise ConfigError(f"timeout_s={self.timeout_s!r}; give a finite number of seconds above 0")
        for name in ("protocol", "metadata_server"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r}; give a non-empty string")
        if not isinstance(self.fp8_only, bool):
            raise ConfigError(f"fp8_only={self.fp8_only!r}; give True or False")
        if self.num_sms is not None:
            _whole("num_sms", self.num_sms, 2)
        if self.recv_capacity is not None:
            _whole("recv_capacity", self.recv_capacity, 1)

    def as_json(self) -> dict[str, Any]:
        """The fields that must be equal on every rank."""
        equal = ("timeout_s", "protocol", "metadata_server", "fp8_only", "recv_capacity")
        return {name: getattr(self, name) for name in equal}
