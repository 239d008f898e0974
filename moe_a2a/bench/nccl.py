"""The NCCL baseline: the same rows, permutes and sums in torch operations, moved by torch's all_to_all_single.

Shapes are static (every rank sends M rows to every rank, of which a few hold a token that does not go there), so that
no count has to reach the host and the whole step can be captured in a CUDA graph, as ours can.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from moe_a2a.config import Config
from moe_a2a.fp8 import FP8, ScaleFormat, quantize


class NcclAllToAll:
    """Masked dispatch and combine over an NCCL group, for T = max_tokens_per_rank tokens on every rank.

    x: [E_l * R*M + 1, H] and scales hold what the last dispatch brought, counts: int64 [E_l].
    """

    def __init__(self, config: Config, group: dist.ProcessGroup, device: torch.device, fp8: ScaleFormat | None) -> None:
        self._config, self._group, self._fp8 = config, group, fp8
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._experts = config.local_experts(self._world)
        self._rows = self._world * config.max_tokens_per_rank
        payload = config.hidden_size if fp8 else config.row_bytes
        # A row on the wire: payload, scales, expert ids, router weights.
        cuts = [payload, 4 * config.groups if fp8 else 0, 4 * config.top_k, 4 * config.top_k]
        self._starts = list(itertools.accumulate(cuts))[:-1]
        shape = (self._rows, sum(cuts))
        self._sent = torch.empty(shape, dtype=torch.uint8, device=device)
        self._got = torch.empty(shape, dtype=torch.uint8, device=device)
        self._sums = torch.empty((self._rows, config.hidden_size), dtype=config.dtype, device=device)
        dtype = FP8 if fp8 else config.dtype
        # One row behind the experts' blocks takes what is for none of them: no mask has to reach the host.
        places = self._experts * self._rows + 1
        self.x = torch.empty((places, config.hidden_size), dtype=dtype, device=device)
        self.scales = torch.empty((places, config.groups), dtype=torch.float32, device=device)
        self.counts = torch.zeros(self._experts, dtype=torch.int64, device=device)
        self._numbers = torch.arange(self._rows * config.top_k, device=device)

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (place of each received choice [N, K] in the experts' rows, its weight [N, K])."""
        parts = [topk_ids.to(torch.int32).view(torch.uint8), topk_weights.view(torch.uint8)]
        if self._fp8:
            q, scales = quantize(x, self._fp8 != "fp32")
            parts = [q.view(torch.uint8), scales.view(torch.uint8), *parts]
        else:
            parts = [x.view(torch.uint8), *parts]
        row = torch.cat(parts, dim=1)
        self._sent.view(self._world, *row.shape).copy_(row)
        dist.all_to_all_single(self._got, self._sent, group=self._group)
        payload, scales, ids, weights = torch.tensor_split(self._got, self._starts, dim=1)
        local = ids.contiguous().view(torch.int32).long() - self._rank * self._experts
        local = torch.where((local >= 0) & (local < self._experts), local, self._experts)
        # (source rank, token) order in each expert, as ours: a stable sort, then the number within the expert.
        expert, order = local.flatten().sort(stable=True)
        starts = torch.searchsorted(expert, torch.arange(self._experts + 1, device=expert.device))
        slots = torch.empty_like(order)
        slots[order] = self._numbers - starts[expert]
        places = torch.where(
            local < self._experts, local * self._rows + slots.view_as(local), self._experts * self._rows
        )
        torch.sub(starts[1:], starts[:-1], out=self.counts)
        rows = places.flatten()
        tokens = self._numbers // self._config.top_k
        words = payload.contiguous().view(torch.int32)
        self.x.view(torch.int32)[rows] = words[tokens]
        if self._fp8:
            self.scales[rows] = scales.contiguous().view(torch.float32)[tokens]
        weight = weights.contiguous().view(torch.float32)
        return places, torch.where(local < self._experts, weight, 0.0)

    def combine(self, y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """y: [E_l, R*M, H]. Weighted sum on the experts' rank, one row back for each token, sum over ranks."""
        rows = y.view(-1, self._config.hidden_size)
        here = places < rows.shape[0]
        chosen = rows[places.clamp(max=rows.shape[0] - 1)].float()
        total = torch.where(here[:, :, None], chosen * weights[:, :, None], 0.0).sum(dim=1)
        dist.all_to_all_single(self._sums, total.to(self._config.dtype), group=self._group)
        back = self._sums.view(self._world, -1, self._config.hidden_size)
        return out.copy_(back.sum(dim=0, dtype=torch.float32))
