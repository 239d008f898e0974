"""DeepEP's low-latency steps on `AllToAll`: which object serves a call, and which open step a handle means.

DeepEP's buffers take any sizes that fit; an `AllToAll` has fixed ones. So there is one for each set of sizes, built
with all ranks at the first dispatch of that size. DeepEP lets a program drop a step without combining it; here a step
ends by a combine or by a discard, so that one that is dropped is discarded when the next dispatch but one needs its
buffers: by all ranks, since all make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.all_to_all import AllToAll
from moe_a2a.compat.arguments import capturing, check
from moe_a2a.compat.events import CommStream, EventOverlap
from moe_a2a.config import Config, Options
from moe_a2a.errors import HandleError, InputError
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.report import ranks_of
from moe_a2a.types import Handle

#: What DeepEP's handle holds: src_info int32 [E_l, R*M], layout_range int64 [E_l, R], M, hidden, num_experts.
LowLatencyHandle = tuple[torch.Tensor, torch.Tensor, int, int, int]
Hook = Callable[[], None]


@dataclass(eq=False)
class Step:
    """A step that has not ended. src_info: the tensor that stands first in its handle tuple, by which it is found.
    captured: it was dispatched in a graph capture. finish: the receiving half of its combine, once that is sent."""

    steps: Steps
    number: int
    handle: Handle
    tokens: int
    src_info: torch.Tensor
    captured: bool
    finish: Hook | None = None

    def end(self) -> None:
        """End it for a program that has left it behind. Raises HandleError if that is on the other side of a graph
        capture: a replay would end a step of its own."""
        if self.captured != capturing(self.steps.a2a.device):
            raise HandleError(
                f"the buffers of this dispatch still belong to one that was made {'in' if self.captured else 'before'} "
                "a graph capture and not combined there: combine it on that side of the capture"
            )
        if self.finish is not None:
            self.finish()
        else:
            self.steps.a2a.discard(self.handle)
            self.steps.open.remove(self)


@dataclass(eq=False)
class Steps:
    """The open steps of one `AllToAll`. buffers: for zero-copy combines, by parity."""

    a2a: AllToAll
    open: list[Step] = field(default_factory=list)
    count: int = 0
    buffers: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E_l, R*M, H]"""
        config, ranks = self.a2a.config, self.a2a.world_size
        return self.a2a.local_experts, ranks * config.max_tokens_per_rank, config.hidden_size

    def make_room(self) -> None:
        """End the steps whose buffers the next step uses."""
        for step in list(self.open):
            if step.number < self.count:
                step.end()


