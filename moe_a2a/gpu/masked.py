"""The masked path of one GPU rank: its buffers, and the launches of dispatch and combine. Nothing here synchronises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_a2a.config import Config
from moe_a2a.errors import HandleError, InputError, RankLost
from moe_a2a.fp8 import FP8, ScaleFormat, scale_columns
from moe_a2a.gpu import inputs
from moe_a2a.gpu.handle import Channel, GpuHandle, Slot, Turns
from moe_a2a.gpu.layout import SLOTS, Layout
from moe_a2a.gpu.report import NO_BAD_INPUT, NOTHING, describe_bad_input, describe_misuse, ranks_of
from moe_a2a.kernels.combine_recv import combine_recv
from moe_a2a.kernels.combine_send import combine_send
from moe_a2a.kernels.dispatch_recv import dispatch_recv
from moe_a2a.kernels.dispatch_send import dispatch_send
from moe_a2a.kernels.formats import COPY, GIVEN, GIVEN_POW2, QUANTISE, QUANTISE_POW2, header_bits
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
        words = [0] * layout.CONTROL_WORDS
        words[layout.EPOCH], words[layout.INCARNATION] = 1, 1
        words[layout.MASK], words[layout.NEXT_STEP] = (1 << layout.R) - 1, _NEVER
        words[layout.BUDGET_NS] = int(timeout_s * 1e9)
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
        rows = inputs.check_tokens(self.config, x, fp8, self.device)
        given = inputs.check_scales(self.config, rows, scales, self.device)
        tokens, top_k = rows.shape[0], self.config.top_k
        ids = inputs.check_tensor("topk_ids", topk_ids, (tokens, top_k), (torch.int32, torch.int64), self.device)
        weights = self._weights(topk_weights, tokens)
        if given is not None:
            fp8 = fp8 or "fp32"
            mode = GIVEN if fp8 == "fp32" else GIVEN_POW2
        else:
            mode = COPY if fp8 is None else QUANTISE if fp8 == "fp32" else QUANTISE_POW2
        if mode == COPY and self.layout.fp8_only:
            raise InputError("this group's buffers hold FP8 rows only; give fp8='fp32', 'pow2' or 'ue8m0'")
        self._check_device()
        state = self._channels[self._index(channel)]
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        turns = state.captured if captured else state.eager
        self._check_free(turns)
        turns.calls += 1
        # A graph's steps may run while one of this channel is open outside of it, so they share none of its memory. The
        # graph's pool uses theirs again once the handle is gone.
        slot = Slot.empty(self.layout, self.device) if captured else state.slots[turns.calls % SLOTS]
        dispatch_send(
            self.layout,
            self.rank,
            rows,
            ids,
            weights,
            given,
            mode,
            largest_weight=self._largest_weight,
            peers=state.peers,
            control=self.control,
            live=state.live,
            handle=slot.handle,
            hits=slot.hits,
            report=self.report,
        )
        bits = header_bits(mode, weights is not None)
        name = channel or self.config.channels[0]
        handle = GpuHandle(self, name, turns, captured, slot, tokens, bits, fp8, weights is not None)
        turns.open.append(handle)
        return handle

    def dispatch_recv(self, handle: Handle, *, out: torch.Tensor | None = None) -> Masked:
        """Launch the receiving half. out: storage for x, [E_l, R*M, H]. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.SENT)
        layout = self.layout
        dtype = self.config.dtype if mine._fp8 is None else FP8
        shape = (layout.E_L, layout.CAP, layout.H)
        if out is None:
            x = self._output(state, mine, "x", shape, dtype)
        else:
            x = inputs.check_tensor("out", out, shape, (dtype,), self.device)
        counts = self._output(state, mine, "counts", (layout.E_L,), torch.int32)
        source = self._output(state, mine, "source", (layout.E_L, layout.CAP), torch.int32)
        scales = None
        if mine._fp8 is not None:
            width, form = scale_columns(layout.H, mine._fp8)
            scales = self._output(state, mine, "scales", (layout.E_L, width, layout.CAP), form)
        dispatch_recv(
            layout,
            self.rank,
            x,
            scales,
            counts,
            source,
            mine.bits,
            places=mine.slot.places,
            **self._waiting(mine, state),
        )
        mine.phase = Phase.RECEIVED
        return Masked(x, counts, source, None if scales is None else scales.transpose(1, 2), mine)

    # combine

    def weights_push(self, handle: Handle, topk_weights: torch.Tensor) -> None:
        """Launch the hop that brings weights to the tokens' ranks, if they did not go with the dispatch. All ranks push
        before any rank's `combine_send` can end. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.RECEIVED)
        if mine.has_weights:
            raise InputError("topk_weights were given at dispatch; give them once, there or here")
        weights = self._weights(topk_weights, mine.tokens)
        assert weights is not None
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
        layout = self.layout
        shape = (layout.E_L, layout.CAP, layout.H)
        rows = inputs.check_tensor("y", y, shape, (self.config.dtype,), self.device)
        if not (mine.has_weights or mine.pushed):
            raise InputError("topk_weights were not given at dispatch; give them here, fp32 [T, K]")
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
        shape = (mine.tokens, self.layout.H)
        if out is None:
            result = torch.empty(shape, dtype=self.config.dtype, device=self.device)
        else:
            result = inputs.check_tensor("out", out, shape, (self.config.dtype,), self.device)
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
            raise InputError(f"rank {self.rank}: {describe_bad_input(bad, self.layout, self.config.dtype)}")
        if lost:
            names = ranks_of(lost)
            raise RankLost(f"rank {self.rank}: ranks {names} were missing from a step; its result lacks them", names)

    # helpers

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

    def _weights(self, weights: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
        if weights is None:
            return None
        return inputs.check_tensor("topk_weights", weights, (tokens, self.config.top_k), (torch.float32,), self.device)

    def _output(
        self, state: Channel, handle: GpuHandle, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Storage of a result, the same one at every second dispatch of the channel; in a graph, the graph's own."""
        if handle.captured:
            return torch.empty(shape, dtype=dtype, device=self.device)
        key = (handle.call % SLOTS, f"{name} {dtype}")
        if key not in state.outputs:
            state.outputs[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return state.outputs[key]
