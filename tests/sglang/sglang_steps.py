"""Steps of SGLang's dispatcher layer against an oracle, on CPU ranks and on GPU ranks.

Every rank derives all ranks' tokens from seeds, so that its expected results need no communication. Experts multiply
by a small whole number, hidden states are small whole numbers and weights 0.5 or 1: with bf16 rows every sum is exact,
and results must be equal, not close. Experts are functions of whole tensors, so that they can be captured in graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import sglang_env
import torch
import torch.distributed as dist
from sglang.srt.batch_overlap import operations, operations_strategy
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPLLDispatchOutput,
    DeepEPNormalCombineInput,
    DeepEPNormalDispatchOutput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.utils import dispose_tensor

from moe_a2a.fp8 import pack_ue8m0, quantize
from moe_a2a.sglang_plugin import buffers, limits

#: Largest difference of a sum, relative to the sum of its terms' magnitudes, where rows are FP8: two bf16 roundings.
TOLERANCE = 2.0**-6
FACTORS = 3


@dataclass(frozen=True)
class Model:
    """Sizes. experts: of all ranks."""

    experts: int = 16
    hidden: int = 256
    top_k: int = 4
    decode_tokens: int = 8
    prefill_tokens: int = 24
    ranks: int = 2


@dataclass
class Batch:
    """All ranks' tokens of one layer: lists by rank."""

    x: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]

    def topk(self, rank: int) -> Any:
        return StandardTopKOutput(self.weights[rank], self.ids[rank], None)

    def to(self, device: torch.device) -> Batch:
        return Batch(*([t.to(device) for t in tensors] for tensors in (self.x, self.ids, self.weights)))


def make_batch(model: Model, seed: int, tokens: Sequence[int], padded: float = 0.2) -> Batch:
    """padded: share of rows that hold no token: all ids -1. Some choices of other tokens are -1 too."""
    made = Batch([], [], [])
    for rank, count in enumerate(tokens):
        g = torch.Generator().manual_seed(1000 * seed + rank)
        made.x.append(torch.randint(-3, 4, (count, model.hidden), generator=g).to(torch.bfloat16))
        ids = torch.rand((count, model.experts), generator=g).argsort(dim=1)[:, : model.top_k]
        ids[torch.rand((count, model.top_k), generator=g) < 0.1] = -1
        ids[torch.rand(count, generator=g) < padded] = -1
        made.ids.append(ids.to(torch.int32))
        made.weights.append(torch.where(torch.rand((count, model.top_k), generator=g) < 0.5, 0.5, 1.0))
    return made


def factor(expert: torch.Tensor) -> torch.Tensor:
    """What an expert, by global number, multiplies by: 1 to FACTORS."""
    return (expert % FACTORS + 1).to(torch.float32)


