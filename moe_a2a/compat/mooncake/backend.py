"""The process group behind `mooncake.pg`: moe-a2a's, with Mooncake's options and a mirror of who takes part."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.collectives.admission import Admission, Proposal
from moe_a2a.collectives.options import OnFailure, Options
from moe_a2a.collectives.process_group import ProcessGroupMoeA2A
from moe_a2a.collectives.subgroups import within
from moe_a2a.collectives.work import CollectiveWork
from moe_a2a.compat.mooncake.mirror import Mirror
from moe_a2a.compat.mooncake.options import MOST_SLOTS, MooncakeBackendOptions, Settings, check_mirror, settings
from moe_a2a.errors import ConfigError

_groups: weakref.WeakSet[MooncakeBackend] = weakref.WeakSet()


class MooncakeBackend(ProcessGroupMoeA2A):
    """tensor: `active_ranks` of the options; mirror keeps it. Raises ConfigError, and as ProcessGroupMoeA2A."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta,
        options: Options,
        name: str,
        tensor: torch.Tensor | None,
    ) -> None:
        slots = options.slots or size
        if tensor is None:
            tensor = torch.zeros(slots, dtype=torch.int32)
        check_mirror(tensor, slots)
        mirror = Mirror(tensor, slots, options.on_failure)
        super().__init__(store, rank, size, timeout, options, name)
        self.mirror = mirror
        self._show()
        _groups.add(self)

    @property
    def admission(self) -> Admission:
        return self._admission

    @property
    def destroyed(self) -> bool:
        return self._closed

    def getBackendName(self) -> str:  # noqa: N802
        return "mooncake"

    def name(self) -> str:
        return "mooncake"

    def join(self, timeout_s: float | None = None) -> None:
        member = self.member
        if member is not None and member.refresh().holds(self.rank(), member.incarnation):
            return
        try:
            super().join(self._timeout_s if timeout_s is None else timeout_s)
        finally:  # it is alone if this raised
            self._show()

    def activate(self, ranks: Sequence[int]) -> Proposal:
        try:
            return super().activate(ranks)
        finally:
            self.mirror.refresh()

    def deactivate(self, ranks: Sequence[int]) -> Proposal:
        try:
            return super().deactivate(ranks)
        finally:
            self.mirror.refresh()

    def _show(self) -> None:
        if self.member is None:
            self.mirror.show_alone(self.rank())
        else:
            self.mirror.follow(self.member)

    def _work(self, name: object, result: list[torch.Tensor]) -> CollectiveWork:
        work = super()._work(name, result)
        # Whoever sees that it has ended finds the ranks that it lost out of the mirror.
        work.slots, work.before_end = self.slots, self.mirror.refresh
        return work


def make_cpu(torch_options: Any, options: MooncakeBackendOptions | None = None) -> MooncakeBackend:
    """What torch calls for backend `mooncake-cpu`."""
    if options is not None and not isinstance(options, MooncakeBackendOptions):
        raise ConfigError(
            f"pg_options is a {type(options).__name__}; mooncake-cpu takes MooncakeBackendOptions or None"
        )
    given = options if options is not None else MooncakeBackendOptions.default()
    rank, size = torch_options.group_rank, torch_options.group_size
    slots = given.max_group_size or size
    if not size <= slots <= MOST_SLOTS:
        raise ConfigError(
            f"max_group_size={slots} for {size} ranks; allowed is {size} to {MOST_SLOTS}; 0: as many as there are"
        )
    ours = to_options(given, slots, settings)
    store, ours = within_world(torch_options, ours)
    return MooncakeBackend(store, rank, size, torch_options.timeout, ours, torch_options.group_id, given.active_ranks)


def make_cuda(torch_options: Any, options: MooncakeBackendOptions | None = None) -> MooncakeBackend:
    """What torch calls for backend `mooncake`. Raises ConfigError."""
    raise ConfigError(
        "backend mooncake is for CUDA tensors, and moe-a2a's process groups take CPU tensors only so far: use backend "
        "mooncake-cpu for those, nccl for CUDA tensors, or Mooncake's own pg (do not call "
        "moe_a2a.compat.mooncake.install())"
    )


def to_options(given: MooncakeBackendOptions, slots: int, said: Settings) -> Options:
    mode: OnFailure = "reconcile" if given.auto_sync_on_failure else "deferred"
    if not given.auto_deactivate_on_failure:
        mode = "framework"
    return Options(
        slots=slots,
        joining=given.is_extension,
        on_failure=mode,
        raises=False,
        collective_timeout_s=said.collective_timeout_s,
        p2p_timeout_s=said.p2p_timeout_s,
        reconcile_s=said.reconciliation_window_s,
        host_address=said.host_ip,
        control_address=said.host_ip or "127.0.0.1",
        device_filter=",".join(said.device_filter),
        engine=said.engine,
    )


def within_world(torch_options: Any, options: Options) -> tuple[Any, Options]:
    """Where a group is founded: a subgroup of one of these groups in the membership store of that; the default group
    at MOE_A2A_STORE, or where rank 0 says in torch's store."""
    world = dist.group.WORLD if dist.is_initialized() else None
    if isinstance(world, ProcessGroupMoeA2A):
        found = world
        return within(lambda: found.member, torch_options.store, torch_options.group_id, options)
    group = os.environ.get("MOE_A2A_GROUP", "")
    name = f"{group}.{torch_options.group_id}" if group else ""
    return torch_options.store, replace(options, store=os.environ.get("MOE_A2A_STORE", ""), group=name)


def live_groups() -> int:
    """How many groups of this process have not been destroyed."""
    return sum(not group.destroyed for group in _groups)


__all__ = ["MooncakeBackend", "live_groups", "make_cpu", "make_cuda", "to_options", "within_world"]
