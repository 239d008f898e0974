"""How a mixture-of-experts model uses moe_a2a: its routed experts, sharded over the ranks of an expert-parallel group.

``ShardedExperts`` stands where transformers has its ``DeepseekV3Experts``: same arguments, same result. The attention,
the router and the shared expert stay as they are, a copy on every rank; a rank keeps only its E/R routed experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_a2a import AllToAll


class ShardedExperts(nn.Module):
    """This rank's share of one layer's routed experts.

    full: the layer's whole ``DeepseekV3Experts``, gate_up_proj [E, 2*I, H] and down_proj [E, H, I]; its part for this
        rank is copied, so that the rest can be freed.
    layout: how dispatch hands out rows: "contiguous" or "grouped" for prefill, "masked" for decode.
    """

    def __init__(self, full: nn.Module, a2a: AllToAll) -> None:
        super().__init__()
        per_rank = full.num_experts // a2a.world_size
        mine = slice(a2a.rank * per_rank, (a2a.rank + 1) * per_rank)
        self.gate_up_proj = nn.Parameter(full.gate_up_proj[mine].clone(), requires_grad=False)
        self.down_proj = nn.Parameter(full.down_proj[mine].clone(), requires_grad=False)
        self.act_fn = full.act_fn
        self.a2a = a2a
        self.layout = "contiguous"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, K] (global ids), top_k_weights fp32 [T, K] -> [T, H]."""
        sent = self.a2a.dispatch(hidden_states, top_k_index, top_k_weights, layout=self.layout)
        return self.a2a.combine(getattr(self, f"_{self.layout}")(sent), sent.handle)

    def _masked(self, sent) -> Tensor:
        """[E_l, R*M, H], the first counts[e] rows of expert e are tokens. combine applies the weights."""
        y = torch.empty_like(sent.x)
        for expert, count in enumerate(sent.counts.tolist()):
            if count:
                y[expert, :count] = self._expert(expert, sent.x[expert, :count])
        return y

    def _grouped(self, sent) -> Tensor:
        """[P, H], the rows of expert e begin at offsets[e]. combine applies the weights."""
        y = torch.empty_like(sent.x)
        for expert, (start, count) in enumerate(zip(sent.offsets.tolist(), sent.counts.tolist(), strict=False)):
            y[start : start + count] = self._expert(expert, sent.x[start : start + count])
        return y

    def _contiguous(self, sent) -> Tensor:
        """[N, H], one row a token, whichever local experts it chose. Weights are applied here: combine only sums."""
        y = torch.zeros_like(sent.x)
        for expert, count in enumerate(sent.counts.tolist()):
            if count:
                row, k = torch.where(sent.topk_ids == expert)
                y.index_add_(0, row, self._expert(expert, sent.x[row]) * sent.topk_weights[row, k, None])
        return y

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])


def shard(model: nn.Module, a2a: AllToAll) -> list[ShardedExperts]:
    """Replace the routed experts of every MoE layer of a DeepSeek-V3 model, in place; returns the replacements."""
    sharded = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = ShardedExperts(layer.mlp.experts, a2a)
            sharded.append(layer.mlp.experts)
    return sharded
