"""`permute` and `unpermute` in torch, for CPU tensors. `moe_a2a.permutation` has checked all but values."""

from __future__ import annotations

import torch

from moe_a2a.errors import InputError
from moe_a2a.fp8 import FP8
from moe_a2a.permuted import Permuted, check_room, wrong_id
from moe_a2a.rows import gather_segments

_CHUNK = 64  # tokens that are summed at a time: few enough for the cache


def permute(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    experts: int,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    alignment: int,
    valid: torch.Tensor | None,
    capacity: int | None,
) -> Permuted:
    tokens, top_k = topk_ids.shape
    ids = topk_ids[: _count(valid, tokens)].flatten()
    wrong = ((ids < -1) | (ids >= experts)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise wrong_id(*divmod(first, top_k), int(ids[first]), experts)
    choice = (ids >= 0).nonzero().flatten()
    choice = choice[ids[choice].argsort(stable=True)]  # by expert, and in (token, k) order inside
    expert = ids[choice].long()
    counts = torch.bincount(expert, minlength=experts)
    padded = (counts + alignment - 1) // alignment * alignment
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    needed = int(offsets[-1])
    rows = needed if capacity is None else capacity
    check_room(needed, rows)
    to = torch.arange(len(choice)) - (counts.cumsum(0) - counts)[expert] + offsets[expert]

    out_x = x.new_empty(rows, x.shape[1])
    token = choice // top_k
    table, target = (t.view(torch.uint8) if t.dtype == FP8 else t for t in (x, out_x))
    gather_segments(table, token.numpy(), counts.numpy(), offsets.numpy(), target)
    expert_ids, source = (torch.full((rows,), -1, dtype=torch.int32) for _ in range(2))
    expert_ids[to], source[to] = expert.int(), token.int()
    places = torch.full((tokens * top_k,), -1, dtype=torch.int32)
    places[choice] = to.int()
    weights, by_row = None, None
    if topk_weights is not None:
        weights = torch.zeros(rows)
        weights[to] = topk_weights.flatten()[choice]
    if scales is not None:
        by_row = scales.new_empty(scales.shape[1], rows).t()
        by_row[to] = scales[token]
    return Permuted(out_x, expert_ids, counts.int(), offsets.int(), weights, source, by_row, places.view(tokens, top_k))


def unpermute(
    y: torch.Tensor,
    places: torch.Tensor,
    topk_weights: torch.Tensor | None,
    valid: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    tokens = _count(valid, len(places))
    places = places[:tokens]
    wrong = (places >= len(y)).nonzero()
    if len(wrong):
        t, k = wrong[0].tolist()
        raise InputError(
            f"places[{t}, {k}] = {int(places[t, k])}, and y has {len(y)} rows; give one row for each row that permute "
            "returned"
        )
    for first in range(0, tokens, _CHUNK):
        its = places[first : first + _CHUNK].long()
        total = torch.zeros(len(its), y.shape[1])
        for k in range(its.shape[1]):
            token = (its[:, k] >= 0).nonzero().flatten()
            value = y[its[token, k]].float()
            if topk_weights is not None:
                value *= topk_weights[first + token, k, None]
            total[token] += value
        out[first : first + len(its)] = total.to(out.dtype)


def _count(valid: torch.Tensor | None, tokens: int) -> int:
    return tokens if valid is None else min(max(int(valid), 0), tokens)
