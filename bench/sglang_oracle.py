"""A dispatcher for SGLang that is easy to believe: every rank gathers all tokens and picks its own with torch.

`bench/sglang_server.py` and tests use it as the reference of `--moe-a2a-backend mooncake`: MoE runner, model and server
stay SGLang's own. It is a plug-in by itself (`register`) and never part of the installed package. FP8 rows with fp32
scales, as Hopper's DeepGEMM takes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe_a2a.fp8 import FP8, GROUP, quantize

#: Tokens of each rank in a decode step, padded: the same on all ranks, as ranks may replay graphs of different sizes.
DECODE_TOKENS = int(os.environ.get("MOE_A2A_ORACLE_TOKENS", "64"))
_ALIGNMENT = 128


class Gathered(NamedTuple):
    """Tokens of all ranks, P of each. x: bf16 [R*P, H]; local: int64 [R*P, K], -1 for an expert that is elsewhere;
    weights: fp32 [R*P, K]; padded: P."""

    x: torch.Tensor
    local: torch.Tensor
    weights: torch.Tensor
    padded: int


class Masked(NamedTuple):
    """Rows by expert. rows: [E_l, N, H], scales: [E_l, N, H/128], counts: int32 [E_l], slots: int64 [N, E_l]."""

    rows: torch.Tensor
    scales: torch.Tensor
    counts: torch.Tensor
    slots: torch.Tensor


def gather(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, padded: int, experts: int, group: Any
) -> Gathered:
    """All ranks' tokens, each padded to `padded` rows without experts. experts: E_l."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if len(x) > padded:
        raise ValueError(f"{len(x)} tokens, and the oracle gathers {padded}; set MOE_A2A_ORACLE_TOKENS")

    def all_ranks(mine: torch.Tensor, fill: float) -> torch.Tensor:
        block = mine.new_full((padded, mine.shape[1]), fill)
        block[: len(mine)] = mine
        out = mine.new_empty((ranks * padded, mine.shape[1]))
        dist.all_gather_into_tensor(out, block, group=group)
        return out

    local = all_ranks(ids.to(torch.int64), -1) - rank * experts
    local = torch.where((local >= 0) & (local < experts), local, -1)
    return Gathered(all_ranks(x, 0), local, all_ranks(weights.to(torch.float32), 0), padded)