def received_rows(x: torch.Tensor, fp8: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales that a receiver gets of tokens x."""
    if fp8 is None:
        return x, None
    q, scales = quantize(x, power_of_two=fp8 == "ue8m0")
    return q, scales


def dequantized(rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    if scales is None:
        return rows.float()
    if scales.dtype == torch.int32:  # UE8M0: exponents of four groups in a word
        exponents = (
            scales.clone(memory_format=torch.contiguous_format)
            .view(torch.uint8)
            .to(torch.int32)[..., : rows.shape[-1] // 128]
        )
        scales = (exponents << 23).view(torch.float32)
    return (rows.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2)


# what the experts of a rank do


def run_experts(model: Model, rank: int, output: Any) -> Any:
    """Experts of `rank` on what a dispatch returned, as a runner does: the result is the input of combine, and rows and
    scales are emptied."""
    here = model.experts // model.ranks
    rows = dequantized(output.hidden_states, output.hidden_states_scale)
    if isinstance(output, DeepEPLLDispatchOutput):
        factors = factor(torch.arange(here, device=rows.device) + rank * here)
        y = (rows * factors[:, None, None]).to(torch.bfloat16)
        made = DeepEPLLCombineInput(y, output.topk_ids, output.topk_weights)
    else:
        ids = output.topk_ids
        coefficients = torch.where(ids >= 0, output.topk_weights * factor(ids.clamp(min=0) + rank * here), 0.0)
        y = (rows * coefficients.sum(dim=1, keepdim=True)).to(torch.bfloat16)
        made = DeepEPNormalCombineInput(y, output.topk_ids, output.topk_weights)
    if not (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
        dispose_tensor(output.hidden_states)
        if output.hidden_states_scale is not None:
            dispose_tensor(output.hidden_states_scale)
    return made


# checks


def check_dispatch(model: Model, rank: int, batch: Batch, output: Any, fp8: str | None) -> None:
    """Every field of a dispatch's result, bit for bit, against what all ranks brought."""
    here, first = model.experts // model.ranks, rank * (model.experts // model.ranks)
    sent = [received_rows(x, fp8) for x in batch.x]
    if isinstance(output, DeepEPLLDispatchOutput):
        rows = model.ranks * buffers._decode[_sizes(model)].a2a.config.max_tokens_per_rank
        assert output.hidden_states.shape == (here, rows, model.hidden)
        assert torch.equal(output.topk_ids, batch.ids[rank].long()) and output.topk_ids.dtype == torch.int64
        assert torch.equal(output.topk_weights, batch.weights[rank])
        assert output.masked_m.dtype == torch.int32
        count = len(batch.x[rank]) * model.ranks * model.top_k
        assert output.expected_m == (count + model.experts) // model.experts
        for e in range(here):
            hits = [torch.nonzero((ids == first + e).any(dim=1))[:, 0] for ids in batch.ids]
            number = sum(len(hit) for hit in hits)
            assert output.masked_m[e] == number
            _same(output.hidden_states[e, :number], torch.cat([sent[r][0][hit] for r, hit in enumerate(hits)]))
            _check_scales(output, e, [(sent[r][1], hit) for r, hit in enumerate(hits)], fp8, number)
        if fp8 is not None:
            assert rows % 4 == 0 and output.hidden_states_scale.stride()[1:] == (1, rows)
        return
    assert isinstance(output, DeepEPNormalDispatchOutput)
    local = [torch.where((ids >= first) & (ids < first + here), ids - first, -1) for ids in batch.ids]
    hits = [torch.nonzero((ids >= 0).any(dim=1))[:, 0] for ids in local]
    _same(output.hidden_states, torch.cat([sent[r][0][hit] for r, hit in enumerate(hits)]))
    expected_ids = torch.cat([ids[hit] for ids, hit in zip(local, hits, strict=True)]).long()
    assert torch.equal(output.topk_ids, expected_ids) and output.topk_ids.dtype == torch.int64
    weights = torch.cat([w[hit] for w, hit in zip(batch.weights, hits, strict=True)])
    assert torch.equal(output.topk_weights, torch.where(expected_ids >= 0, weights, 0.0))
    counts = [int((expected_ids == e).sum()) for e in range(here)]
    alignment = 128 if deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM else 1
    assert output.num_recv_tokens_per_expert == [-(-c // alignment) * alignment for c in counts]
    _check_scales(output, slice(None), [(sent[r][1], hit) for r, hit in enumerate(hits)], fp8, len(expected_ids))
    if fp8 == "fp32":
        assert output.hidden_states_scale.is_contiguous()


def _check_scales(output: Any, index: Any, parts: list[Any], fp8: str | None, number: int) -> None:
    if fp8 is None:
        assert output.hidden_states_scale is None
        return
    expected = torch.cat([scales[hit] for scales, hit in parts])
    if fp8 == "ue8m0":
        expected = pack_ue8m0(expected)
    assert torch.equal(output.hidden_states_scale[index][:number], expected)


def _same(rows: torch.Tensor, expected: torch.Tensor) -> None:
    assert rows.dtype == expected.dtype and rows.shape == expected.shape
    assert torch.equal(rows.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def check_sums(model: Model, rank: int, batch: Batch, out: torch.Tensor, fp8: str | None) -> None:
    """A combine's result."""
    x, ids, weights = batch.x[rank], batch.ids[rank], batch.weights[rank]
    rows = dequantized(*received_rows(x, fp8))
    terms = torch.where(ids >= 0, weights * factor(ids.clamp(min=0)), 0.0).sum(dim=1, keepdim=True)
    assert out.shape == x.shape and out.dtype == torch.bfloat16
    if fp8 is None:
        assert torch.equal(out.float(), terms * rows)
    else:
        error = (out.float() - terms * rows).abs()
        assert bool((error <= TOLERANCE * terms * rows.abs()).all()), float(error.max())


def _sizes(model: Model) -> buffers.Sizes:
    return buffers.Sizes(model.experts, model.hidden, model.top_k)


# a rank of a test


class Rank:
    """One rank with a model of a few layers. flags: of the server."""

    def __init__(self, model: Model, rank: int, device: torch.device, layers: int = 1, **flags: Any) -> None:
        self.model, self.rank, self.device = model, rank, device
        channels = ("0", "1") if flags.get("enable_two_batch_overlap") else ("0",)
        limits.use(limits.Limits(model.decode_tokens, model.prefill_tokens, channels))
        sglang_env.publish(tp_size=model.ranks, ep_size=model.ranks, **flags)
        self.layers = [
            sglang_env.make_dispatcher(dist.group.WORLD, model.experts, model.hidden, model.top_k, model.ranks)
            for _ in range(layers)
        ]

    def fp8(self, extend: bool) -> str | None:
        """The form of rows in which this rank's steps run."""
        inner = self.layers[0]._inners[0]
        phase = inner._prefill if inner.deepep_mode.resolve(extend).is_normal() else inner._decode
        return phase.rows.fp8

    def batch(self, seed: int, tokens: Sequence[int]) -> Batch:
        return make_batch(self.model, seed, tokens).to(self.device)

    def step(self, layer: int, batch: Batch, extend: bool) -> Any:
        """One checked step of a layer. Returns dispatch's result."""
        set_is_extend_in_batch(extend)
        dispatcher, rank, fp8 = self.layers[layer], self.rank, self.fp8(extend)
        output = dispatcher.dispatch(hidden_states=batch.x[rank], topk_output=batch.topk(rank))
        check_dispatch(self.model, rank, batch, output, fp8)
        out = dispatcher.combine(combine_input=run_experts(self.model, rank, output))
        check_sums(self.model, rank, batch, out, fp8)
        return output


# two-batch overlap, in the order of SGLang's own strategies


class OverlappedLayer:
    """Stands for a decoder layer: operations of a strategy by name; those that are not the dispatcher's do nothing."""

    is_layer_sparse = True

    def __init__(self, rank: Rank, layer: int, extend: bool) -> None:
        self._rank, self._dispatcher, self._fp8 = rank, rank.layers[layer], rank.fp8(extend)
        self.mlp = self.self_attn = self
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("op_"):
            return lambda state: None
        raise AttributeError(name)

    def _batch(self, state: Any) -> Batch:
        return state.batches[self._layer]

    def op_dispatch_a(self, state: Any) -> None:
        batch, rank = self._batch(state), self._rank.rank
        self._dispatcher.dispatch_a(
            hidden_states=batch.x[rank], topk_output=batch.topk(rank), tbo_subbatch_index=state.index
        )

    def op_dispatch_b(self, state: Any) -> None:
        state.output = self._dispatcher.dispatch_b(tbo_subbatch_index=state.index)

    def op_experts(self, state: Any) -> None:
        rank = self._rank
        if state.check:
            check_dispatch(rank.model, rank.rank, self._batch(state), state.output, self._fp8)
        state.combine_input = run_experts(rank.model, rank.rank, state.output)

    def op_combine_a(self, state: Any) -> None:
        self._dispatcher.combine_a(combine_input=state.combine_input, tbo_subbatch_index=state.index)

    def op_combine_b(self, state: Any) -> None:
        state.sums[self._layer] = self._dispatcher.combine_b(tbo_subbatch_index=state.index)


def overlapped(rank: Rank, batches: Sequence[Sequence[Batch]], extend: bool, check: bool = True) -> list[Any]:
    """Two micro-batches through all layers, interleaved as SGLang interleaves them. batches: by micro-batch and layer.
    Returns their states, with `sums` by layer."""
    set_is_extend_in_batch(extend)
    make = operations_strategy._compute_moe_deepseek_blog_prefill
    if not extend:
        make = operations_strategy._compute_moe_deepseek_blog_decode
    strategies = [make(OverlappedLayer(rank, layer, extend)) for layer in range(len(rank.layers))]
    stages = operations._convert_operations_to_stages([o for s in strategies for o in s.operations])
    states = [
        SimpleNamespace(index=index, batches=batches[index], sums={}, check=check, output=None) for index in (0, 1)
    ]
    for which, stage in interleaved(len(stages), strategies[0].tbo_delta_stages):
        for operation in stages[stage]:
            operation.fn(state=states[which])
    return states


def interleaved(stages: int, delta: int) -> Iterator[tuple[int, int]]:
    """(micro-batch, stage) in the order of SGLang's `execute_overlapped_operations`."""
    for number in range(stages + delta):
        if number < stages:
            yield 0, number
        if number >= delta:
            yield 1, number - delta


def check_overlapped(rank: Rank, states: Sequence[Any], extend: bool) -> None:
    for state in states:
        for layer, out in state.sums.items():
            check_sums(rank.model, rank.rank, state.batches[layer], out, rank.fp8(extend))
