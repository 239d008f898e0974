"""Contiguous steps of virtual ranks against the oracle, for the interpreter (tests/test_contiguous.py) and for GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from virtual_steps import POISON, bits, make_inputs, sizes_of

from moe_a2a import Contiguous, Grouped, Handle
from moe_a2a import reference as ref
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.virtual import VirtualGroup
from moe_a2a.workload import Inputs


def rows_of(got: Contiguous) -> int:
    return int(got.tokens_per_rank.sum())


def check_dispatch(
    group: VirtualGroup,
    inputs: Sequence[Inputs],
    got: Sequence[Contiguous | None],
    fp8: ScaleFormat | None = None,
    weights: bool = True,
    ranks: Sequence[int] | None = None,
) -> None:
    """Every received row to the bit, and nothing that looks like a token behind the last."""
    payload, scales = [i.x for i in inputs], None
    if fp8 is not None:
        payload, scales = zip(*[ref.quantise(i.x, fp8) for i in inputs], strict=True)
    check_rows(group, inputs, payload, scales, got, weights, ranks)


def check_rows(
    group: VirtualGroup,
    inputs: Sequence[Inputs],
    payload: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    got: Sequence[Contiguous | None],
    weights: bool = True,
    ranks: Sequence[int] | None = None,
) -> None:
    """As `check_dispatch`, for rows and scales as they are handed out."""
    ids, given = [i.topk_ids for i in inputs], [i.topk_weights for i in inputs] if weights else None
    for rank in range(len(group.ranks)) if ranks is None else ranks:
        want = ref.dispatch_contiguous(sizes_of(group), payload, ids, given, rank, scales)
        have = got[rank]
        assert have is not None
        assert torch.equal(have.tokens_per_rank.cpu(), want.tokens_per_rank), f"rank {rank}: tokens_per_rank"
        assert torch.equal(have.counts.cpu(), want.counts), f"rank {rank}: counts"
        n = len(want.x)
        assert torch.equal(have.topk_ids[:n].cpu(), want.topk_ids), f"rank {rank}: topk_ids"
        assert torch.equal(have.source[:n].cpu(), want.source), f"rank {rank}: source"
        assert torch.equal(bits(have.x[:n].cpu()), bits(want.x)), f"rank {rank}: rows"
        assert (have.topk_ids[n:] == -1).all() and (have.source[n:] == -1).all(), (
            f"rank {rank}: ids behind the last row"
        )
        assert (have.topk_weights is None) == (want.topk_weights is None)
        if have.topk_weights is not None:
            assert torch.equal(bits(have.topk_weights[:n].cpu()), bits(want.topk_weights)), f"rank {rank}: weights"
            assert (have.topk_weights[n:] == 0).all(), f"rank {rank}: weights behind the last row"
        assert (have.scales is None) == (want.scales is None)
        if have.scales is not None and want.scales is not None:
            assert have.scales.dtype == want.scales.dtype
            if len(have.scales) == n > 1:
                assert (have.scales.stride(0) == 1) == (want.scales.stride(0) == 1)
            assert torch.equal(have.scales[:n].cpu(), want.scales), f"rank {rank}: scales"


def check_grouped(
    group: VirtualGroup,
    inputs: Sequence[Inputs],
    got: Sequence[Grouped | None],
    fp8: ScaleFormat | None,
    alignment: int,
    ranks: Sequence[int] | None = None,
) -> None:
    """Every field and row to the bit, and nothing behind the last expert's rows."""
    payload, scales = [i.x for i in inputs], None
    if fp8 is not None:
        payload, scales = zip(*[ref.quantise(i.x, fp8) for i in inputs], strict=True)
    ids, weights = [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]
    for rank in range(len(group.ranks)) if ranks is None else ranks:
        have = got[rank]
        assert have is not None
        want = ref.dispatch_grouped(sizes_of(group), payload, ids, weights, rank, alignment, scales)
        assert torch.equal(have.counts.cpu(), want.counts) and torch.equal(have.offsets.cpu(), want.offsets)
        n = len(want.x)
        assert torch.equal(have.expert_ids[:n].cpu(), want.expert_ids) and (have.expert_ids[n:] == -1).all()
        assert torch.equal(have.source[:n].cpu(), want.source) and (have.source[n:] == -1).all()
        assert have.topk_weights is not None and torch.equal(have.topk_weights[:n].cpu(), want.topk_weights)
        assert (have.topk_weights[n:] == 0).all()
        rows = want.expert_ids >= 0
        assert torch.equal(bits(have.x[:n].cpu()[rows]), bits(want.x[rows]))
        if want.scales is not None:
            assert have.scales is not None and have.scales.stride(0) == 1
            assert torch.equal(have.scales[:n].cpu()[rows], want.scales[rows])


