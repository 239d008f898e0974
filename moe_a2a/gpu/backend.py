"""Dispatch and combine of one GPU rank: the masked path's kernels on memory that the ranks of a host have mapped.

Calls launch kernels and return; none waits for the device but `check`, `missing` and `close`. What kernels find wrong
is copied to pinned host memory now and then, and raised by a later call.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch

from moe_a2a.backend import Health
from moe_a2a.bootstrap import Bootstrap
from moe_a2a.config import DEFAULT_SMS, Config, Options
from moe_a2a.errors import HandleError, InputError, RankLost
from moe_a2a.fp8 import FP8, ScaleFormat
from moe_a2a.gpu import inputs
from moe_a2a.gpu.budget import Budget
from moe_a2a.gpu.contiguous_state import ContiguousHandle
from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.gpu.layout import Layout as Places
from moe_a2a.gpu.rendezvous import find_device, meet
from moe_a2a.gpu.report import NO_BAD_INPUT, NOTHING
from moe_a2a.step import Phase
from moe_a2a.types import Dispatched, Handle, Layout, Masked

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
        from moe_a2a.gpu.grouped import GroupedRank  # needs Triton, which `meet` has looked for
        from moe_a2a.gpu.masked import MaskedRank
        from moe_a2a.gpu.rounds import contiguous_rank

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
            self.contiguous = contiguous_rank(self.rank, options.num_sms or DEFAULT_SMS)
            self.grouped = GroupedRank(self.contiguous, self.rank._processors)
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
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
        layout: Layout,
        like: Handle | None,
        alignment: int,
        out: torch.Tensor | None,
        host_counts: bool,
        by_source: bool,
    ) -> Dispatched:
        if layout != "masked":
            if host_counts and torch.cuda.is_current_stream_capturing():
                raise InputError("host_counts=True waits for counts, which a CUDA graph's capture cannot; leave it out")
            if out is not None:
                quantised = fp8 is not None or (isinstance(x, torch.Tensor) and x.dtype == FP8)
                most = self._layout.MOST if layout == "contiguous" else self.grouped.worst_case(alignment)
                # With host_counts, the rows that it needs are not known yet.
                rows = 0 if host_counts else most
                self.contiguous.check_out(out, FP8 if quantised else self.config.dtype, rows)
            handle = self._dispatch_send(x, topk_ids, topk_weights, scales, fp8, channel, layout, like, not host_counts)
            try:
                return self.dispatch_recv(handle, layout, alignment, out, host_counts)
            except InputError as error:  # out is too small for what arrived: the step is open, and not to be lost
                error.handle = handle
                raise
        ids = _masked_ids(topk_ids, like, host_counts)
        self._ready()
        with self._current():
            return self.rank.dispatch(
                x, ids, topk_weights, scales=scales, fp8=fp8, channel=channel, out=out, by_source=by_source
            )

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
        layout: Layout | None,
        like: Handle | None,
    ) -> Handle:
        return self._dispatch_send(x, topk_ids, topk_weights, scales, fp8, channel, layout, like, False)

    def _dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
        layout: Layout | None,
        like: Handle | None,
        whole: bool,
    ) -> Handle:
        handle: GpuHandle | ContiguousHandle
        self._ready()
        with self._current():
            if layout is None or layout == "masked":
                ids = _masked_ids(topk_ids, like, False)
                handle = self.rank.dispatch_send(x, ids, topk_weights, scales=scales, fp8=fp8, channel=channel)
            else:
                handle = self.contiguous.dispatch_send(
                    x, topk_ids, topk_weights, scales=scales, fp8=fp8, channel=channel, like=like, whole=whole
                )
                handle.layout = layout
        return handle

    def reserve(self, handle: Handle, by_source: bool, out: torch.Tensor | None) -> Masked:
        mine = self._own(handle)
        if isinstance(mine, ContiguousHandle):
            raise InputError(f"{mine!r} was sent for the {mine.layout} layout; outputs are reserved in the masked one")
        with self._current():
            return self.rank.reserve(mine, by_source=by_source, out=out)

    def dispatch_recv(
        self, handle: Handle, layout: Layout | None, alignment: int, out: torch.Tensor | None, host_counts: bool
    ) -> Dispatched:
        mine = self._own(handle)
        sent: Layout = "contiguous" if isinstance(mine, ContiguousHandle) else "masked"
        if layout is not None and (layout == "masked") != (sent == "masked"):
            raise InputError(f"layout={layout!r}, but the step was sent for {sent!r}; give dispatch_send the layout")
        with self._current():
            if isinstance(mine, ContiguousHandle):
                rank = self.grouped if (layout or mine.layout) == "grouped" else self.contiguous
                return rank.dispatch_recv(mine, alignment=alignment, host_counts=host_counts, out=out)
            _masked_ids(None, None, host_counts)
            return self.rank.dispatch_recv(mine, out=out)

    # combine

    def combine(
        self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        mine = self._own(handle)
        with self._current():
            if isinstance(mine, ContiguousHandle):
                result = self.contiguous.combine(self._rows(y, mine, topk_weights), mine, out=out)
            else:
                result = self.rank.combine(y, mine, topk_weights, out=out)
            self._ended(mine)
        return result if out is None else out

    def combine_send(self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None) -> None:
        mine, places = self._own(handle), self._layout
        if isinstance(mine, ContiguousHandle):
            with self._current():
                self.contiguous.combine_send(self._rows(y, mine, topk_weights), mine)
            return
        if topk_weights is not None and mine.phase is Phase.RECEIVED:  # nothing is sent if y is refused
            inputs.check_tensor("y", y, (places.E_L, places.CAP, places.H), (self.config.dtype,), self.device)
        with self._current():
            if topk_weights is not None:
                self.rank.weights_push(handle, topk_weights)
            self.rank.combine_send(y, handle)

    def combine_recv(self, handle: Handle, out: torch.Tensor | None) -> torch.Tensor:
        mine = self._own(handle)
        with self._current():
            rank = self.contiguous if isinstance(mine, ContiguousHandle) else self.rank
            result = rank.combine_recv(mine, out=out)
            self._ended(mine)
        return result if out is None else out

    def add_wait_times(self, handle: Handle, into: torch.Tensor) -> None:
        from moe_a2a.gpu.wait_times import add_wait_times

        self._own(handle)
        add_wait_times(self.rank, handle, into)

    def discard(self, handle: Handle) -> None:
        from moe_a2a.gpu.discard import discard_recv, discard_send

        self._health.check()
        with self._current():
            if self._layout.ROUNDS > 1 and isinstance(handle, ContiguousHandle) and handle.phase is Phase.SENT:
                self.contiguous.dispatch_recv(handle)  # ranks that receive it before they discard it need all rounds
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

    def poll(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return  # nothing has run since the call before
        self._ready()
        if time.monotonic() - self._copied > _REPORT_S:
            with self._current():
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

    def _rows(self, y: torch.Tensor, mine: ContiguousHandle, topk_weights: torch.Tensor | None) -> torch.Tensor:
        """What the experts of this rank have to say of each received token."""
        if topk_weights is not None:
            raise InputError(
                "GPU ranks combine contiguous rows that carry their weights, and grouped ones with the weights that "
                "were given at dispatch; leave topk_weights out"
            )
        return self.grouped.contiguous_rows(y, mine)

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


def _masked_ids(topk_ids: torch.Tensor | None, like: Handle | None, host_counts: bool) -> torch.Tensor:
    if like is not None or host_counts:
        raise InputError(
            "like= and host_counts= are for the layouts 'contiguous' and 'grouped'; 'masked' needs neither"
        )
    return cast(torch.Tensor, topk_ids)  # checked with the other arguments