def to_experts(tokens: Gathered, experts: int) -> Masked:
    """Masked layout, in (rank, token) order. Shapes do not depend on the routing."""
    numbers = torch.arange(experts, device=tokens.x.device)
    match = (tokens.local[:, :, None] == numbers).any(dim=1)  # [N, E_l]
    slots = match.long().cumsum(dim=0) - 1
    n, hidden = tokens.x.shape
    place = torch.where(match, slots, n)  # row n takes what is not for this expert
    q, scales = quantize(tokens.x)
    expert = numbers[None, :].expand(n, experts)
    rows = torch.zeros((experts, n + 1, hidden), dtype=torch.uint8, device=q.device)
    rows[expert, place] = q.view(torch.uint8)[:, None, :].expand(n, experts, hidden)
    by_expert = torch.ones((experts, n + 1, hidden // GROUP), dtype=torch.float32, device=q.device)
    by_expert[expert, place] = scales[:, None, :].expand(n, experts, hidden // GROUP)
    columns = by_expert[:, :n].transpose(1, 2).contiguous().transpose(1, 2)  # stored by column, as DeepGEMM wants
    counts = match.sum(dim=0, dtype=torch.int32)
    return Masked(rows[:, :n].contiguous().view(FP8), columns, counts, slots)


def from_experts(y: torch.Tensor, tokens: Gathered, slots: torch.Tensor) -> torch.Tensor:
    """This rank's weighted sums for all ranks' tokens, bf16 [N, H]. y: bf16 [E_l, N, H]."""
    expert = tokens.local.clamp_min(0)
    rows = y[expert, slots.gather(1, expert).clamp_min(0)].float()  # [N, K, H]
    valid = (tokens.local >= 0)[:, :, None]
    return _in_order(torch.where(valid, rows * tokens.weights[:, :, None], 0.0).unbind(dim=1))


def sum_over_ranks(partial: torch.Tensor, tokens: Gathered, count: int, group: Any) -> torch.Tensor:
    """Sums of this rank's `count` tokens over all ranks, bf16 [T, H]. partial: bf16 [R*P, H]."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    out = partial.new_empty((ranks * len(partial), partial.shape[1]))
    dist.all_gather_into_tensor(out, partial.contiguous(), group=group)
    mine = out.view(ranks, ranks, tokens.padded, -1)[:, rank, :count]
    return _in_order(mine.float().unbind())


def _in_order(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in fp32, one term after the other, rounded once to bf16."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total.to(torch.bfloat16)


def dispatcher_class() -> type:
    """The dispatcher, made once SGLang's classes can be imported."""
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch
    from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput, DeepEPNormalDispatchOutput
    from sglang.srt.layers.moe.utils import DeepEPMode

    class OracleDispatcher(BaseDispatcher):
        def __init__(
            self, group: Any, num_experts: int, num_local_experts: int, deepep_mode: Any, **unused: Any
        ) -> None:
            super().__init__()
            self.group, self.experts, self.local_experts, self.mode = group, num_experts, num_local_experts, deepep_mode

        def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> Any:
            ids, weights = topk_output.topk_ids, topk_output.topk_weights
            self.count = len(hidden_states)
            self.normal = self.mode.resolve(get_is_extend_in_batch()) == DeepEPMode.NORMAL
            if self.normal:
                return self._contiguous(hidden_states, ids, weights)
            self.tokens = gather(hidden_states, ids, weights, DECODE_TOKENS, self.local_experts, self.group)
            got = to_experts(self.tokens, self.local_experts)
            self.slots = got.slots
            expected = (len(ids) * dist.get_world_size(self.group) * ids.shape[1] + self.experts) // self.experts
            return DeepEPLLDispatchOutput(
                got.rows, got.scales, ids.to(torch.int64), weights.to(torch.float32), got.counts, expected
            )

        def _contiguous(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
            most = torch.tensor([self.count], device=x.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
            self.tokens = gather(x, ids, weights, max(1, int(most)), self.local_experts, self.group)
            local = self.tokens.local
            (self.index,) = torch.where((local >= 0).any(dim=1))
            q, scales = quantize(self.tokens.x[self.index])
            mine = local[self.index]
            chosen = mine[mine >= 0]
            counts = torch.bincount(chosen, minlength=self.local_experts).tolist()
            return DeepEPNormalDispatchOutput(
                q,
                scales,
                mine,
                torch.where(mine >= 0, self.tokens.weights[self.index], 0.0),
                [-(-count // _ALIGNMENT) * _ALIGNMENT for count in counts],
            )

        def combine(self, combine_input: Any) -> torch.Tensor:
            y = combine_input.hidden_states
            if self.normal:
                partial = torch.zeros_like(self.tokens.x)
                partial[self.index] = y
            else:
                partial = from_experts(y, self.tokens, self.slots)
            return sum_over_ranks(partial, self.tokens, self.count, self.group)

        def dispatch_a(self, hidden_states: torch.Tensor, topk_output: Any) -> None:
            self._given = (hidden_states, topk_output)

        def dispatch_b(self) -> Any:
            return self.dispatch(*self._given)

        def combine_a(self, combine_input: Any) -> None:
            self._returned = combine_input

        def combine_b(self) -> torch.Tensor:
            return self.combine(self._returned)

    return OracleDispatcher


def register() -> None:
    """Entry point of `sglang.srt.plugins`, in an environment that the benchmark makes."""
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return  # a process without a model
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.layers.moe.token_dispatcher.mooncake.MooncakeEPDispatcher"
    HookRegistry.register(target, dispatcher_class(), HookType.REPLACE)
    print("moe-a2a: the oracle dispatcher is in place", flush=True)
