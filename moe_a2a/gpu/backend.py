"""Dispatch and combine of one GPU rank: the masked path's kernels on memory that the ranks of a host have mapped.

Calls launch kernels and return; none waits for the device but `check`, `missing` and `close`. What kernels find wrong
is copied to pinned host memory now and then, and raised by a later call.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from moe_a2a.backend import Health
from moe_a2a.bootstrap import Bootstrap
from moe_a2a.config import Config, Options
from moe_a2a.errors import HandleError, InputError, RankLost
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu import inputs
from moe_a2a.gpu.budget import Budget
from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.gpu.layout import Layout as Places
from moe_a2a.gpu.rendezvous import find_device, meet
from moe_a2a.gpu.report import NO_BAD_INPUT, NOTHING
from moe_a2a.step import Phase
from moe_a2a.types import Handle, Layout, Masked

if TYPE_CHECKING:
    from moe_a2a.gpu.mask import Mask

#: How often reports are copied: every so many steps, and after so long. A copy costs a launch.
_REPORT_STEPS, _REPORT_S = 32, 0.05
_ALREADY = nullcontext()


class GpuBackend:
    """A `Backend` for the GPU ranks of one host. Construction is collective. Raises ConfigError, MoeA2AError, RankLost.

    device: CUDA, with or without an index.
    """

    def __init__(self, config: Config, options: Options, bootstrap: Bootstrap, device: torch.device) -> None:
        meeting = meet(config, options, bootstrap, device)
        self.config, self.options, self.device = config, options, find_device(device)
        self.resources, self.hosts = meeting.resources, meeting.hosts.ranks_of
        self.buffer_bytes = sum(region.nbytes for region in meeting.regions)
        self._health, self._peers, self._layout = Health(), meeting.peers, meeting.layout
        from moe_a2a.gpu.masked import MaskedRank  # needs Triton, which `meet` has looked for

        rank, world = bootstrap.rank, bootstrap.world_size
        with torch.cuda.device(self.device):
            self.rank = MaskedRank(
                config,
                meeting.layout,
                rank,
                [region.tensor(rank, 0, (region.nbytes,), torch.uint8) for region in meeting.regions],
                [[region.address(peer) for peer in range(world)] for region in meeting.regions],
                meeting.alive,
                torch.cuda.get_device_properties(self.device).multi_processor_count,
                options.timeout_s,
            )
            self._seen = torch.tensor(NOTHING, dtype=torch.int64).pin_memory()
            torch.cuda.synchronize()
        self._news = memoryview(self._seen.numpy().data)
        self._since, self._copied = 0, time.monotonic()
        self._budget = Budget(self.rank.control[Places.BUDGET_NS], options.timeout_s)
        self.rank.before_launch = self._budget.before_launch
        self._mask: Mask | None = None

    # dispatch

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
        layout: Layout,
        alignment: int,
        out: torch.Tensor | None,
        by_source: bool,
    ) -> Masked:
        _check_layout(layout)
        self._ready()
        with self._current():
            return self.rank.dispatch(
                x, topk_ids, topk_weights, scales=scales, fp8=fp8, channel=channel, out=out, by_source=by_source
            )

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
    ) -> Handle:
        self._ready()
        with self._current():
            return self.rank.dispatch_send(x, topk_ids, topk_weights, scales=scales, fp8=fp8, channel=channel)

    def reserve(self, handle: Handle, by_source: bool, out: torch.Tensor | None) -> Masked:
        self._health.check()
        with self._current():
            return self.rank.reserve(handle, by_source=by_source, out=out)

    def dispatch_recv(self, handle: Handle, layout: Layout, alignment: int, out: torch.Tensor | None) -> Masked:
        self._health.check()
        _check_layout(layout)
        with self._current():
            return self.rank.dispatch_recv(handle, out=out)

    # combine

    def combine(
        self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        self._health.check()
        with self._current():
            result = self.rank.combine(y, handle, topk_weights, out=out)
            self._ended(handle)
        return result if out is None else out

    def combine_send(self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None) -> None:
        mine, places = self._own(handle), self._layout
        if topk_weights is not None and mine.phase is Phase.RECEIVED:  # nothing is sent if y is refused
            inputs.check_tensor("y", y, (places.E_L, places.CAP, places.H), (self.config.dtype,), self.device)
        with self._current():
            if topk_weights is not None:
                self.rank.weights_push(handle, topk_weights)
            self.rank.combine_send(y, handle)

    def combine_recv(self, handle: Handle, out: torch.Tensor | None) -> torch.Tensor:
        self._health.check()
        with self._current():
            result = self.rank.combine_recv(handle, out=out)
            self._ended(handle)
        return result if out is None else out

    def add_wait_times(self, handle: Handle, into: torch.Tensor) -> None:
        from moe_a2a.gpu.wait_times import add_wait_times

        self._own(handle)
        add_wait_times(self.rank, handle, into)

    def discard(self, handle: Handle) -> None:
        from moe_a2a.gpu.discard import discard_recv, discard_send

        self._health.check()
        with self._current():
            discard_send(self.rank, handle)
            discard_recv(self.rank, handle)
            self._ended(handle)

    def tolerate_missing(self) -> Mask:
        """From now on ranks that are missing are left out of later steps, and no RankLost is raised."""
        from moe_a2a.gpu.mask import Mask

        self._mask = Mask(self.rank, self._peers)
        return self._mask

    # what went wrong

    def missing(self, handle: Handle) -> list[int]:
        self._health.check_open()
        torch.cuda.synchronize(self.device)
        with self._current():
            return self.rank.missing(handle)

    def check(self) -> None:
        self._health.check()
        torch.cuda.synchronize(self.device)
        self._raise_reports()
        self._copy_reports()

    def _ready(self) -> None:
        """Before a step begins: raise what is known to have gone wrong, without asking the device on the good path."""
        self._health.check()
        if self._peers.lost or self._news[0] != NO_BAD_INPUT or self._news[1] or self._news[2]:
            self._look()

    def _look(self) -> None:
        """Raise what is known to have gone wrong."""
        if self._mask is not None and self._news[0] == NO_BAD_INPUT and not self._news[2]:
            return  # ranks are missing, as they may be with a mask: kernels leave them out
        if torch.cuda.is_current_stream_capturing():
            return  # the device cannot be asked; the call after the capture raises it
        self._raise_reports()
        if self._mask is not None:
            return
        try:
            self._peers.check()
        except RankLost as error:
            self._break(error)
            raise

    def _raise_reports(self) -> None:
        """Raise what kernels of this device have found. Waits for the current stream."""
        self._news[0], self._news[1], self._news[2] = NOTHING
        try:
            with self._current():
                self.rank.check()
        except HandleError as error:
            self._health.broken = error
            raise
        except RankLost as error:
            if self._mask is not None:
                return
            # Ranks that missed another, and closed, are missing too: blame the origin.
            blamed = self._peers.blamed()
            origin = [rank for rank in error.ranks if rank in blamed]
            if origin:
                why = "; ".join(f"rank {rank} {blamed[rank]}" for rank in origin)
                error = RankLost(f"{error}: {why}", origin)
            self._break(error)
            raise error from None

    def _break(self, error: RankLost) -> None:
        self._health.broken = error
        self._peers.report(list(error.ranks))

    def _ended(self, handle: Handle) -> None:
        """A step's last launch is out."""
        self._budget.ended(handle)
        self._since += 1
        late = self._since >= _REPORT_STEPS or time.monotonic() - self._copied > _REPORT_S
        if (late or (self._peers.lost and self._mask is None)) and not torch.cuda.is_current_stream_capturing():
            self._copy_reports()

    def _copy_reports(self) -> None:
        self._seen.copy_(self.rank.report, non_blocking=True)
        self._since, self._copied = 0, time.monotonic()

    # helpers

    def _current(self) -> AbstractContextManager[object]:
        """Makes this rank's GPU the current one; usually it is, and this runs at every call."""
        index = self.device.index
        return _ALREADY if torch.cuda.current_device() == index else torch.cuda.device(index)

    def _own(self, handle: Handle) -> GpuHandle:
        self._health.check()
        if not isinstance(handle, GpuHandle):
            raise HandleError(f"handle is a {type(handle).__name__}; give the handle of a dispatch on this device")
        if handle._owner is not self.rank:
            raise HandleError("this handle belongs to another AllToAll; use it with the object that made it")
        return handle

    # life

    def close(self) -> None:
        self._health.closed = True


def _check_layout(layout: Layout) -> None:
    if layout != "masked":
        raise InputError(f"layout={layout!r} is served by CPU ranks (device='cpu'); GPU ranks have 'masked' so far")
