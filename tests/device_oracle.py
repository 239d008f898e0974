"""What dispatch and combine must give, in a few dense tensor operations on the device itself: fast enough to check
each of thousands of steps, to the bit and without a synchronisation. tests/test_device_oracle.py checks it against the
oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_a2a import Config, Masked
from moe_a2a import reference as ref
from moe_a2a.fp8 import ScaleFormat, convert_scales, quantize

POISON = 0x7F


def experts(rows: Tensor, scales: Tensor | None, first: int) -> Tensor:
    """Stands for the experts: multiplies by 1/2, 1 or 2, which is exact. rows: [E_l, n, H] in bf16, or FP8 with scales;
    first: the number of the first of them. Returns bf16 [E_l, n, H]."""
    plain = rows if scales is None else ref.dequantise(rows, scales).to(torch.bfloat16)
    return plain * factors(rows.device, first, rows.shape[0])[:, None, None]


def factors(device: torch.device, first: int, count: int) -> Tensor:
    numbers = torch.arange(first, first + count, device=device)
    return torch.exp2((numbers % 3 - 1).float()).to(torch.bfloat16)


@dataclass
class World:
    """What all ranks bring to a step, equal wherever it is made with one kind of device. x: bf16 [R, M, H]; ids: int64
    [R, M, K], -1 for no expert and for tokens that are not there; weights: fp32 [R, M, K]."""

    config: Config
    tokens: list[int]
    x: Tensor
    ids: Tensor
    weights: Tensor

    @staticmethod
    def make(config: Config, tokens: list[int], seed: int, device: torch.device) -> World:
        ranks, most, top_k = len(tokens), config.max_tokens_per_rank, config.top_k
        generator = torch.Generator(device).manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        x = torch.randn((ranks, most, config.hidden_size), generator=generator, device=device).to(torch.bfloat16)
        ids = uniform(ranks, most, config.num_experts).topk(top_k, dim=2).indices
        is_there = torch.arange(most, device=device)[None] < torch.tensor(tokens, device=device)[:, None]
        ids = ids.where(is_there[:, :, None] & (uniform(ranks, most, top_k) > 0.15), -1)
        return World(config, tokens, x, ids, uniform(ranks, most, top_k))

    def of(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, topk_ids and topk_weights of a rank."""
        count = self.tokens[rank]
        return self.x[rank, :count], self.ids[rank, :count], self.weights[rank, :count]

    def payload(self, fp8: ScaleFormat | None) -> tuple[Tensor, Tensor | None]:
        """Rows as experts get them, [R*M, H], and their scales [R*M, S]."""
        rows = self.x.flatten(0, 1)
        if fp8 is None:
            return rows, None
        q, scales = quantize(rows, power_of_two=fp8 != "fp32")
        return q, convert_scales(scales, fp8)

    def wrong_rows(self, rank: int, got: Masked, fp8: ScaleFormat | None) -> Tensor:
        """How many things are wrong with what a rank received, whose x was full of POISON: counts, sources, rows,
        scales, and rows that were written and hold no token. int64 [5]."""
        local = self.config.local_experts(len(self.tokens))
        own = self.ids.flatten(0, 1) - rank * local
        places = len(own)
        chosen = torch.zeros((places, local + 1), dtype=torch.int64, device=own.device)
        chosen.scatter_(1, own.where((own >= 0) & (own < local), local), 1)
        chosen = chosen[:, :local].T
        counts = chosen.sum(1)
        slots = (chosen.cumsum(1) - 1).where(chosen > 0, places)
        every = torch.arange(places, device=own.device)
        source = torch.zeros((local, places + 1), dtype=torch.int64, device=own.device)
        source = source.scatter_(1, slots, every.expand(local, -1))[:, :places]
        valid = every[None, :] < counts[:, None]
        source = source.where(valid, 0)
        rows, scales = self.payload(fp8)
        differs = (got.x.view(torch.uint8) != rows.view(torch.uint8)[source]).any(2)
        written = (got.x.view(torch.uint8) != POISON).any(2)
        wrong_scales = torch.zeros_like(valid)
        if scales is not None:
            assert got.scales is not None
            wrong_scales = (got.scales != scales[source]).any(2)
        return torch.stack(
            [
                (got.counts != counts).sum(),
                (valid & (got.source != source)).sum(),
                (valid & differs).sum(),
                (valid & wrong_scales).sum(),
                (~valid & written).sum(),
            ]
        )

    def sums(self, rank: int, fp8: ScaleFormat | None) -> Tensor:
        """What a rank gets back from `experts`: bf16 [T, H]."""
        _, ids, weights = self.of(rank)
        count, most, ranks = self.tokens[rank], self.config.max_tokens_per_rank, len(self.tokens)
        payload, scales = self.payload(fp8)
        mine = slice(rank * most, rank * most + count)
        plain = payload[mine] if scales is None else ref.dequantise(payload[mine], scales[mine]).to(torch.bfloat16)
        local = self.config.local_experts(ranks)
        factor = factors(plain.device, 0, self.config.num_experts)[ids.clamp_min(0)]
        total = torch.zeros(plain.shape, device=plain.device)
        for owner in range(ranks):
            part = torch.zeros_like(total)
            weight = weights.where((ids >= 0) & (ids // local == owner), 0.0)
            for k in range(self.config.top_k):
                part += (plain * factor[:, k, None]).float() * weight[:, k, None]
            total += part.to(torch.bfloat16).float()
        return total.to(torch.bfloat16)

    def check_against_reference(self, rank: int, got: Masked, out: Tensor, fp8: ScaleFormat | None) -> None:
        """The same by the oracle, on the CPU. Raises AssertionError."""
        sizes = ref.Sizes(len(self.tokens), self.config.num_experts, self.config.max_tokens_per_rank)
        x, ids, _ = zip(*[[t.cpu() for t in self.of(r)] for r in range(sizes.ranks)], strict=True)
        scales: list[Tensor] | None = None
        payload = list(x)
        if fp8 is not None:
            payload, scales = map(list, zip(*[ref.quantise(rows, fp8) for rows in x], strict=True))
        ys = []
        for r in range(sizes.ranks):
            want = ref.dispatch_masked(sizes, payload, ids, r, scales)
            ys.append(experts(want.x, want.scales, r * sizes.experts_per_rank))
            if r == rank:
                assert torch.equal(got.counts.cpu(), want.counts)
                valid = torch.arange(want.source.shape[1])[None, :] < want.counts[:, None]
                assert torch.equal(got.source.cpu()[valid], want.source[valid])
                assert torch.equal(got.x.cpu().view(torch.uint8)[valid], want.x.view(torch.uint8)[valid])
        want_sums = ref.combine_masked(sizes, ys, ids, self.of(rank)[2].cpu(), rank)
        assert torch.equal(out.cpu().view(torch.int16), want_sums.view(torch.int16))
