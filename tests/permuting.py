"""Routings and expectations for permute and unpermute, shared by the tests of CPUs, of the interpreter and of GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_a2a import Permuted

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("expert_ids", "counts", "offsets", "source", "places")


def routing(tokens: int, top_k: int, experts: int, seed: int = 0, holes: float = 0.2, **options: Any) -> Tensor:
    """Ids [T, K] with holes of -1. A token may name an expert twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator, **options)
    return ids.masked_fill(torch.rand(tokens, top_k, generator=generator) < holes, -1)


def rows_of(tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals NaN and 0 differs from -0."""
    return tensor.contiguous().view(torch.uint8).cpu()


def check(
    got: Permuted,
    x: Tensor,
    ids: Tensor,
    experts: int,
    alignment: int,
    weights: Tensor | None = None,
    scales: Tensor | None = None,
    valid: int | None = None,
) -> None:
    """All of a result, for CPU inputs, against loops over experts and choices."""
    wanted: dict[str, list[int]] = {name: [] for name in NAMES}
    places = torch.full(ids.shape, -1).tolist()
    chosen = ids[: len(ids) if valid is None else valid].tolist()
    choice_of: list[tuple[int, int] | None] = []  # of each row
    wanted["offsets"].append(0)
    for e in range(experts):
        here = [(t, k) for t, its in enumerate(chosen) for k, i in enumerate(its) if i == e]
        for t, k in here:
            places[t][k] = len(choice_of)
            choice_of.append((t, k))
        wanted["counts"].append(len(here))
        choice_of += [None] * (-len(here) % alignment)
        wanted["offsets"].append(len(choice_of))
    assert len(choice_of) <= len(got.x)
    choice_of += [None] * (len(got.x) - len(choice_of))
    wanted["source"] = [-1 if c is None else c[0] for c in choice_of]
    wanted["expert_ids"] = [-1 if c is None else chosen[c[0]][c[1]] for c in choice_of]
    for name in NAMES:
        tensor = getattr(got, name)
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == (places if name == "places" else wanted[name]), name

    row = [i for i, c in enumerate(choice_of) if c is not None]
    token, k = [wanted["source"][i] for i in row], [c[1] for c in choice_of if c is not None]
    assert got.x.dtype == x.dtype and torch.equal(bits(got.x[row]), bits(x[token]))
    if weights is None:
        assert got.topk_weights is None
    else:
        by_row = torch.zeros(len(choice_of))
        by_row[row] = weights[token, k]
        assert got.topk_weights is not None and torch.equal(got.topk_weights.cpu(), by_row)
    if scales is None:
        assert got.scales is None
    else:
        assert got.scales is not None and got.scales.dtype == scales.dtype
        assert got.scales.shape == (len(got.x), scales.shape[1]) and got.scales.t().is_contiguous()
        assert torch.equal(bits(got.scales[row]), bits(scales[token]))


def summed(y: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """What unpermute returns for CPU tensors, one token and one choice after the other."""
    out = torch.zeros(len(places), y.shape[1])
    for t, its in enumerate(places.tolist()):
        for k, at in enumerate(its):
            if at >= 0:
                out[t] += y[at].float() * (1.0 if weights is None else weights[t, k])
    return out.to(y.dtype)
