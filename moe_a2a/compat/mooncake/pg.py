"""`mooncake.pg` on moe-a2a's process groups: the same names, for CPU tensors (docs/mooncake.md).

Importing it registers the torch backends `mooncake-cpu` and `mooncake`. The latter is for CUDA tensors, and refuses to
be made: there are no groups for those yet.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.collectives.admission import Outcome, Proposal
from moe_a2a.collectives.work import CollectiveWork
from moe_a2a.compat.mooncake.backend import MooncakeBackend, live_groups, make_cpu, make_cuda
from moe_a2a.compat.mooncake.options import MooncakeBackendOptions, settings
from moe_a2a.errors import ConfigError, InputError, MoeA2AError

__all__ = [
    "MooncakeBackendOptions",
    "ProposalStatus",
    "ProposeViewUpdateResponse",
    "SyncAfterFailureResponse",
    "SyncAfterFailureStatus",
    "ViewUpdateStatus",
    "activate_ranks",
    "createMooncakeBackend",
    "createMooncakeCpuBackend",
    "deactivate_ranks",
    "extend_group_size_to",
    "get_active_ranks",
    "get_current_epoch",
    "get_failed_ranks_hint",
    "get_local_success",
    "get_num_synced_ranks",
    "get_peer_state",
    "join_group",
    "recover_ranks",
    "set_collective_timeout_us",
    "set_device_filter",
    "set_fault_reconciliation_window_us",
    "set_host_ip",
    "set_p2p_timeout_us",
    "set_transfer_engine",
    "sync_after_failure",
]


class _Status(enum.Enum):
    """Members are true whatever their number, and turn into it, as those of pybind11's enums."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class ProposalStatus(_Status):
    Rejected = 0
    Applied = 1
    AppliedWithDroppedRanks = 2


ViewUpdateStatus = ProposalStatus


class SyncAfterFailureStatus(_Status):
    Reconciled = 0
    NoPending = 1
    Rejected = 2


@dataclass(frozen=True)
class ProposeViewUpdateResponse:
    """What became of `activate_ranks` or `deactivate_ranks`. new_epoch: of the view that has the change; if it was
    rejected, of the newest. dropped_ranks: slots whose process was lost before it could be activated."""

    status: ProposalStatus
    new_epoch: int
    dropped_ranks: list[int]
    reject_reason: str


@dataclass(frozen=True)
class SyncAfterFailureResponse:
    status: SyncAfterFailureStatus
    reject_reason: str


# who takes part


def get_active_ranks(backend: dist.ProcessGroup) -> torch.Tensor:
    """int32 [max_group_size or more]: the tensor of the options, or one of the group's own. The group goes on writing
    to it."""
    group = _group(backend)
    group.mirror.refresh()
    return group.mirror.tensor


def get_current_epoch(backend: dist.ProcessGroup) -> int:
    """Number of the group's view; grows with every change. 0 until this process has joined."""
    return _group(backend).epoch


def get_num_synced_ranks(backend: dist.ProcessGroup) -> int:
    """How many slots have a live process that takes part, or is ready to. Asks nobody."""
    return _group(backend).admission.held()


def get_peer_state(backend: dist.ProcessGroup, ranks: Sequence[int]) -> list[bool]:
    """For each slot, whether a process is ready there to be activated, or takes part already and lives. Asks nobody."""
    return _group(backend).peer_ready(_slots(ranks))


def join_group(backend: dist.ProcessGroup) -> None:
    """Come to the group: wait for this process's own earlier operations, take the slot, and wait until a member has
    activated it, as long as the group's `timeout`. A process that takes part already stays as it is.

    Raises JoinRefused, StoreAway, MoeA2AError; then it may be called again.
    """
    _group(backend).join()


def activate_ranks(backend: dist.ProcessGroup, ranks: Sequence[int]) -> ProposeViewUpdateResponse:
    """Let processes that have called `join_group` take part. From any one member; the others may call it too. Waits for
    those that are not ready, as long as `set_fault_reconciliation_window_us` says."""
    return _response(_group(backend).activate(_slots(ranks)))


recover_ranks = activate_ranks


def deactivate_ranks(backend: dist.ProcessGroup, ranks: Sequence[int]) -> ProposeViewUpdateResponse:
    """Take slots out of the group, those whose rank failed too. No member has them when this returns."""
    return _response(_group(backend).deactivate(_slots(ranks)))


def extend_group_size_to(backend: dist.ProcessGroup, size: int) -> None:
    """Activate the slots below `size` that are ready. (Upstream's does nothing any more: the view has the size.)"""
    warnings.warn("extend_group_size_to is deprecated; use activate_ranks", DeprecationWarning, stacklevel=2)
    group = _group(backend)
    slots = [slot for slot in range(size) if slot < group.slots]
    ready = [slot for slot, state in zip(slots, group.peer_ready(slots), strict=True) if state]
    if ready:
        group.activate(ready)


# failures


def get_local_success(work: dist.Work) -> bool:
    """Whether an operation has ended and is right on this rank. Ask after `wait()`."""
    return _work(work).succeeded


