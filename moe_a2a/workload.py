"""Inputs for tests and benchmarks that every rank can derive for every rank: a seed, a rank and a step say everything.

Routing kinds
    uniform   K distinct experts, all equally likely.
    zipf      K distinct experts, drawn without replacement, with probability proportional to 1 / position ** exponent.
              Which expert has which position is a permutation that follows from the seed alone: all ranks and steps
              agree on who is hot.
    k-hot     K hot experts (the first K of that permutation) take a share of every token's choices; the rest is uniform
              over the others.
    zipf-packed, k-hot-packed
              the same with the expert's number as its position, so that the hottest ones share the first rank.
    a Trace   topk ids that a real router produced, read from a file: see ``Trace.load``.

The exponent or the share may stand behind a kind: zipf:1.2, k-hot-packed:0.9 (see `Skew`).

Nothing here touches torch's global random state.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Routing = str
ROUTINGS: tuple[Routing, ...] = ("uniform", "zipf", "k-hot", "zipf-packed", "k-hot-packed")

ZIPF_EXPONENT = 1.0
HOT_SHARE = 0.75


@dataclass(frozen=True)
class Skew:
    """How choices are spread over experts. exponent: of zipf, 0 or more; share: of a token's choices that go to the hot
    experts of k-hot, rounded up to whole choices, above 0 and up to 1; packed: hot experts are neighbours."""

    kind: Literal["uniform", "zipf", "k-hot"]
    exponent: float = ZIPF_EXPONENT
    share: float = HOT_SHARE
    packed: bool = False

    @staticmethod
    def parse(text: str) -> Skew:
        """One of ROUTINGS, all but uniform with `:NUMBER` behind it if it is not the default. Raises ValueError."""
        name, colon, number = text.partition(":")
        try:
            value = float(number) if colon else math.nan
        except ValueError:
            value = -1.0
        packed, is_default = name.endswith("-packed"), not colon
        if name == "uniform" and is_default:
            return Skew("uniform")
        if name in ("zipf", "zipf-packed") and (is_default or 0 <= value < math.inf):
            return Skew("zipf", exponent=ZIPF_EXPONENT if is_default else value, packed=packed)
        if name in ("k-hot", "k-hot-packed") and (is_default or 0 < value <= 1):
            return Skew("k-hot", share=HOT_SHARE if is_default else value, packed=packed)
        raise ValueError(
            f"routing={text!r}; allowed: {', '.join(ROUTINGS)}; zipf may have its exponent behind it (zipf:1.2, 0 or "
            "more), k-hot its share (k-hot:0.9, above 0, up to 1)"
        )


@dataclass(frozen=True)
class Inputs:
    """One rank's input of one step.

    x [T, H]; topk_ids int64 [T, K], -1 = no expert; topk_weights fp32 [T, K], 0 where the id is -1.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


@dataclass(frozen=True)
class Trace:
    """Recorded routing: one int64 [T_i, K] tensor a step."""

    steps: tuple[Tensor, ...]

    @staticmethod
    def load(path: str | Path, experts: int, top_k: int) -> Trace:
        """Read and check a trace.

        FILE.npy: an integer array [steps, T, K], or [T, K] for one step.
        Anything else: JSON lines, one line a step, ``[[id, ...], ...]`` or ``{"topk_ids": [[id, ...], ...]}``; T may
        differ by line. Raises ValueError, naming file, step and token, unless every token has `top_k` ids, every id is
        in -1 .. experts-1, and no token names an expert twice.
        """
        path = Path(path)
        arrays = _read_npy(path) if path.suffix == ".npy" else _read_json_lines(path)
        if not arrays:
            raise ValueError(f"{path}: the trace is empty; it needs at least one step")
        for step, ids in enumerate(arrays):
            _check_trace_step(f"{path}, step {step}", ids, experts, top_k)
        return Trace(tuple(torch.from_numpy(ids.astype(np.int64)) for ids in arrays))

    def rows(self, rank: int, step: int, tokens: int) -> Tensor:
        """topk ids of one rank in one step, int64 [tokens, K].

        Rank 0 takes the step's first tokens, rank 1 the next, and so on, again from the start where they run out; so
        do the steps.
        """
        ids = self.steps[step % len(self.steps)]
        return ids[(rank * tokens + torch.arange(tokens)) % ids.shape[0]]