def check_combine(
    group: VirtualGroup,
    inputs: Sequence[Inputs],
    y: Sequence[Tensor],
    out: Sequence[Tensor | None],
    ranks: Sequence[int] | None = None,
) -> None:
    """Sums to the bit. y: the experts' outputs of every rank, exactly the received rows."""
    for rank in range(len(group.ranks)) if ranks is None else ranks:
        want = ref.combine_contiguous(sizes_of(group), y, [i.topk_ids for i in inputs], rank)
        have = out[rank]
        assert have is not None
        furthest = (have.cpu().float() - want.float()).abs().amax() if len(want) else 0.0
        assert torch.equal(bits(have.cpu()), bits(want)), f"rank {rank}: combine differs by up to {furthest}"


def expert_outputs(group: VirtualGroup, rows: Sequence[int], seed: int) -> list[Tensor]:
    """[n, H] for every rank."""
    made = []
    for rank, n in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        made.append(torch.randn(n, group.layout.H, generator=generator).to(group.config.dtype))
    return made


class ContiguousSteps:
    """Makes checked steps with one group. What a step uses is poisoned before."""

    def __init__(self, group: VirtualGroup, seed: int = 0) -> None:
        self.group, self.seed, self.number = group, seed, 0

    def inputs(self, tokens: Sequence[int], **options: Any) -> list[Inputs]:
        return make_inputs(self.group.config, self.seed, self.number, tokens, **options)

    def there(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(self.group.device) for t in tensors]

    def poison(self, channel: str | None = None) -> None:
        """The block in which the next step's rows will lie, and the sums of both: whatever is read must be written."""
        layout = self.group.layout
        for rank in self.group.ranks:
            state = rank._channels[rank._index(channel)]
            start = ((state.eager.calls + 1) % 2) * layout.parity_bytes
            state.region[start + layout.table : start + layout.sums] = POISON
            if not state.eager.open:
                for parity in range(2):
                    end = (parity + 1) * layout.parity_bytes
                    state.region[parity * layout.parity_bytes + layout.sums : end] = POISON

    def dispatch(
        self,
        inputs: Sequence[Inputs],
        fp8: ScaleFormat | None = None,
        weights: bool = True,
        channel: str | None = None,
        ids_dtype: torch.dtype = torch.int64,
        **options: Any,
    ) -> list[Contiguous]:
        self.number += 1
        self.poison(channel)
        got = self.group.dispatch(
            self.there([i.x for i in inputs]),
            self.there([i.topk_ids.to(ids_dtype) for i in inputs]),
            self.there([i.topk_weights for i in inputs]) if weights else None,
            layout="contiguous",
            fp8=fp8,
            channel=channel,
            **options,
        )
        check_dispatch(self.group, inputs, got, fp8, weights)
        return got

    def outputs(self, got: Sequence[Contiguous]) -> tuple[list[Tensor], list[Tensor]]:
        """(Experts' outputs for the received rows, the same with NaN in the rows behind them.)"""
        y = expert_outputs(self.group, [rows_of(d) for d in got], self.number)
        padded = []
        for rows, d in zip(y, got, strict=True):
            full = torch.full((len(d.x), rows.shape[1]), float("nan"), dtype=rows.dtype, device=self.group.device)
            full[: len(rows)] = rows.to(full.device)
            padded.append(full)
        return y, padded

    def combine(self, inputs: Sequence[Inputs], got: Sequence[Contiguous], apart: bool = False) -> list[Tensor]:
        """apart: send and receive as two calls, between which y is spoilt."""
        y, padded = self.outputs(got)
        handles: list[Handle] = [d.handle for d in got]
        outs = [torch.full_like(i.x, float("nan"), device=self.group.device) for i in inputs]
        if apart:
            for rank, handle, rows in zip(self.group.contiguous, handles, padded, strict=True):
                rank.combine_send(rows, handle)
                rows.fill_(float("nan"))
            for rank, handle, out in zip(self.group.contiguous, handles, outs, strict=True):
                rank.combine_recv(handle, out=out)
        else:
            self.group.combine(padded, handles, out=outs)
        check_combine(self.group, inputs, y, outs)
        return outs

    def step(self, tokens: Sequence[int], fp8: ScaleFormat | None = None, **options: Any) -> None:
        how = {name: options.pop(name) for name in ("weights", "host_counts") if name in options}
        apart = options.pop("apart", False)
        inputs = self.inputs(tokens, **options)
        self.combine(inputs, self.dispatch(inputs, fp8, **how), apart)
        self.group.check()
