"""Decode steps (DeepEP's low-latency format, DEEPEP_LL): the masked layout, with shapes that do not depend on the
routing, so that they can be captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.moe.token_dispatcher.base import CombineInputFormat
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput
from sglang.srt.layers.moe.utils import DeepEPMode

from moe_a2a.errors import HandleError
from moe_a2a.fp8 import FP8
from moe_a2a.sglang_plugin import buffers
from moe_a2a.sglang_plugin.buffers import Shared
from moe_a2a.sglang_plugin.phase import (
    Place,
    Tokens,
    check_combined,
    check_fits,
    check_local_experts,
    past_not_finite,
)
from moe_a2a.sglang_plugin.rows import Rows
from moe_a2a.types import Handle, Masked

_FLAGS = "--cuda-graph-max-bs-decode, --max-running-requests (and in mode low_latency --chunked-prefill-size)"


@dataclass
class Open:
    """A step from dispatch to combine. y: the experts' outputs, kept until the launches that read them are done; out:
    the sums."""

    tokens: Tokens
    handle: Handle
    y: torch.Tensor | None = None
    out: torch.Tensor | None = None


class Decode:
    """Decode steps of one dispatcher."""

    def __init__(self, place: Place, runner_backend: Any) -> None:
        self._place, self.rows = place, Rows(DeepEPMode.LOW_LATENCY, runner_backend)

    # dispatch

    def dispatch(self, x: torch.Tensor, topk_output: Any) -> tuple[Open, Any]:
        """Both halves, also where one launch could do both: graphs run the kernels of the halves, and the eager passes
        before a capture must have compiled them."""
        step = self.dispatch_a(x, topk_output)
        return step, self.dispatch_b(step)

    def dispatch_a(self, x: torch.Tensor, topk_output: Any) -> Open:
        """Send."""
        shared, tokens = self._shared(x.device), Tokens.of(x, topk_output, self._place)
        check_local_experts(self._place, shared)
        check_fits(tokens, shared, "decode", _FLAGS)
        fp8, channel = self.rows.fp8, shared.channel(self._place.channel)
        handle = past_not_finite(
            lambda: shared.a2a.dispatch_send(
                tokens.x, tokens.ids, tokens.weights, fp8=fp8, channel=channel, layout="masked"
            )
        )
        return Open(tokens, handle)

    def dispatch_b(self, step: Open) -> Any:
        """Receive. Returns a DeepEPLLDispatchOutput."""
        shared = self._shared(step.tokens.x.device)
        rows = shared.masked_rows(step.handle.channel, FP8 if self.rows.fp8 else torch.bfloat16)
        got = shared.a2a.dispatch_recv(step.handle, layout="masked", out=rows)
        assert isinstance(got, Masked)
        return self._output(shared, step, got)

    # combine

    def combine(self, step: Open, combine_input: Any, overlap: Any) -> torch.Tensor:
        """Both halves, in one launch on GPU ranks."""
        y, out = self._check(step, combine_input), self._sums(step)
        with _aside(overlap):
            return self._shared(y.device).a2a.combine(y, step.handle, out=out)

    def combine_a(self, step: Open, combine_input: Any, overlap: Any) -> None:
        """Send."""
        step.y = self._check(step, combine_input)
        step.out = self._sums(step)
        with _aside(overlap, join=False):
            self._shared(step.y.device).a2a.combine_send(step.y, step.handle)

    def combine_b(self, step: Open, overlap: Any) -> torch.Tensor:
        """Receive. Returns bf16 [T, H]: the weighted sums over the experts."""
        assert step.out is not None
        with _aside(overlap):
            return self._shared(step.out.device).a2a.combine_recv(step.handle, out=step.out)

    # helpers

    def _shared(self, device: torch.device) -> Shared:
        return buffers.for_decode(self._place.group, self._place.sizes, device)

    def _output(self, shared: Shared, step: Open, got: Masked) -> Any:
        get_global_expert_distribution_recorder().on_deepep_dispatch_low_latency(got.counts)
        ids, experts = step.tokens.ids, self._place.sizes.num_experts
        scales = got.scales
        return DeepEPLLDispatchOutput(
            got.x,
            None if scales is None else scales.view(scales.shape),  # runners empty it with set_
            ids,
            step.tokens.weights,
            got.counts,
            (len(ids) * shared.a2a.world_size * ids.shape[1] + experts) // experts,
        )

    def _check(self, step: Open, combine_input: Any) -> torch.Tensor:
        if combine_input.format != CombineInputFormat.DEEPEP_LL:
            raise HandleError(f"a decode step was dispatched, and combine was given {combine_input.format}")
        y, ids, weights = combine_input
        check_combined("topk_ids", ids, step.tokens.ids)
        check_combined("topk_weights", weights, step.tokens.weights)
        rows: torch.Tensor = y
        return rows

    @staticmethod
    def _sums(step: Open) -> torch.Tensor:
        """Made on the current stream, wherever the sums are made."""
        return torch.empty_like(step.tokens.x)


@contextmanager
def _aside(overlap: Any, join: bool = True) -> Iterator[None]:
    """Single-batch overlap, GPU ranks only: run a combine on the stream that SGLang names, beside the shared experts.

    overlap: SGLang's CombineOverlapArgs, or None. `overlap.overlap` means that combine may begin while the down GEMM
    runs, block by block by its signals. Our combine reads the GEMM's whole output, so it then follows the GEMM on the
    current stream. join: the current stream waits for what runs in this block.
    """
    if overlap is None or overlap.overlap:
        yield
        return
    overlap.stream.wait_event(overlap.wait_event)
    with torch.cuda.stream(overlap.stream):
        yield
    if join:
        torch.cuda.current_stream().wait_stream(overlap.stream)
