"""The contiguous path of one GPU rank: launches of dispatch and combine, beside the masked path and on its memory.

Received rows are handed out where the senders put them, in the channel's symmetric memory. Nothing here waits for the
device, but a dispatch that is asked for counts on the host.
"""

from __future__ import annotations

import time

import torch

from moe_a2a.checks import check_like, padded
from moe_a2a.errors import HandleError, InputError, MoeA2AError
from moe_a2a.fp8 import FP8, ScaleFormat
from moe_a2a.gpu import inputs
from moe_a2a.gpu.contiguous_state import ContiguousHandle, ContiguousSlot, Extra, Output, Sent, followed
from moe_a2a.gpu.handle import Channel
from moe_a2a.gpu.layout import SLOTS
from moe_a2a.gpu.lockstep import Launches
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.gpu.routing import Routing
from moe_a2a.kernels.contiguous_combine import contiguous_combine
from moe_a2a.kernels.contiguous_layout import contiguous_layout
from moe_a2a.kernels.contiguous_recv import contiguous_recv
from moe_a2a.kernels.contiguous_send import contiguous_send
from moe_a2a.kernels.formats import header_bits
from moe_a2a.step import Phase
from moe_a2a.types import Contiguous, Handle

#: Of 24 programs of a combine, so many send: eight SMs fill a link, adding rows up is bound by memory.
_SENDERS = 8


