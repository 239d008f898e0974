"""`MooncakeBackendOptions` in all its forms, and the settings of a process that come before its groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from moe_a2a.errors import ConfigError

#: Slots that a group may have, as upstream.
MOST_SLOTS = 64
_FORMS = (
    "(max_group_size[, is_extension[, auto_deactivate_on_failure, auto_sync_on_failure]]) or "
    "(active_ranks[, is_extension[, max_group_size]])"
)
_FIELDS = ("is_extension", "max_group_size", "auto_deactivate_on_failure", "auto_sync_on_failure")


class MooncakeBackendOptions:
    """Given as `pg_options` to `init_process_group` and `new_group`. Two forms:

    `(max_group_size[, is_extension[, auto_deactivate_on_failure, auto_sync_on_failure]])`
    `(active_ranks[, is_extension[, max_group_size]])`

    max_group_size: slots of the group for its whole life, up to 64; 0 or less: as many as it has ranks at the start.
    is_extension: this process joins a group that exists: it starts alone, and takes part after `join_group`.
    active_ranks: int32 [max_group_size or more], contiguous, CPU or GPU. The group writes 1 into the places of the
        slots that take part, 0 into the others, in place. What it holds at first is ignored.
    auto_deactivate_on_failure, auto_sync_on_failure: (True, True), a failed operation waits for the view without the
        lost ranks before it completes; (True, False), it completes at once, and `sync_after_failure` waits;
        (False, False), ranks stay in the view until `deactivate_ranks`.

    Raises ConfigError, a ValueError, and TypeError for forms that there are not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _named(args, kwargs)
        self.active_ranks: torch.Tensor | None = given.get("active_ranks")
        self.max_group_size = _slots(given.get("max_group_size", 0))
        self.is_extension = _flag("is_extension", given.get("is_extension", False))
        self.auto_deactivate_on_failure = _flag(
            "auto_deactivate_on_failure", given.get("auto_deactivate_on_failure", True)
        )
        self.auto_sync_on_failure = _flag("auto_sync_on_failure", given.get("auto_sync_on_failure", True))
        check_mode(self.auto_deactivate_on_failure, self.auto_sync_on_failure)
        if self.active_ranks is not None:
            check_mirror(self.active_ranks, max(self.max_group_size, 1))

    @classmethod
    def default(cls) -> MooncakeBackendOptions:
        """Of a group without `pg_options`: a fixed size; MOONCAKE_PG_AUTO_DEACTIVATE_ON_FAILURE and
        MOONCAKE_PG_AUTO_SYNC_ON_FAILURE, if set, say how it takes failures."""
        return cls(
            0,
            False,
            _environment("MOONCAKE_PG_AUTO_DEACTIVATE_ON_FAILURE"),
            _environment("MOONCAKE_PG_AUTO_SYNC_ON_FAILURE"),
        )


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name: what the first one is decides the form."""
    tensor = isinstance(args[0], torch.Tensor) if args else "active_ranks" in kwargs
    if tensor:
        names: tuple[str, ...] = ("active_ranks", "is_extension", "max_group_size")
    else:
        names = ("max_group_size", "is_extension", "auto_deactivate_on_failure", "auto_sync_on_failure")
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys() or not kwargs.keys() <= {"active_ranks", *_FIELDS}:
        raise TypeError(f"MooncakeBackendOptions takes {_FORMS}; it was given {args!r}, {kwargs!r}")
    given.update(kwargs)
    if ("active_ranks" in given) is not tensor or not given.keys() & {"active_ranks", "max_group_size"}:
        raise TypeError(f"MooncakeBackendOptions takes {_FORMS}; it was given {args!r}, {kwargs!r}")
    if ("auto_deactivate_on_failure" in given) != ("auto_sync_on_failure" in given):
        raise TypeError("MooncakeBackendOptions takes auto_deactivate_on_failure and auto_sync_on_failure together")
    return given


def check_mode(deactivate: bool, sync: bool) -> None:
    if sync and not deactivate:
        raise ConfigError(
            "auto_sync_on_failure=True waits for the view without the lost ranks, and auto_deactivate_on_failure=False "
            "never makes one; give both as False, or auto_deactivate_on_failure=True"
        )


def check_mirror(mirror: torch.Tensor, slots: int) -> None:
    """Raises ConfigError if a tensor cannot be written as active_ranks of so many slots."""
    if not isinstance(mirror, torch.Tensor) or mirror.dtype != torch.int32 or not mirror.is_contiguous():
        what = f"{mirror.dtype}, strides {mirror.stride()}" if isinstance(mirror, torch.Tensor) else type(mirror)
        raise ConfigError(f"active_ranks is {what}; give a contiguous int32 tensor")
    if mirror.numel() < slots:
        raise ConfigError(f"active_ranks has {mirror.numel()} places for {slots} slots; give one for each slot")
    if mirror.device.type not in ("cpu", "cuda"):
        raise ConfigError(f"active_ranks is on {mirror.device}; give a tensor on the CPU or a CUDA GPU")


def _slots(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value > MOST_SLOTS:
        raise ConfigError(f"max_group_size={value!r}; give an int up to {MOST_SLOTS}")
    return max(value, 0)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}; give True or False")
    return value


def _environment(name: str) -> bool:
    value = os.environ.get(name, "1").strip().lower()
    if value not in ("", "0", "1", "on", "off", "true", "false", "yes", "no", "y", "n"):
        raise ConfigError(f"{name}={value!r}; set it to 1 or 0")
    return value in ("", "1", "on", "true", "yes", "y")


@dataclass
class Settings:
    """What `set_*` functions say for the groups that this process makes later. None: moe-a2a's own default.

    host_ip: address of this machine, as other machines reach it. engine: a `mooncake.engine.TransferEngine` to be used.
    """

    host_ip: str | None = None
    collective_timeout_s: float | None = None
    p2p_timeout_s: float | None = None
    reconciliation_window_s: float = 30.0
    device_filter: tuple[str, ...] = ()
    engine: Any = None


settings = Settings()
