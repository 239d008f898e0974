"""Steps of virtual ranks against the oracle, for the interpreter (tests/test_virtual.py) and for GPUs (tests/gpu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_a2a import Config, workload
from moe_a2a import reference as ref
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.types import Handle, Masked
from moe_a2a.virtual import VirtualGroup
from moe_a2a.workload import Inputs

POISON = 0x7F  # as bytes: NaN in FP8 and bf16, huge in int32


def group_of(
    ranks: int, *, hidden: int = 128, top_k: int = 2, tokens: int = 3, experts: int = 8, **options: Any
) -> VirtualGroup:
    """A small group in the interpreter."""
    channels = options.pop("channels", ("default",))
    dtype = options.pop("dtype", torch.bfloat16)
    return VirtualGroup(Config(experts, hidden, top_k, tokens, dtype, channels), ranks, "cpu", **options)


def sizes_of(group: VirtualGroup) -> ref.Sizes:
    config = group.config
    return ref.Sizes(len(group.ranks), config.num_experts, config.max_tokens_per_rank)


def make_inputs(config: Config, seed: int, step: int, tokens: Sequence[int], **options: Any) -> list[Inputs]:
    return [
        workload.make_inputs(
            seed,
            rank,
            step,
            count,
            hidden=config.hidden_size,
            experts=config.num_experts,
            top_k=config.top_k,
            dtype=config.dtype,
            **options,
        )
        for rank, count in enumerate(tokens)
    ]


def expert_outputs(group: VirtualGroup, seed: int) -> list[Tensor]:
    """A [E_l, R*M, H] for every rank. Rows near one another differ; far ones may be equal, which keeps this cheap."""
    layout, made = group.layout, []
    for rank in range(layout.R):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        pool = torch.randn(127, layout.H, generator=generator).to(group.config.dtype)
        made.append(pool[torch.arange(layout.E_L * layout.CAP) % 127].view(layout.E_L, layout.CAP, layout.H))
    return made


def bits(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals NaN and 0 differs from -0."""
    return tensor.contiguous().view(torch.uint8)


def poison(results: Sequence[Masked]) -> None:
    """Overwrite what a step returned: the step that uses this storage next must write all that it claims to."""
    for got in results:
        for tensor in (got.x, got.counts, got.source, got.scales):
            if tensor is not None:
                storage = tensor.transpose(1, 2) if tensor is got.scales else tensor
                storage.view(torch.uint8).fill_(POISON)


def check_dispatch(
    group: VirtualGroup,
    inputs: Sequence[Inputs],
    got: Sequence[Masked | None],
    fp8: ScaleFormat | None,
    ranks: Sequence[int] | None = None,
) -> None:
    """Every valid row, in its place, to the bit; and no other row touched, if x was poisoned before."""
    if fp8 is None:
        check_rows(group, inputs, [i.x for i in inputs], None, got, ranks)
    else:
        payload, scales = zip(*[ref.quantise(i.x, fp8) for i in inputs], strict=True)
        check_rows(group, inputs, payload, scales, got, ranks)


def check_rows(
    group: VirtualGroup,
    inputs: Sequence[Inputs],
    payload: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    got: Sequence[Masked | None],
    ranks: Sequence[int] | None = None,
) -> None:
    """As `check_dispatch`, for rows and scales as they are handed out."""
    ids = [i.topk_ids for i in inputs]
    for rank in range(len(group.ranks)) if ranks is None else ranks:
        want = ref.dispatch_masked(sizes_of(group), payload, ids, rank, scales)
        have = got[rank]
        assert have is not None
        counts = have.counts.cpu()
        assert torch.equal(counts, want.counts), f"rank {rank}: counts {counts.tolist()}, want {want.counts.tolist()}"
        valid = torch.arange(group.layout.CAP)[None, :] < want.counts[:, None]
        room = (slice(None), slice(group.layout.CAP))  # R*M rows, or less
        assert torch.equal(have.source.cpu()[valid], want.source[room][valid]), f"rank {rank}: source"
        on_device = valid.to(have.x.device)
        rows = have.x.view(torch.uint8)
        assert torch.equal(rows[on_device].cpu(), want.x.view(torch.uint8)[room][valid]), f"rank {rank}: rows"
        assert (rows[~on_device] == POISON).all(), f"rank {rank}: a row that holds no token was written"
        if want.scales is not None:
            assert have.scales is not None and have.scales.dtype == want.scales.dtype
            assert have.scales.stride()[1:] == (1, group.layout.CAP)
            assert torch.equal(bits(have.scales[on_device]).cpu(), bits(want.scales[room][valid])), (
                f"rank {rank}: scales"
            )


