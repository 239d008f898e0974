"""The baseline mooncake: dispatch and combine of Mooncake EP's `Buffer`, which is in the CUDA wheels of the Transfer
Engine.

Each case has a buffer of its own: sizes decide where the buffer's flags are, and nothing clears them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.bench.cases import Case
from moe_a2a.bench.low_latency import Received

_TIMEOUT_US = 10_000_000  # after which it leaves a rank out of a step


class Mooncake:
    """A LowLatency baseline. Collective. group: NCCL, for what its constructor exchanges."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._kind: Any = importlib.import_module("mooncake.mooncake_ep_buffer").Buffer
        self._group = group
        self._active = torch.ones(group.size(), dtype=torch.int32, device=device)
        self._buffer: Any = None
        self._case: Case

    def buffer_bytes(self, case: Case) -> int:
        size: int = self._kind.get_ep_buffer_size_hint(case.tokens, case.hidden, self._group.size(), case.experts)
        return size

    def start(self, case: Case) -> None:
        self._buffer, self._case = None, case
        self._buffer = self._kind(self._group, self.buffer_bytes(case))
        if getattr(self._buffer, "_use_fallback", False):
            raise RuntimeError("the GPUs cannot map each other's memory; it would use collectives of torch instead")

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor) -> Received:
        case = self._case
        rows, counts, handle, _, _ = self._buffer.dispatch(
            x, topk_ids, self._active, case.tokens, case.experts, _TIMEOUT_US, use_fp8=case.fp8 is not None
        )
        q, scales = rows if case.fp8 else (rows, None)
        return Received(q, scales, counts, handle)

    def combine(
        self, y: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, got: Received, out: torch.Tensor
    ) -> torch.Tensor:
        sums: torch.Tensor = self._buffer.combine(
            y, topk_ids, topk_weights, self._active, _TIMEOUT_US, got.handle, out=out
        )[0]
        return sums

    def close(self) -> None:
        self._buffer = None