def get_failed_ranks_hint(work: dist.Work) -> torch.Tensor:
    """int32 [max_group_size], 1 for slots because of which an operation failed here: evidence, and no verdict."""
    ours = _work(work)
    hint = torch.zeros(ours.slots, dtype=torch.int32)
    hint[list(ours.failed_ranks)] = 1
    return hint


def sync_after_failure(backend: dist.ProcessGroup) -> SyncAfterFailureResponse:
    """Wait until the view is without the ranks that operations here have lost, and go by it from now on."""
    group = _group(backend)
    if not group.failure_pending:
        group.mirror.acknowledge()
        return SyncAfterFailureResponse(SyncAfterFailureStatus.NoPending, "")
    if group.options.on_failure == "framework":
        reason = "auto_deactivate_on_failure=False: lost ranks stay in the view until deactivate_ranks"
        return SyncAfterFailureResponse(SyncAfterFailureStatus.Rejected, reason)
    try:
        group.sync_after_failure()
    except MoeA2AError as error:
        return SyncAfterFailureResponse(SyncAfterFailureStatus.Rejected, str(error))
    group.mirror.acknowledge()
    return SyncAfterFailureResponse(SyncAfterFailureStatus.Reconciled, "")


# before init_process_group


def set_host_ip(host: str) -> None:
    """This machine's address, as other machines reach it: for data, and for the watchers' messages."""
    _before("set_host_ip")
    if not isinstance(host, str) or not host:
        raise ConfigError(f"host={host!r}; give an address of this machine")
    settings.host_ip = host


def set_collective_timeout_us(us: int) -> None:
    """How long a collective waits for a rank before that is taken for lost."""
    settings.collective_timeout_s = _seconds("set_collective_timeout_us", us)


def set_p2p_timeout_us(us: int) -> None:
    """How long a send or receive waits for its peer before that is taken for lost."""
    settings.p2p_timeout_s = _seconds("set_p2p_timeout_us", us)


def set_fault_reconciliation_window_us(us: int) -> None:
    """How long a failed operation waits for the view without the lost ranks, and `activate_ranks` for processes."""
    settings.reconciliation_window_s = _seconds("set_fault_reconciliation_window_us", us)


def set_device_filter(filters: Iterable[str]) -> None:
    """Names of the RDMA devices to be used between hosts; none: all."""
    _before("set_device_filter")
    names = [filters] if isinstance(filters, str) else list(filters)
    if not all(isinstance(name, str) and name and "," not in name for name in names):
        raise ConfigError(f"filters={names!r}; give names of devices")
    settings.device_filter = tuple(names)


def set_transfer_engine(engine: Any) -> None:
    """Use this `mooncake.engine.TransferEngine`, initialised with "P2PHANDSHAKE", between hosts; None: one of our own.
    It has to outlive the groups."""
    _before("set_transfer_engine")
    if engine is not None and not callable(getattr(engine, "get_rpc_port", None)):
        raise ConfigError(f"engine is a {type(engine).__name__}; give an initialised mooncake.engine.TransferEngine")
    settings.engine = engine


# torch's side

createMooncakeCpuBackend = make_cpu  # noqa: N816
createMooncakeBackend = make_cuda  # noqa: N816
dist.Backend.register_backend("mooncake-cpu", make_cpu, extended_api=True, devices=["cpu"])
dist.Backend.register_backend("mooncake", make_cuda, extended_api=True, devices=["cuda"])


# within


def _group(backend: dist.ProcessGroup | None) -> MooncakeBackend:
    group = backend if backend is not None else dist.group.WORLD
    if not isinstance(group, MooncakeBackend):
        raise InputError(
            f"{type(group).__name__} is no process group of the backend mooncake-cpu; give one that "
            'init_process_group("mooncake-cpu") or new_group(backend="mooncake-cpu") made'
        )
    return group


def _work(work: dist.Work) -> CollectiveWork:
    if not isinstance(work, CollectiveWork) or not work.slots:
        raise InputError(f"{type(work).__name__} is no operation of a mooncake-cpu group; use async_op=True")
    return work


def _slots(ranks: Sequence[int]) -> list[int]:
    found = ranks.tolist() if isinstance(ranks, torch.Tensor) else list(ranks)
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in found):
        raise InputError(f"ranks={ranks!r}; give a list of slots of the group")
    return found


def _response(proposal: Proposal) -> ProposeViewUpdateResponse:
    status = {
        Outcome.REJECTED: ProposalStatus.Rejected,
        Outcome.APPLIED: ProposalStatus.Applied,
        Outcome.DROPPED: ProposalStatus.AppliedWithDroppedRanks,
    }[proposal.outcome]
    return ProposeViewUpdateResponse(status, proposal.epoch, list(proposal.dropped), proposal.reason)


def _seconds(name: str, us: Any) -> float:
    _before(name)
    if isinstance(us, bool) or not isinstance(us, int) or us <= 0:
        raise ConfigError(f"{name}({us!r}); give microseconds above 0")
    return us / 1e6


def _before(name: str) -> None:
    if live_groups():
        raise ConfigError(f"{name} comes before init_process_group; this process has {live_groups()} groups already")