class ContiguousRank:
    """One rank's contiguous dispatch and combine, on the channels of `base`. num_sms: the most SMs that a launch uses.

    A step's `dispatch_send` waits, on the device, for the `dispatch_layout` of every rank: ranks that share a stream
    call `dispatch_layout` and `dispatch_rows` one after the other.
    """

    def __init__(self, base: MaskedRank, num_sms: int) -> None:
        self.base, self.layout, self.config, self.device = base, base.layout, base.config, base.device
        self.use_sms(num_sms)
        self._extras = {name: Extra.of(base.layout, base.device) for name in base.config.channels}

    def use_sms(self, num_sms: int) -> None:
        """The most SMs that later launches use."""
        self._programs = num_sms
        self._senders = max(1, round(num_sms * _SENDERS / 24))
        self._receivers = max(1, num_sms - self._senders)

    # dispatch

    def dispatch_layout(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        like: Handle | None = None,
    ) -> ContiguousHandle:
        """Launch the exchange of counts. Arguments as `AllToAll.dispatch_send`; all must stay unchanged until
        `dispatch_rows` has run too. like: not from outside of a graph into its capture, nor the other way. Raises
        InputError, HandleError."""
        base, layout = self.base, self.layout
        rows = inputs.check_tokens(self.config, x, fp8, self.device)
        given = inputs.check_scales(self.config, rows, scales, self.device)
        tokens = rows.shape[0]
        mode, fp8 = inputs.row_mode(layout, fp8, given is not None)
        base._check_device()
        name = self.config.channels[base._index(channel)]
        state, extra = base._channels[base._index(channel)], self._extras[name]
        captured = base._is_capturing()
        turns = state.captured if captured else state.eager
        ids, weights, tables = None, None, None
        if like is None:
            if topk_ids is None:
                raise InputError("topk_ids is None; give them, or like= with the handle of a step of the same routing")
            shape = (tokens, self.config.top_k)
            ids = inputs.check_tensor("topk_ids", topk_ids, shape, (torch.int32, torch.int64), self.device)
            if topk_weights is not None:
                weights = inputs.check_weights(self.config, topk_weights, tokens, self.device)
            base._check_free(turns)
            routing = Routing.empty(layout, self.device) if captured else extra.free_routing(turns.open)
        else:
            earlier = followed(like, base, name, extra, turns, captured)
            check_like(topk_ids, topk_weights, tokens, earlier.routed)
            routing, tables = earlier.routing, earlier.tables
            base._check_free(turns)
        turns.calls += 1
        slot = extra.slots[turns.calls % SLOTS]
        if captured:  # as in MaskedRank._begin: memory of its own, but for counts, which nobody may ask for
            slot = ContiguousSlot.of(layout, self.device, extra.unread)
        else:
            extra.note(turns.calls, like is not None)
        slot.hits = routing.hits
        if like is None:
            routing.call = turns.calls
        bits = header_bits(mode, weights is not None, contiguous=True)
        sent = Sent(rows, weights, given, mode, like is not None, tables)
        handle = ContiguousHandle(base, name, turns, captured, slot, bits, fp8, sent, routing)
        ids_dtype = None if ids is None else ids.dtype
        base.before_launch(handle, ("contiguous", mode, fp8, ids_dtype, weights is not None))
        contiguous_layout(
            layout,
            base.rank,
            ids,
            tokens,
            bits,
            handle.block,
            peers=state.peers,
            control=base.control,
            live=state.live,
            handle=slot.handle,
            routing=routing,
            experts=extra.experts,
            report=base.report,
            programs=self._programs,
        )
        turns.open.append(handle)
        return handle

    def dispatch_rows(self, handle: ContiguousHandle, *, receive: bool = False) -> None:
        """Launch the sending of rows, after `dispatch_layout`. receive: and what `dispatch_recv` would launch, of steps
        whose routing is known and whose scales need no packing. Raises HandleError."""
        mine, state = self._step(handle, Phase.SENT)
        sent, mine.sent = mine.sent, None
        if sent is None:
            raise HandleError(f"{mine!r}: its rows are sent already")
        received = None
        if receive:
            mine.shown = shown = self._output(state, mine)
            received = (shown.counts, shown.tokens_per_rank, mine.slot.places)
        contiguous_send(
            self.layout,
            self.base.rank,
            sent.x,
            sent.weights,
            sent.scales,
            sent.mode,
            mine.bits,
            mine.known,
            mine.ticket,
            received,
            largest_weight=self.base._largest_weight,
            region=state.region,
            peers=state.peers,
            control=self.base.control,
            alive=self.base._alive,
            live=state.live,
            handle=mine.slot.handle,
            routing=mine.routing,
            host=mine.slot.host,
            report=self.base.report,
            own_block=mine.block,
            programs=self._programs,
        )

    def dispatch_recv(
        self,
        handle: Handle,
        *,
        alignment: int = 128,
        host_counts: bool = False,
        out: torch.Tensor | None = None,
    ) -> Contiguous:
        """Launch the receiving half. The result is a view of the channel's memory, of R*M rows; with host_counts, which
        waits for the counts, of exactly the received ones. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.SENT)
        layout, base = self.layout, self.base
        dtype = self.config.dtype if mine._fp8 is None else FP8
        most, counts_list = layout.CAPACITY, None
        if host_counts:
            words = self.counts_on_host(mine)
            most = sum(words[: layout.R])
            counts_list = padded(words[layout.R :], alignment)
        if out is not None:
            self.check_out(out, dtype, most)
        if mine.wait_times is not None:
            base._watch(mine, layout.DISPATCH)
        shown = mine.shown
        if shown is None:
            shown = self._output(state, mine)
            contiguous_recv(
                layout,
                base.rank,
                shown.counts,
                shown.tokens_per_rank,
                shown.packed,
                mine.bits,
                mine.known,
                mine.has_weights,
                mine.block,
                region=state.region,
                control=base.control,
                alive=base._alive,
                live=state.live,
                handle=mine.slot.handle,
                came=mine.slot.places,
                routing=mine.routing,
                report=base.report,
                programs=self._programs,
            )
        if mine.tables is None:
            mine.tables = (shown.ids, shown.weights if mine.has_weights else None, shown.source)
        ids, weights, source = mine.tables
        x = shown.x[:most]
        if out is not None:
            x = out[:most].copy_(x)
        mine.rows, mine.phase = most, Phase.RECEIVED
        return Contiguous(
            x,
            ids[:most],
            None if weights is None else weights[:most],
            shown.counts,
            shown.tokens_per_rank,
            source[:most],
            None if shown.scales is None else shown.scales[:most],
            mine,
            counts_list,
        )

    def receiving(
        self,
        handle: Handle,
        *,
        alignment: int = 128,
        host_counts: bool = False,
        out: torch.Tensor | None = None,
    ) -> Launches[Contiguous]:
        """`dispatch_recv`, for ranks that share a stream."""
        yield from ()  # all have sent
        return self.dispatch_recv(handle, alignment=alignment, host_counts=host_counts, out=out)

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        like: Handle | None = None,
        whole: bool = False,
    ) -> ContiguousHandle:
        """`dispatch_layout` and `dispatch_rows`. whole: `dispatch_recv` follows at once, on the same stream."""
        handle = self.dispatch_layout(x, topk_ids, topk_weights, scales=scales, fp8=fp8, channel=channel, like=like)
        self.dispatch_rows(handle, receive=whole and handle.known and fp8 != "ue8m0")
        return handle

    # combine

    def combine_send(self, y: torch.Tensor, handle: Handle) -> None:
        """Launch the way back of the experts' outputs. y: [rows, H] of config.dtype, as many rows as were handed out,
        weights already applied; it may be reused. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.RECEIVED)
        rows = self._outputs_of_experts(y, mine)
        self._combine(mine, state, rows, rows[:0], self._programs, 0, True)
        mine.phase = Phase.COMBINING

    def combine_recv(self, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Launch the sum over ranks; ends the step. Returns [T, H] of config.dtype, in `out` if given. Raises
        InputError, HandleError."""
        mine, state = self._step(handle, Phase.COMBINING)
        result = self.base._outputs.sums(mine.tokens, out)
        if mine.wait_times is not None:
            self.base._watch(mine, self.layout.COMBINE)
        self._combine(mine, state, result, result, 0, self._programs, True)
        return self._done(mine, result)

    def combine(self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Both halves in one launch, which overlap. As `combine_send` and `combine_recv`; y must stay unchanged until
        the launch has run."""
        mine, state = self._step(handle, Phase.RECEIVED)
        rows, result = self._outputs_of_experts(y, mine), self.base._outputs.sums(mine.tokens, out)
        if mine.wait_times is not None:  # in one launch there is no place for another in front of the wait
            self.combine_send(rows, mine)
            return self.combine_recv(mine, out=result)
        self._combine(mine, state, rows, result, self._senders, self._receivers, False)
        return self._done(mine, result)

    def combine_apart(self, y: torch.Tensor, handle: Handle) -> None:
        """The senders of `combine` only, for ranks that share a stream: `combine_sums` follows when all have sent."""
        mine, state = self._step(handle, Phase.RECEIVED)
        rows = self._outputs_of_experts(y, mine)
        self._combine(mine, state, rows, rows[:0], self._senders, 0, False)
        mine.phase = Phase.COMBINING

    def combine_sums(self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The receivers of `combine` only, with the same y."""
        mine, state = self._step(handle, Phase.COMBINING)
        rows, result = self._outputs_of_experts(y, mine), self.base._outputs.sums(mine.tokens, out)
        self._combine(mine, state, rows, result, 0, self._receivers, False)
        return self._done(mine, result)

    def combining(self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None) -> Launches[torch.Tensor]:
        """`combine`, for ranks that share a stream."""
        self.combine_apart(y, handle)
        yield
        return self.combine_sums(y, handle, out=out)

    # helpers

    def check_out(self, out: torch.Tensor, dtype: torch.dtype, rows: int) -> None:
        """Storage for so many rows. Raises InputError."""
        inputs.check_tensor("out", out, ("rows", self.layout.H), (dtype,), self.device)
        if out.shape[0] < rows:
            raise InputError(f"out has {out.shape[0]} rows and this step needs {rows}; give a larger one, or none")

    def _combine(
        self,
        mine: ContiguousHandle,
        state: Channel,
        y: torch.Tensor,
        out: torch.Tensor,
        senders: int,
        receivers: int,
        split: bool,
    ) -> None:
        self.base.before_launch(mine, ("contiguous combine", split))
        contiguous_combine(
            self.layout,
            self.base.rank,
            y,
            out,
            senders,
            receivers,
            split,
            region=state.region,
            peers=state.peers,
            control=self.base.control,
            alive=self.base._alive,
            live=state.live,
            handle=mine.slot.handle,
            came=mine.slot.places,
            routing=mine.routing,
            report=self.base.report,
        )

    def _outputs_of_experts(self, y: torch.Tensor, mine: ContiguousHandle) -> torch.Tensor:
        return inputs.check_tensor("y", y, (mine.rows, self.layout.H), (self.config.dtype,), self.device)

    def _done(self, mine: ContiguousHandle, result: torch.Tensor) -> torch.Tensor:
        mine.phase = Phase.DONE
        mine.turns.open.remove(mine)
        return result

    def step(self, handle: Handle, needed: Phase) -> ContiguousHandle:
        """The handle, if it is of a contiguous step of this rank that is so far. Raises HandleError."""
        return self._step(handle, needed)[0]

    def _step(self, handle: Handle, needed: Phase) -> tuple[ContiguousHandle, Channel]:
        mine, state = self.base._step(handle, needed)
        if not isinstance(mine, ContiguousHandle):
            raise HandleError(f"{mine!r} was sent for the masked layout; this call needs a contiguous step")
        return mine, state

    def _output(self, state: Channel, mine: ContiguousHandle) -> Output:
        if mine.captured:  # what of it is no view of the region is the graph's own
            return Output.of(self.layout, state.region, mine.block, self.config.dtype, mine._fp8)
        found = self._extras[mine.channel].outputs
        key = (mine.block, mine._fp8)
        if key not in found:
            found[key] = Output.of(self.layout, state.region, mine.block, self.config.dtype, mine._fp8)
        return found[key]

    def counts_on_host(self, mine: ContiguousHandle) -> list[int]:
        """Rows of each source, and for each local expert; the number of rounds, where there may be several. Waits until
        they are written, before the first rows are sent."""
        if mine.captured:
            raise InputError("host_counts=True waits for counts, which a CUDA graph's capture cannot; leave it out")
        words, ticket = mine.slot.host.numpy(), mine.ticket
        began = time.monotonic()
        while (words >> 32 != ticket).any():
            if self.device.type == "cuda" and time.monotonic() - began > 0.01:
                if torch.cuda.current_stream(self.device).query():  # raises what went wrong on the device
                    break
                time.sleep(50e-6)
        if (words >> 32 != ticket).any():
            raise MoeA2AError(f"{mine!r}: its counts did not reach the host; receive on the stream that it was sent on")
        return [int(word) & 0xFFFFFFFF for word in words]