def check_combine(
    group: VirtualGroup,
    inputs: Sequence[Inputs],
    y: Sequence[Tensor],
    got: Sequence[Tensor | None],
    ranks: Sequence[int] | None = None,
) -> None:
    """Sums to the bit: the kernels round where the oracle does."""
    most = group.layout.MOST - group.layout.CAP  # rows that the oracle has and the group has no room for
    y = [torch.nn.functional.pad(rows, (0, 0, 0, most)) for rows in y]
    for rank in range(len(group.ranks)) if ranks is None else ranks:
        want = ref.combine_masked(sizes_of(group), y, [i.topk_ids for i in inputs], inputs[rank].topk_weights, rank)
        have = got[rank]
        assert have is not None
        furthest = (have.cpu().float() - want.float()).abs().amax() if len(want) else 0.0
        assert torch.equal(bits(have.cpu()), bits(want)), f"rank {rank}: combine differs by up to {furthest}"


class Steps:
    """Makes checked steps with one group; poisons whatever earlier steps left in the outputs."""

    def __init__(self, group: VirtualGroup, seed: int = 0) -> None:
        self.group, self.seed, self.number = group, seed, 0
        self.earlier: dict[str | None, list[list[Masked]]] = {}
        self.outs: dict[tuple[str | None, torch.dtype, int], list[Tensor]] = {}

    def inputs(self, tokens: Sequence[int], **options: Any) -> list[Inputs]:
        return make_inputs(self.group.config, self.seed, self.number, tokens, **options)

    def there(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(self.group.device) for t in tensors]

    def dispatch(
        self,
        inputs: Sequence[Inputs],
        fp8: ScaleFormat | None = None,
        weights: bool = True,
        channel: str | None = None,
        ids_dtype: torch.dtype = torch.int64,
    ) -> list[Masked]:
        self.number += 1
        earlier = self.earlier.setdefault(channel, [])
        if len(earlier) >= 2:
            poison(earlier[-2])  # its counts, source and scales are used again now
        handles = self.group.dispatch_send(
            self.there([i.x for i in inputs]),
            self.there([i.topk_ids.to(ids_dtype) for i in inputs]),
            self.there([i.topk_weights for i in inputs]) if weights else None,
            fp8=fp8,
            channel=channel,
        )
        got = self.group.dispatch_recv(handles, out=self.poisoned(fp8, channel))
        earlier.append(got)
        check_dispatch(self.group, inputs, got, fp8)
        return got

    def poisoned(self, fp8: ScaleFormat | None, channel: str | None = None) -> list[Tensor]:
        """Storage for every rank's x, in turns as the group's own is."""
        layout = self.group.layout
        dtype = torch.float8_e4m3fn if fp8 else self.group.config.dtype
        key = (channel, dtype, self.number % 2)
        if key not in self.outs:
            shape = (layout.E_L, layout.CAP, layout.H)
            self.outs[key] = [torch.empty(shape, dtype=dtype, device=self.group.device) for _ in range(layout.R)]
        for tensor in self.outs[key]:
            tensor.view(torch.uint8).fill_(POISON)
        return self.outs[key]

    def combine(self, inputs: Sequence[Inputs], handles: Sequence[Handle], weights: bool = False) -> list[Tensor]:
        y = expert_outputs(self.group, self.number)
        ids = [i.topk_ids for i in inputs]
        spoilt = self.there(y)
        for rank, rows in enumerate(spoilt):
            counts = ref.dispatch_masked(sizes_of(self.group), [i.x for i in inputs], ids, rank).counts
            empty = torch.arange(rows.shape[1])[None, :] >= counts[:, None]
            if rows is y[rank]:
                spoilt[rank] = rows = rows.clone()
            rows[empty.to(rows.device)] = float("nan")  # what no token filled must not be read
        outs = [torch.full_like(i.x, float("nan"), device=self.group.device) for i in inputs]
        got = self.group.combine(
            spoilt,
            handles,
            self.there([i.topk_weights for i in inputs]) if weights else None,
            out=outs,
        )
        check_combine(self.group, inputs, y, got)
        return got

    def step(self, tokens: Sequence[int], fp8: ScaleFormat | None = None, weights: bool = True, **options: Any) -> None:
        inputs = self.inputs(tokens, **options)
        got = self.dispatch(inputs, fp8, weights)
        self.combine(inputs, [d.handle for d in got], not weights)
        self.group.check()


def without(inputs: list[Inputs], rank: int) -> list[Inputs]:
    """The inputs as a rank sees them that did not hear from `rank`."""
    gone = inputs[rank]
    empty = type(gone)(gone.x[:0], gone.topk_ids[:0], gone.topk_weights[:0])
    return [*inputs[:rank], empty, *inputs[rank + 1 :]]


def send(group: VirtualGroup, inputs: Sequence[Inputs], rank: int) -> GpuHandle:
    i = inputs[rank]
    return group.ranks[rank].dispatch_send(i.x, i.topk_ids, i.topk_weights)
