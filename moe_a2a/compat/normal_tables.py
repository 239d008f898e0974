"""What DeepEP's normal mode says about a routing, as pure functions of tensors. No communication, no synchronisation.

R ranks, E experts, T tokens of this rank, K top-k, C channels: DeepEP's kernels give each pair of SMs a channel, an
equal range of the tokens in order. GPU ranks use `moe_a2a.kernels.normal_tables` instead, for all but `ids_for`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dispatch_layout(
    topk_idx: torch.Tensor, ranks: int, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens for each rank int32 [R], tokens for each expert int32 [E], does a token go to a rank bool [T, R]).

    topk_idx: int64 [T, K]; what is no expert's number counts for nothing.
    """
    device = topk_idx.device
    known = (topk_idx >= 0) & (topk_idx < experts)
    expert = topk_idx.where(known, experts)
    per_expert = torch.zeros(experts + 1, dtype=torch.int32, device=device)
    per_expert.scatter_add_(0, expert.flatten(), torch.ones_like(expert, dtype=torch.int32).flatten())
    hit = torch.zeros(len(topk_idx), ranks + 1, dtype=torch.bool, device=device)
    hit = hit.scatter_(1, expert // (experts // ranks), True)[:, :ranks].contiguous()
    return hit.sum(0, dtype=torch.int32), per_expert[:experts], hit


def channel_tables(hit: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(channel_prefix_matrix int32 [R, C], tokens for a rank in a channel and those before it; send_head int32 [T, R],
    which of its channel's tokens for a rank a token is, -1 for none). hit: bool [T, R]."""
    tokens, ranks = hit.shape
    width = max(1, -(-tokens // channels))
    padded = F.pad(hit, (0, 0, 0, width * channels - tokens)).view(channels, width, ranks)
    within = padded.cumsum(1, dtype=torch.int32)
    prefix = within[:, -1].cumsum(0, dtype=torch.int32).t().clone(memory_format=torch.contiguous_format)
    return prefix, torch.where(hit, within.view(-1, ranks)[:tokens] - 1, -1)


def ids_for(hit: torch.Tensor, experts_per_rank: int, top_k: int) -> torch.Tensor:
    """Expert ids that send tokens where `hit` says: the first expert of each rank. int64 [T, K], -1 behind.

    hit: bool [T, R], no more than K ranks for a token.
    """
    order = hit.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    ids = torch.where(hit.gather(1, order), order * experts_per_rank, -1)
    return F.pad(ids, (0, top_k - ids.shape[1]), value=-1)