def make_inputs(
    seed: int,
    rank: int,
    step: int,
    tokens: int,
    *,
    hidden: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
    routing: Routing | Trace = "uniform",
    padding: float = 0.0,
    holes: float = 0.0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """The input that `rank` brings to `step`: the same for whoever asks, whatever they asked before.

    x is standard normal, and made on `device`, where it stays: the same on all devices of one kind. Ids and weights are
    on the CPU and do not depend on it. Weights are positive and sum to 1 over a token's experts, as after a router that
    normalises.
    padding: probability that a token has no expert at all; holes: probability that a single choice is -1.
    """
    generator = _generator(seed, "inputs", rank, step, device=device)
    x = torch.randn(tokens, hidden, generator=generator, device=device).to(dtype)
    if isinstance(routing, Trace):
        topk_ids = routing.rows(rank, step, tokens)
    else:
        topk_ids = make_routing(seed, rank, step, tokens, experts, top_k, routing)
    generator = _generator(seed, "weights", rank, step)
    missing = torch.rand(tokens, top_k, generator=generator) < holes
    missing |= torch.rand(tokens, 1, generator=generator) < padding
    topk_ids = topk_ids.masked_fill(missing, -1)
    weights = (0.1 + torch.rand(tokens, top_k, generator=generator)).masked_fill(topk_ids < 0, 0.0)
    weights /= weights.sum(dim=1, keepdim=True).clamp(min=1e-20)
    return Inputs(x, topk_ids, weights)


def make_routing(seed: int, rank: int, step: int, tokens: int, experts: int, top_k: int, routing: Routing) -> Tensor:
    """Distinct expert ids, int64 [tokens, top_k], a token's in random order. routing: as `Skew.parse` reads it. Raises
    ValueError."""
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"top_k={top_k} distinct experts out of experts={experts}: top_k must be between 1 and experts"
        )
    skew = Skew.parse(routing)
    generator = _generator(seed, "routing", rank, step)
    # The k largest of independent Gumbel(log p) variables are k draws without replacement with probabilities p.
    keys = -torch.empty(tokens, experts).exponential_(generator=generator).log_()
    order = torch.arange(experts) if skew.packed else _popularity(seed, experts)
    if skew.kind == "zipf":
        keys[:, order] -= skew.exponent * torch.arange(1, experts + 1).log()
    if skew.kind == "k-hot":
        return _hot_choices(keys, order[:top_k], skew.share, generator)
    return keys.topk(top_k, dim=1).indices


def _hot_choices(keys: Tensor, hot: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the choices among the `hot` experts, the others elsewhere, shuffled: int64 [T, len(hot)]."""
    tokens, experts = keys.shape
    top_k = len(hot)
    from_hot = max(math.ceil(share * top_k), 2 * top_k - experts)  # few experts: the others may not suffice
    hot_ids = hot[keys[:, hot].topk(from_hot, dim=1).indices]
    cold_ids = keys.index_fill(1, hot, -torch.inf).topk(top_k - from_hot, dim=1).indices
    order = torch.rand(tokens, top_k, generator=generator).argsort(dim=1)
    return torch.cat([hot_ids, cold_ids], dim=1).gather(1, order)


def _popularity(seed: int, experts: int) -> Tensor:
    """Expert ids from the hottest to the coldest, the same on every rank and step."""
    return torch.randperm(experts, generator=_generator(seed, "popularity"))


def _generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every key: neighbouring seeds, ranks and steps must not give related streams."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _read_npy(path: Path) -> list[np.ndarray]:
    array = np.load(path, allow_pickle=False)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise ValueError(f"{path}: the array has shape {array.shape}; allowed: [steps, T, K] or [T, K]")
    return list(array)


def _read_json_lines(path: Path) -> list[np.ndarray]:
    arrays = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            arrays.append(np.asarray(value["topk_ids"] if isinstance(value, dict) else value))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r}; each line is a JSON list of tokens, each a list of top_k "
                'expert ids, or {"topk_ids": that list}'
            ) from error
    return arrays


def _check_trace_step(where: str, ids: np.ndarray, experts: int, top_k: int) -> None:
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] != top_k or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{where}: {ids.dtype} of shape {ids.shape}; allowed: integers [T, K] with T >= 1 and K = top_k = {top_k}"
        )
    bad = np.argwhere((ids < -1) | (ids >= experts))
    if len(bad):
        token, k = bad[0]
        raise ValueError(f"{where}, token {token}: expert id {ids[token, k]}; allowed: -1 (none) .. {experts - 1}")
    ordered = np.sort(ids, axis=1)
    twice = np.argwhere((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
    if len(twice):
        token, k = twice[0]
        raise ValueError(
            f"{where}, token {token}: expert id {ordered[token, k]} is there twice; a token may name an expert once"
        )
