"""The masked path of one GPU rank: its buffers, and the launches of dispatch and combine. Nothing here synchronises."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from moe_a2a.config import Config
from moe_a2a.errors import HandleError, InputError, NotFinite, RankLost
from moe_a2a.fp8 import FP8, ScaleFormat
from moe_a2a.gpu import inputs
from moe_a2a.gpu.handle import Channel, GpuHandle, Slot, Turns
from moe_a2a.gpu.layout import SLOTS, Layout
from moe_a2a.gpu.outputs import Outputs
from moe_a2a.gpu.report import NO_BAD_INPUT, NOTHING, describe_bad_input, describe_misuse, is_value, ranks_of
from moe_a2a.kernels.combine import combine
from moe_a2a.kernels.combine_recv import combine_recv
from moe_a2a.kernels.combine_send import combine_send
from moe_a2a.kernels.dispatch import dispatch
from moe_a2a.kernels.dispatch_recv import dispatch_recv
from moe_a2a.kernels.dispatch_send import dispatch_send
from moe_a2a.kernels.formats import header_bits
from moe_a2a.kernels.weights_push import weights_push
from moe_a2a.step import Phase
from moe_a2a.types import Handle, Masked

_NEVER = 1 << 62


class MaskedRank:
    """One rank's masked dispatch and combine. `regions[channel]`: uint8 [region_bytes], zeros before any rank's first
    step; `addresses[channel]`: where this rank's device finds every rank's region.

    alive: int64 [HOST_WORDS] in host memory that the device maps (see `Layout`). processors: SMs of the device (any
    number in the interpreter). timeout_s: budget of every wait.

    Calls are made while the rank's device is the current one.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        rank: int,
        regions: Sequence[torch.Tensor],
        addresses: Sequence[Sequence[int]],
        alive: torch.Tensor,
        processors: int,
        timeout_s: float,
    ) -> None:
        self.config, self.layout, self.rank = config, layout, rank
        self.device = regions[0].device
        self._alive, self._processors = alive, processors
        self._outputs = Outputs(layout, config.dtype, self.device)
        words = [0] * layout.CONTROL_WORDS
        words[layout.EPOCH], words[layout.INCARNATION] = 1, 1
        words[layout.MASK], words[layout.NEXT_STEP] = (1 << layout.R) - 1, _NEVER
        words[layout.BUDGET_NS] = int(timeout_s * 1e9)
        #: Called before the launches that other ranks wait for, with what tells their compiled kernels apart.
        self.before_launch: Callable[[GpuHandle, Hashable], None] = lambda handle, kind: None
        self.control = self._words(words)
        self.report = self._words(list(NOTHING))
        self._largest_weight = torch.finfo(config.dtype).max
        self._channels = [
            Channel(
                region,
                self._words(list(peers)),
                self._words([0] * layout.LIVE_WORDS),
                [Slot.empty(layout, self.device) for _ in range(SLOTS)],
            )
            for region, peers in zip(regions, addresses, strict=True)
        ]

    def _words(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    # dispatch

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
    ) -> GpuHandle:
        """Launch the sending half of a step. Arguments as `AllToAll.dispatch_send`, on this rank's device; they must
        stay unchanged until the launch has run. Wrong ids are reported by `check`. Raises InputError, HandleError."""
        brought, mode, handle, state = self._begin(
            x, topk_ids, topk_weights, scales, fp8, channel, self._is_capturing(), None
        )
        dispatch_send(
            self.layout,
            self.rank,
            *brought,
            mode,
            largest_weight=self._largest_weight,
            peers=state.peers,
            control=self.control,
            live=state.live,
            handle=handle.slot.handle,
            hits=handle.slot.hits,
            report=self.report,
        )
        return handle

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        out: torch.Tensor | None = None,
        by_source: bool = False,
    ) -> Masked:
        """`dispatch_send` and `dispatch_recv`, in one launch unless a graph is captured. by_source: see `reserve`. Not
        for virtual ranks. Raises InputError, HandleError, before anything is sent."""
        if out is not None:
            out = self._outputs.check_rows(out, fp8 is not None or (isinstance(x, torch.Tensor) and x.dtype == FP8))
        if self._is_capturing():  # two launches are quicker there: see kernels/dispatch.py
            sent = self.dispatch_send(x, topk_ids, topk_weights, scales=scales, fp8=fp8, channel=channel)
            self.reserve(sent, by_source=by_source, out=out)
            return self.dispatch_recv(sent)
        brought, mode, handle, state = self._begin(x, topk_ids, topk_weights, scales, fp8, channel, False, by_source)
        got = self._outputs.masked(state, handle, out, by_source)
        dispatch(
            self.layout,
            self.rank,
            *brought,
            mode,
            got.x,
            got.scales,
            got.counts,
            got.source,
            got.ranges,
            largest_weight=self._largest_weight,
            peers=state.peers,
            hits=handle.slot.hits,
            places=handle.slot.places,
            **self._waiting(handle, state),
        )
        handle.phase = Phase.RECEIVED
        return got

    def _begin(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
        captured: bool,
        origins: bool | None,
    ) -> tuple[inputs.Brought, int, GpuHandle, Channel]:
        """Open a step. origins: `by_source` of a dispatch in one launch; None: in two launches.

        Returns (what it brings, how rows are sent, its handle, its channel).
        """
        brought, mode, fp8 = inputs.check_brought(
            self.config, self.layout, self.device, x, topk_ids, topk_weights, scales, fp8
        )
        rows, ids, weights, _ = brought
        self._check_device()
        state = self._channels[self._index(channel)]
        turns = state.captured if captured else state.eager
        self._check_free(turns)
        turns.calls += 1
        # A graph's steps may run while one of this channel is open outside of it, so they share none of its memory. The
        # graph's pool uses theirs again once the handle is gone.
        slot = Slot.empty(self.layout, self.device, True) if captured else state.slots[turns.calls % SLOTS]
        bits = header_bits(mode, weights is not None)
        name = channel or self.config.channels[0]
        handle = GpuHandle(self, name, turns, captured, slot, rows.shape[0], bits, fp8, weights is not None)
        turns.open.append(handle)
        self.before_launch(handle, (mode, fp8, ids.dtype, weights is not None, origins))
        return brought, mode, handle, state

    def reserve(self, handle: Handle, *, by_source: bool = False, out: torch.Tensor | None = None) -> Masked:
        """The tensors that `dispatch_recv` of this step will fill: see `AllToAll.reserve`. Launches nothing. Raises
        InputError, HandleError."""
        mine, state = self._step(handle, Phase.SENT)
        if out is not None:
            out = self._outputs.check_rows(out, mine._fp8 is not None)
        mine._reserved = self._outputs.masked(state, mine, out, by_source)
        return mine._reserved

    def dispatch_recv(self, handle: Handle, *, out: torch.Tensor | None = None) -> Masked:
        """Launch the receiving half. out: storage for x, [E_l, R*M, H]. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.SENT)
        got = mine._reserved
        if got is None:
            if out is not None:
                out = self._outputs.check_rows(out, mine._fp8 is not None)
            got = self._outputs.masked(state, mine, out, False)
        else:
            mine._reserved = None  # the result holds its handle: not a circle that keeps both alive
        if mine.wait_times is not None:
            self._watch(mine, self.layout.DISPATCH)
        dispatch_recv(
            self.layout,
            got.x,
            got.scales,
            got.counts,
            got.source,
            got.ranges,
            mine.bits,
            places=mine.slot.places,
            **self._waiting(mine, state),
        )
        mine.phase = Phase.RECEIVED
        return got

    # combine

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`weights_push` if there are weights, and `combine_send` and `combine_recv` in one launch. Not for virtual
        ranks. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.RECEIVED)
        rows, result = self._outputs.check_experts(y), self._outputs.sums(mine.tokens, out)
        if topk_weights is not None:
            self.weights_push(mine, topk_weights)
        self._check_weighted(mine)
        if mine.wait_times is not None:  # in one launch there is no place for another in front of each wait
            self.combine_send(y, mine)
            return self.combine_recv(mine, out=result)
        self.before_launch(mine, ("combine", mine.has_weights))
        combine(
            self.layout,
            self.rank,
            rows,
            not mine.has_weights,
            result,
            peers=state.peers,
            hits=mine.slot.hits,
            places=mine.slot.places,
            **self._waiting(mine, state),
        )
        mine.phase = Phase.DONE
        mine.turns.open.remove(mine)
        return result

    def weights_push(self, handle: Handle, topk_weights: torch.Tensor) -> None:
        """Launch the hop that brings weights to the tokens' ranks, if they did not go with the dispatch. All ranks push
        before any rank's `combine_send` can end. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.RECEIVED)
        if mine.has_weights:
            raise InputError("topk_weights were given at dispatch; give them once, there or here")
        weights = inputs.check_weights(self.config, topk_weights, mine.tokens, self.device)
        self.before_launch(mine, "weights")
        weights_push(
            self.layout,
            self.rank,
            weights,
            peers=state.peers,
            live=state.live,
            handle=mine.slot.handle,
            hits=mine.slot.hits,
            report=self.report,
            largest_weight=self._largest_weight,
        )
        mine.pushed = True

    def combine_send(self, y: torch.Tensor, handle: Handle) -> None:
        """Launch the reduction of the experts' outputs and the way back. y: [E_l, R*M, H] of config.dtype. Raises
        InputError, HandleError."""
        mine, state = self._step(handle, Phase.RECEIVED)
        rows = self._outputs.check_experts(y)
        self._check_weighted(mine)
        if mine.wait_times is not None and mine.pushed:
            self._watch(mine, self.layout.WEIGHTS)
        self.before_launch(mine, ("combine_send", mine.has_weights))
        combine_send(
            self.layout,
            self.rank,
            rows,
            not mine.has_weights,
            peers=state.peers,
            places=mine.slot.places,
            **self._waiting(mine, state),
        )
        mine.phase = Phase.COMBINING

    def combine_recv(self, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Launch the sum over ranks; ends the step. Returns [T, H] of config.dtype, in `out` if given. Raises
        InputError, HandleError."""
        mine, state = self._step(handle, Phase.COMBINING)
        result = self._outputs.sums(mine.tokens, out)
        if mine.wait_times is not None:
            self._watch(mine, self.layout.COMBINE)
        combine_recv(
            self.layout,
            result,
            hits=mine.slot.hits,
            **self._waiting(mine, state),
        )
        mine.phase = Phase.DONE
        mine.turns.open.remove(mine)
        return result

    # what went wrong

    def missing(self, handle: Handle) -> list[int]:
        """Ranks that are missing from a step as far as its launches have run: dead, too slow, given up in an earlier
        step, or unable to receive this rank's rows. Empty for a good step. Waits for the current stream. Raises
        HandleError."""
        if not isinstance(handle, GpuHandle) or handle._owner is not self:
            raise HandleError("this handle belongs to another rank; use it with the object that made it")
        handle.check_words()
        return ranks_of(int(handle.slot.handle[self.layout.MISSING].item()))

    def check(self) -> None:
        """Raise what kernels have reported since the last call: HandleError for steps in a wrong order, InputError for
        wrong ids, scales or weights, RankLost for ranks that were missing. Waits for the device."""
        bad, lost, misuse = self.report.tolist()
        self.report.copy_(self._words(list(NOTHING)))
        if misuse:
            raise HandleError(f"rank {self.rank}: {describe_misuse(misuse)}")
        if bad != NO_BAD_INPUT:
            kind = NotFinite if is_value(bad) else InputError
            raise kind(f"rank {self.rank}: {describe_bad_input(bad, self.layout, self.config.dtype)}")
        if lost:
            names = ranks_of(lost)
            raise RankLost(f"rank {self.rank}: ranks {names} were missing from a step; its result lacks them", names)

    # helpers

    def _watch(self, mine: GpuHandle, phase: int) -> None:
        """Measure the wait of the launch that follows: somebody asked for it."""
        from moe_a2a.gpu.wait_times import watch

        watch(self, mine, phase)

    def _check_weighted(self, mine: GpuHandle) -> None:
        if not (mine.has_weights or mine.pushed):
            raise InputError("topk_weights were not given at dispatch; give them here, fp32 [T, K]")

    def _waiting(self, mine: GpuHandle, state: Channel) -> dict[str, Any]:
        """What every kernel takes that may have to wait for peers."""
        return {
            "region": state.region,
            "control": self.control,
            "alive": self._alive,
            "live": state.live,
            "handle": mine.slot.handle,
            "report": self.report,
            "processors": self._processors,
        }

    def _index(self, name: str | None) -> int:
        if name is None:
            return 0
        if name not in self.config.channels:
            raise InputError(f"channel={name!r}; this object has {', '.join(map(repr, self.config.channels))}")
        return self.config.channels.index(name)

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _check_device(self) -> None:
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            raise HandleError(
                f"the current device is cuda:{torch.cuda.current_device()}, and this rank is on {self.device}; call it "
                f"in `with torch.cuda.device({self.device.index})`"
            )

    def _check_free(self, turns: Turns) -> None:
        if len(turns.open) >= SLOTS or any(handle.call == turns.calls - 1 for handle in turns.open):
            raise HandleError(
                f"{turns.open[0]} is still open, and its buffers are those of the next step; "
                "combine it before dispatching again, or use another channel"
            )

    def _step(self, handle: Handle, needed: Phase) -> tuple[GpuHandle, Channel]:
        if not isinstance(handle, GpuHandle):
            raise HandleError(f"handle is a {type(handle).__name__}; give the handle of a dispatch")
        if handle._owner is not self:
            raise HandleError("this handle belongs to another rank; use it with the object that made it")
        if handle.phase is not needed:
            raise HandleError(f"{handle!r}; this call needs a step that is {needed.value}")
        if handle.captured and not torch.cuda.is_current_stream_capturing():
            raise HandleError(f"{handle!r}, in a CUDA graph's capture; its other calls belong into a capture too")
        self._check_device()
        return handle, self._channels[self.config.channels.index(handle.channel)]
