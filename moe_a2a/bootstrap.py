"""How ranks find each other before they share memory: one `all_gather` of small JSON messages.

A torch.distributed process group or any key-value store can stand behind it. Messages are JSON, never pickles.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from moe_a2a.errors import ConfigError, RankLost


class KeyValue(Protocol):
    """The part of a store that bootstrapping needs; torch.distributed's stores have it."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def wait(self, keys: Sequence[str], timeout: timedelta, /) -> None: ...


class Bootstrap(Protocol):
    """All-gather of JSON values, called in the same order by all ranks."""

    rank: int
    world_size: int
    identity: object  # equal for two bootstraps over the same ranks and the same group or store

    def all_gather(self, value: Any, timeout_s: float) -> list[Any]:
        """Return every rank's value, in rank order. Raises RankLost if a rank does not come."""
        ...


class GroupBootstrap:
    """Bootstrap over a torch.distributed process group. CUDA-only groups (NCCL) exchange through the current GPU."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not dist.is_initialized():
            raise ConfigError("no process group: call torch.distributed.init_process_group() first, or give store=")
        self.group = group if group is not None else cast(dist.ProcessGroup, dist.group.WORLD)
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        if self.rank < 0:
            raise ConfigError(
                "this process is not a member of the group; construct AllToAll on the group's members only"
            )
        self.identity: object = self.group
        backend = dist.get_backend(self.group)
        self.device = torch.device("cuda") if str(backend) == "nccl" else torch.device("cpu")

    def all_gather(self, value: Any, timeout_s: float) -> list[Any]:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        try:
            self._all_gather(sizes, torch.tensor([data.numel()], device=self.device), timeout_s)
            longest = max(int(s) for s in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
            padded[: data.numel()] = data
            parts = [torch.empty_like(padded) for _ in range(self.world_size)]
            self._all_gather(parts, padded, timeout_s)
        except RuntimeError as error:
            message = f"not every rank came to the meeting within {timeout_s:g} s, or the process group failed: {error}"
            raise RankLost(message, ()) from error
        return [json.loads(bytes(p[: int(s)].tolist())) for p, s in zip(parts, sizes, strict=True)]

    def _all_gather(self, parts: list[torch.Tensor], own: torch.Tensor, timeout_s: float) -> None:
        work = dist.all_gather(parts, own, group=self.group, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=timeout_s))


class StoreBootstrap:
    """Bootstrap over a key-value store, which may hold keys of earlier meetings, of this process or of ones long
    gone."""

    def __init__(self, store: KeyValue, rank: int, world_size: int) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank}, world_size={world_size}; rank must be 0 to world_size - 1")
        self.store, self.rank, self.world_size = store, rank, world_size
        self.identity: object = store
        self._session: str | None = None
        self._round = 0

    def all_gather(self, value: Any, timeout_s: float) -> list[Any]:
        if self._session is None:
            self._session = self._agree(timeout_s)
        self._round += 1
        return self._exchange(f"{self._session}/{self._round}", value, timeout_s)

    def _agree(self, timeout_s: float) -> str:
        """A prefix for the keys of this meeting alone.

        Every rank says a random word and repeats the words of all that it heard; once all repeat the same, nobody
        heard an old word, because an old answer cannot hold the words of now.
        """
        deadline = time.monotonic() + timeout_s
        word = secrets.token_hex(8)
        words = self._exchange("moe_a2a/word", word, timeout_s)
        while True:
            heard = self._exchange("moe_a2a/heard", words, timeout_s)
            others = [r for r, what in enumerate(heard) if what != words]
            if not others:
                return f"moe_a2a/{hashlib.sha256(' '.join(words).encode()).hexdigest()[:32]}"
            if time.monotonic() > deadline:
                raise RankLost(_absent(others[0], timeout_s, "the store holds its keys of an earlier meeting"), others)
            time.sleep(2e-3)
            words = self._exchange("moe_a2a/word", word, timeout_s)

    def _exchange(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        keys = [f"{name}/{r}" for r in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        values = []
        for r, key in enumerate(keys):
            try:
                self.store.wait([key], timedelta(seconds=timeout_s))
            except Exception as error:  # every store raises its own kind of time-out
                raise RankLost(_absent(r, timeout_s, str(error)), [r]) from error
            values.append(json.loads(self.store.get(key)))
        return values


def _absent(rank: int, timeout_s: float, why: str) -> str:
    return f"rank {rank} did not come to the meeting within {timeout_s:g} s: start it, or check the store ({why})"