class LowLatency:
    """The low-latency half of one `Buffer`. name: differs between the Buffers of a group, and is equal on all ranks."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        options: Options,
        name: str,
        masks: bool,
        comm: CommStream,
    ) -> None:
        self._group, self._device, self._options, self._name = group, device, options, name
        self._all: dict[tuple[int, int, int, int], Steps] = {}
        self._masked: int | None = 0 if masks else None
        self.comm = comm

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        experts: int,
        expert_stats: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
        fp8: ScaleFormat | None,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[Any, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """See `Buffer.low_latency_dispatch`."""
        _exclusive(async_finish, return_recv_hook)
        for name, tensor in (("x", x), ("topk_idx", topk_idx)):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
                raise InputError(f"{name} is not a tensor with two dimensions; give x [T, hidden], topk_idx [T, K]")
        steps = self._steps(max_tokens, x.shape[1], experts, topk_idx.shape[1])
        a2a = steps.a2a
        if expert_stats is not None:
            name = "cumulative_local_expert_recv_stats"
            check(name, expert_stats, (a2a.local_experts,), torch.int32, a2a.device)
        if wait_stats is not None:
            check("dispatch_wait_recv_cost_stats", wait_stats, (a2a.world_size,), torch.int64, a2a.device)

        with self.comm.launching(async_finish):
            steps.make_room()
            whole = not return_recv_hook and wait_stats is None
            if whole:
                got = a2a.dispatch(x, topk_idx, fp8=fp8, by_source=True)
            else:
                got = a2a.reserve(a2a.dispatch_send(x, topk_idx, fp8=fp8), by_source=True)
            sent = got.handle
            assert got.ranges is not None
            steps.count += 1
            # New views: callers empty what they have used with set_(), and the storage is used again.
            src_info, ranges, counts = _again(got.source), _again(got.ranges), _again(got.counts)
            rows = _again(got.x) if got.scales is None else (_again(got.x), _again(got.scales))
            steps.open.append(Step(steps, steps.count, sent, x.shape[0], src_info, capturing(a2a.device)))

            def receive() -> None:
                if not whole:
                    if wait_stats is not None:
                        a2a.add_wait_times(sent, wait_stats)
                    a2a.dispatch_recv(sent)
                if expert_stats is not None:
                    expert_stats.add_(got.counts)

            if not return_recv_hook:
                receive()
        event = self.comm.finished(async_finish, (x, topk_idx, expert_stats, wait_stats))
        hook = self.comm.later(receive) if return_recv_hook else None
        return rows, counts, (src_info, ranges, max_tokens, x.shape[1], experts), event, hook

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """See `Buffer.low_latency_combine`."""
        _exclusive(async_finish, return_recv_hook)
        step = self._find(handle)
        steps, a2a = step.steps, step.steps.a2a
        device, hidden = a2a.device, a2a.config.hidden_size
        check("topk_idx", topk_idx, (step.tokens, a2a.config.top_k), torch.int64, device)
        check("topk_weights", topk_weights, (step.tokens, a2a.config.top_k), torch.float32, device)
        rows = check("x", x, steps.shape, torch.bfloat16, device)
        if zero_copy:
            if step.number % 2 not in steps.buffers:
                raise InputError(
                    "zero_copy=True reads the buffer of get_next_low_latency_combine_buffer(handle), which was never "
                    "asked for: ask for it and fill it, or leave zero_copy out"
                )
            rows = steps.buffers[step.number % 2]
        if wait_stats is not None:
            check("combine_wait_recv_cost_stats", wait_stats, (a2a.world_size,), torch.int64, device)
        if out is None:
            result = torch.empty((step.tokens, hidden), dtype=torch.bfloat16, device=device)
        else:
            result = check("out", out, (step.tokens, hidden), torch.bfloat16, device)

        def finish() -> None:
            a2a.combine_recv(step.handle, out=result)
            steps.open.remove(step)

        with self.comm.launching(async_finish):
            if wait_stats is not None:
                a2a.add_wait_times(step.handle, wait_stats)
            if return_recv_hook:
                a2a.combine_send(rows, step.handle, topk_weights)
                step.finish = finish
            else:
                a2a.combine(rows, step.handle, topk_weights, out=result)
                steps.open.remove(step)
        event = self.comm.finished(async_finish, (rows, topk_idx, topk_weights, result, wait_stats))
        return result, event, self.comm.later(finish) if return_recv_hook else None

    def combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """See `Buffer.get_next_low_latency_combine_buffer`."""
        step = self._find(handle)
        kept, parity = step.steps.buffers, step.number % 2
        if parity not in kept:
            kept[parity] = torch.empty(step.steps.shape, dtype=torch.bfloat16, device=self._device)
        return _again(kept[parity])

    # masked ranks

    def mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out, or take it back."""
        before, bit = self._mask_bits(), 1 << rank
        self._change_mask(before | bit if masked else before & ~bit, bit, masked)

    def clean_mask(self) -> None:
        """Take back all ranks that live."""
        self._mask_bits()
        self._change_mask(0, (1 << self._group.size()) - 1, False)

    def _change_mask(self, by_hand: int, ranks: int, masked: bool) -> None:
        if capturing(self._device):
            raise HandleError("the mask cannot be changed inside a graph capture: every replay would change it again")
        self._masked = by_hand
        with self.comm.launching(False):
            for steps in self._all.values():
                mask = _mask_of(steps.a2a)
                if masked:
                    mask.leave_out(ranks)
                else:
                    mask.take_back(ranks)

    def mask_words(self) -> torch.Tensor:
        """int32 [R], 1 for each rank that is left out or was missing from a step."""
        words = torch.zeros(self._group.size(), dtype=torch.int32, device=self._device)
        for rank in ranks_of(self._mask_bits()):
            words[rank].fill_(1)
        for steps in self._all.values():
            words |= _mask_of(steps.a2a).to_words()
        return words

    def _mask_bits(self) -> int:
        """Ranks that were masked by hand."""
        if self._masked is None:
            raise HandleError("this Buffer has no mask: make it with enable_shrink=True")
        return self._masked

    # helpers

    def _steps(self, max_tokens: int, hidden: int, experts: int, top_k: int) -> Steps:
        key = (max_tokens, hidden, experts, top_k)
        found = self._all.get(key)
        return found if found is not None else self._build(*key)

    def _build(self, max_tokens: int, hidden: int, experts: int, top_k: int) -> Steps:
        if capturing(self._device):
            raise HandleError(
                f"num_max_dispatch_tokens_per_rank={max_tokens}, hidden={hidden}, num_experts={experts}, "
                f"num_topk={top_k}: the first dispatch of these sizes builds its buffers with all ranks, and cannot be "
                "captured: make one before the capture"
            )
        config = Config(experts, hidden, top_k, max_tokens, channels=(f"{self._name}.{len(self._all)}",))
        a2a = AllToAll(config, self._group, device=self._device, options=self._options)
        if self._masked is not None:
            _mask_of(a2a, new=True).leave_out(self._masked)
        steps = Steps(a2a)
        self._all[max_tokens, hidden, experts, top_k] = steps
        return steps

    def _find(self, handle: LowLatencyHandle) -> Step:
        if not isinstance(handle, (tuple, list)) or len(handle) != 5:
            raise HandleError("handle is not the tuple of five that low_latency_dispatch returned")
        for steps in self._all.values():
            for step in steps.open:
                if step.src_info is handle[0]:
                    return step
        raise HandleError(
            "no open step has this handle: it was combined already, or two dispatches came after its own, or another "
            "Buffer made it; at most two results are valid at a time"
        )

    def close(self) -> None:
        """Not collective."""
        for steps in self._all.values():
            steps.a2a.close()
        self._all.clear()


def _again(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(tensor.shape)


def _exclusive(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise InputError("async_finish and return_recv_hook cannot both be set: take an event or a hook")


def _mask_of(a2a: AllToAll, new: bool = False) -> Any:
    """The one place that ties DeepEP's mask to the core (`moe_a2a.gpu.mask.Mask`)."""
    backend: Any = a2a._backend
    return backend.tolerate_missing() if new else backend._mask
