"""The baseline deep_ep: DeepEP's low-latency dispatch and combine, from whatever build of `deep_ep` is installed.

One buffer serves all cases of a run: DeepEP's memory comes from NVSHMEM, which is not made to be started twice in a
process. Its constructor sets the NVSHMEM variables that it needs. GPUs of one host reach each other through NVLink; no
RDMA device is needed for that.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.bench.cases import Case
from moe_a2a.bench.low_latency import Received


class DeepEp:
    """A LowLatency baseline. Collective. cases: all that the buffer has to serve."""

    def __init__(self, group: dist.ProcessGroup, cases: Sequence[Case]) -> None:
        self._kind: Any = importlib.import_module("deep_ep").Buffer
        self._world = group.size()
        self._case = cases[0]
        self._buffer = self._kind(
            group,
            num_rdma_bytes=max(self.buffer_bytes(case) for case in cases),
            low_latency_mode=True,
            num_qps_per_rank=max(case.experts for case in cases) // self._world,
            explicitly_destroy=True,
        )

    def buffer_bytes(self, case: Case) -> int:
        size: int = self._kind.get_low_latency_rdma_size_hint(case.tokens, case.hidden, self._world, case.experts)
        return size

    def start(self, case: Case) -> None:
        # Sizes decide where the buffer's flags are: another case's rows may lie there.
        self._buffer.clean_low_latency_buffer(case.tokens, case.hidden, case.experts)
        self._case = case

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor) -> Received:
        case = self._case
        rows, counts, handle, _, _ = self._buffer.low_latency_dispatch(
            x, topk_ids, case.tokens, case.experts, use_fp8=case.fp8 is not None
        )
        q, scales = rows if case.fp8 else (rows, None)
        return Received(q, scales, counts, handle)

    def combine(
        self, y: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, got: Received, out: torch.Tensor
    ) -> torch.Tensor:
        sums: torch.Tensor = self._buffer.low_latency_combine(y, topk_ids, topk_weights, got.handle, out=out)[0]
        return sums

    def close(self) -> None:
        self._buffer.destroy()
