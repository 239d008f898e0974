"""Prefill steps (DeepEP's normal format, DEEPEP_NORMAL): the contiguous layout, with as many rows as have arrived. The
host waits for their number, so they cannot be captured in CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.moe.token_dispatcher.base import CombineInputFormat
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput
from sglang.srt.layers.moe.utils import DeepEPMode

from moe_a2a.errors import HandleError
from moe_a2a.sglang_plugin import buffers
from moe_a2a.sglang_plugin.buffers import Shared
from moe_a2a.sglang_plugin.phase import Place, Tokens, check_fits, check_local_experts, past_not_finite
from moe_a2a.sglang_plugin.rows import Rows
from moe_a2a.sglang_plugin.streams import Beside
from moe_a2a.types import Contiguous, Handle

_FLAGS = "--chunked-prefill-size, --max-running-requests and the width of attention data parallelism"


@dataclass
class Open:
    """A step from dispatch to combine. tokens: until they are sent; count: their number. beside: where launches go when
    the step is made in halves; y, out: of its combine, kept until that is done."""

    tokens: Tokens | None
    handle: Handle
    count: int
    beside: Beside | None = None
    y: torch.Tensor | None = None
    out: torch.Tensor | None = None


class Prefill:
    """Prefill steps of one dispatcher.

    Made in halves (two-batch overlap), their launches go to a stream of the channel's own, beside the other
    micro-batch's kernels; made whole, to the current stream.
    """

    def __init__(self, place: Place, runner_backend: Any) -> None:
        self._place, self.rows = place, Rows(DeepEPMode.NORMAL, runner_backend)

    # dispatch

    def dispatch(self, x: torch.Tensor, topk_output: Any) -> tuple[Open, Any]:
        """Both halves."""
        step = self._send(x, topk_output, None)
        output = self._receive(step)
        step.tokens = None
        return step, output

    def dispatch_a(self, x: torch.Tensor, topk_output: Any) -> Open:
        """Send."""
        return self._send(x, topk_output, Beside(x.device, self._place.channel))

    def dispatch_b(self, step: Open) -> Any:
        """Receive; the host waits for the counts. Returns a DeepEPNormalDispatchOutput."""
        assert step.beside is not None
        with step.beside.work():
            output = self._receive(step)
        step.beside.join()
        step.tokens = None
        return output

    # combine

    def combine(self, step: Open, combine_input: Any) -> torch.Tensor:
        """Both halves, in one launch on GPU ranks."""
        y = self._check(combine_input)
        return self._shared(y.device).a2a.combine(y, step.handle)

    def combine_a(self, step: Open, combine_input: Any) -> None:
        """Send."""
        step.y = self._check(combine_input)
        # Made here, on the stream that will read it.
        step.out = step.y.new_empty((step.count, self._place.sizes.hidden_size))
        beside = step.beside = step.beside or Beside(step.y.device, self._place.channel)
        beside.fork()
        with beside.work():
            self._shared(step.y.device).a2a.combine_send(step.y, step.handle)

    def combine_b(self, step: Open) -> torch.Tensor:
        """Receive. Returns bf16 [T, H]: the sums over the ranks."""
        assert step.out is not None and step.beside is not None
        with step.beside.work():
            self._shared(step.out.device).a2a.combine_recv(step.handle, out=step.out)
        step.beside.join()
        return step.out

    # helpers

    def _shared(self, device: torch.device) -> Shared:
        return buffers.for_prefill(self._place.group, self._place.sizes, device)

    def _send(self, x: torch.Tensor, topk_output: Any, beside: Beside | None) -> Open:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise HandleError(
                "a dispatch in mode normal waits for counts and cannot be captured in a CUDA graph; use --deepep-mode "
                "auto, which decodes in mode low_latency, or --disable-cuda-graph"
            )
        shared, tokens = self._shared(x.device), Tokens.of(x, topk_output, self._place)
        check_local_experts(self._place, shared)
        check_fits(tokens, shared, "prefill", _FLAGS)
        channel = shared.channel(self._place.channel)

        def send() -> Handle:
            return shared.a2a.dispatch_send(
                tokens.x, tokens.ids, tokens.weights, fp8=self.rows.fp8, channel=channel, layout="contiguous"
            )

        if beside is None:
            return Open(tokens, past_not_finite(send), len(tokens.x))
        beside.fork()
        with beside.work():
            return Open(tokens, past_not_finite(send), len(tokens.x), beside)

    def _receive(self, step: Open) -> Any:
        assert step.tokens is not None
        ids, a2a = step.tokens.ids, self._shared(step.tokens.x.device).a2a
        # DeepGEMM's grouped GEMM takes each expert's rows from a multiple of 128 on.
        alignment = 128 if deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM else 1
        got = a2a.dispatch_recv(step.handle, layout="contiguous", alignment=alignment, host_counts=True)
        assert isinstance(got, Contiguous) and got.counts_list is not None
        recorder = get_global_expert_distribution_recorder()
        if recorder.recording:
            per_rank, per_expert = routing_counts(ids, self._place.sizes.num_experts, a2a.world_size)
            recorder.on_deepep_dispatch_normal(
                got.counts_list,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=None,
                num_tokens_per_expert=per_expert,
            )
        return DeepEPNormalDispatchOutput(got.x, got.scales, got.topk_ids, got.topk_weights, got.counts_list)

    @staticmethod
    def _check(combine_input: Any) -> torch.Tensor:
        if combine_input.format != CombineInputFormat.DEEPEP_NORMAL:
            raise HandleError(f"a prefill step was dispatched, and combine was given {combine_input.format}")
        rows: torch.Tensor = combine_input.hidden_states
        return rows


def routing_counts(topk_ids: torch.Tensor, num_experts: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of this rank's tokens go to each rank, and to each expert: int32 [R] and [E]. topk_ids: int64 [T, K]."""
    tokens = topk_ids.shape[0]
    # One place more, for choices that name no expert.
    chosen = torch.where(topk_ids >= 0, topk_ids, num_experts)
    to_expert = topk_ids.new_zeros((tokens, num_experts + 1), dtype=torch.int32).scatter_(1, chosen, 1)
    to_rank = topk_ids.new_zeros((tokens, ranks + 1), dtype=torch.int32)
    to_rank.scatter_(1, chosen // (num_experts // ranks), 1)
    per_rank = to_rank.sum(dim=0, dtype=torch.int32)[:ranks]
    return per_rank, to_expert.sum(dim=0, dtype=torch.int32)[:num_experts]
