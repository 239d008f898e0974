"""What dispatch and combine mean: a readable oracle in plain torch, without any communication.

Every function here is pure and is given the inputs of *all* ranks (one list entry a rank), so that the expected
result of any rank can be computed anywhere. Tests derive those inputs from seeds (``moe_a2a.workload``); a broken
transport then cannot break the expectation too. All tensors are on the CPU; those of `moe_output` may be on any device.

Words: ranks ``R``, experts ``E``, local experts ``E_l = E / R`` (expert ``e`` lives on rank ``e // E_l``), tokens
``T`` (may differ by rank), ``M`` = max_tokens_per_rank, hidden size ``H``, top-k ``K``. A topk id of -1 means
"no expert". ``S`` is the number of scales of a row: H/128 in fp32, or ceil(H/512) packed int32 words.

The order of everything
    A rank receives a token once, however many of its experts the token chose. Received tokens are in (source rank,
    token) order, and the rows of one expert are in that same order. A row's *source* is ``source_rank * M + token``.

The three layouts of received rows (the first two are those of DeepEP's "low latency" and "normal" modes)
    masked       ``[E_l, R*M, H]``, a fixed block per local expert, of which the first ``counts[e]`` rows are valid
    contiguous   ``[N, H]``, one row per received token, with the token's local expert ids beside it
    grouped      ``[P, H]``, one row per (local expert, token), the rows of each expert padded to an alignment

Combine and its roundings
    A token's expert outputs on one rank are weighted and summed over k in fp32. That partial sum is rounded to the
    payload dtype, because it travels in it. The partial sums of the ranks are added in fp32 and rounded once at the
    end. Between hosts, the partial sums of a remote host are added there and rounded once more before they cross: say
    which ranks share a host with ``hosts`` (lists of ranks) to get that rounding.

FP8 payloads and their scales: ``moe_a2a.reference_fp8``, whose functions are offered here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_a2a.reference_fp8 import Fp8Kind as Fp8Kind
from moe_a2a.reference_fp8 import dequantise as dequantise
from moe_a2a.reference_fp8 import pack_ue8m0 as pack_ue8m0
from moe_a2a.reference_fp8 import quantise as quantise
from moe_a2a.reference_fp8 import unpack_ue8m0 as unpack_ue8m0


@dataclass(frozen=True)
class Sizes:
    """The numbers every rank agrees on: ranks R, experts E (a multiple of R) and max_tokens_per_rank M."""

    ranks: int
    experts: int
    max_tokens_per_rank: int

    @property
    def experts_per_rank(self) -> int:
        """E_l."""
        return self.experts // self.ranks


@dataclass(frozen=True)
class Arrivals:
    """The tokens that one rank receives, in (source rank, token) order. N of them.

    source_rank: int64 [N]
    token:       int64 [N], the token's row on its source rank
    local_ids:   int64 [N, K], 0 .. E_l-1 where the token chose an expert of this rank, -1 elsewhere
    """

    source_rank: Tensor
    token: Tensor
    local_ids: Tensor

    def gather(self, per_rank: Sequence[Tensor]) -> Tensor:
        """Row n is row token[n] of per_rank[source_rank[n]]: [N, ...]."""
        return torch.cat([rows[self.token[self.source_rank == s]] for s, rows in enumerate(per_rank)])


@dataclass(frozen=True)
class MaskedRows:
    """A block of R*M rows per local expert, of which the first counts[e] mean anything.

    x [E_l, R*M, H]; counts int32 [E_l]; source int32 [E_l, R*M]; scales None | [E_l, R*M, S], stored column-major.
    The other rows are never written, so that a tensor of gigabytes costs no more memory than the rows it holds.
    """

    x: Tensor
    counts: Tensor
    source: Tensor
    scales: Tensor | None


@dataclass(frozen=True)
class ContiguousRows:
    """One row per received token; N of them.

    x [N, H]; topk_ids int64 [N, K], local, -1 elsewhere; topk_weights fp32 [N, K] | None, 0 where the id is -1;
    counts int32 [E_l], rows per local expert; tokens_per_rank int32 [R], rows per source rank; source int32 [N];
    scales None | fp32 [N, S] row-major | packed int32 [N, S] column-major.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor | None
    counts: Tensor
    tokens_per_rank: Tensor
    source: Tensor
    scales: Tensor | None


@dataclass(frozen=True)
class GroupedRows:
    """One row per (local expert, token), in (expert, source rank, token) order; P of them with the padding.

    x [P, H]; expert_ids int32 [P], -1 on padding; counts int32 [E_l], without padding; offsets int32 [E_l+1], the
    first row of each expert, multiples of the alignment, offsets[E_l] = P; topk_weights fp32 [P] | None, 0 on
    padding; source int32 [P], -1 on padding; scales None | [P, S], stored column-major.
    Padding rows of x and scales mean nothing.
    """

    x: Tensor
    expert_ids: Tensor
    counts: Tensor
    offsets: Tensor
    topk_weights: Tensor | None
    source: Tensor
    scales: Tensor | None


# ------------------------------------------------------------------------------------------------------------- dispatch


def local_ids(sizes: Sizes, topk_ids: Tensor, rank: int) -> Tensor:
    """Global ids, of any shape, as `rank` sees them: int64, 0 .. E_l-1 for its own experts, -1 elsewhere."""
    first = rank * sizes.experts_per_rank
    mine = (topk_ids >= first) & (topk_ids < first + sizes.experts_per_rank)
    return torch.where(mine, topk_ids.long() - first, -1)


def arrivals(sizes: Sizes, topk_ids: Sequence[Tensor], rank: int) -> Arrivals:
    """The tokens that `rank` receives, given every rank's topk_ids [T, K]."""
    source_rank, token, local = [], [], []
    for source, ids in enumerate(topk_ids):
        on_rank = local_ids(sizes, ids, rank)
        tokens = (on_rank >= 0).any(dim=1).nonzero().flatten()
        source_rank.append(torch.full_like(tokens, source))
        token.append(tokens)
        local.append(on_rank[tokens])
    return Arrivals(torch.cat(source_rank), torch.cat(token), torch.cat(local))


def dispatch_masked(
    sizes: Sizes, x: Sequence[Tensor], topk_ids: Sequence[Tensor], rank: int, scales: Sequence[Tensor] | None = None
) -> MaskedRows:
    """What `rank` receives in the masked layout. x: [T, H] a rank, of any dtype; scales: [T, S] a rank."""
    came = arrivals(sizes, topk_ids, rank)
    slots = sizes.ranks * sizes.max_tokens_per_rank
    to, arrival, _ = _placements(sizes, came, _masked_starts(sizes))
    expert, slot = to // slots, to % slots
    out_x = x[rank].new_empty(sizes.experts_per_rank, slots, x[rank].shape[1])
    out_x[expert, slot] = came.gather(x)[arrival]
    source = torch.empty(sizes.experts_per_rank, slots, dtype=torch.int32)
    source[expert, slot] = _source(sizes, came)[arrival]
    out_scales = None
    if scales is not None:
        stored = scales[rank].new_empty(sizes.experts_per_rank, scales[rank].shape[1], slots)
        out_scales = stored.transpose(1, 2)
        out_scales[expert, slot] = came.gather(scales)[arrival]
    return MaskedRows(out_x, _counts(sizes, came), source, out_scales)


def dispatch_contiguous(
    sizes: Sizes,
    x: Sequence[Tensor],
    topk_ids: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None,
    rank: int,
    scales: Sequence[Tensor] | None = None,
) -> ContiguousRows:
    """What `rank` receives in the contiguous layout."""
    came = arrivals(sizes, topk_ids, rank)
    weights = None
    if topk_weights is not None:
        weights = torch.where(came.local_ids >= 0, came.gather(topk_weights), 0.0)
    out_scales = None if scales is None else came.gather(scales)
    if out_scales is not None and out_scales.dtype == torch.int32:
        out_scales = out_scales.t().contiguous().t()
    return ContiguousRows(
        x=came.gather(x),
        topk_ids=came.local_ids,
        topk_weights=weights,
        counts=_counts(sizes, came),
        tokens_per_rank=torch.bincount(came.source_rank, minlength=sizes.ranks).int(),
        source=_source(sizes, came),
        scales=out_scales,
    )


def dispatch_grouped(
    sizes: Sizes,
    x: Sequence[Tensor],
    topk_ids: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None,
    rank: int,
    alignment: int = 128,
    scales: Sequence[Tensor] | None = None,
) -> GroupedRows:
    """What `rank` receives in the grouped layout, each expert's rows padded to a multiple of `alignment`."""
    came = arrivals(sizes, topk_ids, rank)
    offsets = _grouped_starts(sizes, came, alignment)
    total = int(offsets[-1])
    to, arrival, k = _placements(sizes, came, offsets)
    out_x = x[rank].new_empty(total, x[rank].shape[1])
    out_x[to] = came.gather(x)[arrival]
    expert_ids = torch.full((total,), -1, dtype=torch.int32)
    expert_ids[to] = came.local_ids[arrival, k].int()
    source = torch.full((total,), -1, dtype=torch.int32)
    source[to] = _source(sizes, came)[arrival]
    weights, out_scales = None, None
    if topk_weights is not None:
        weights = torch.zeros(total)
        weights[to] = came.gather(topk_weights)[arrival, k]
    if scales is not None:
        out_scales = scales[rank].new_empty(scales[rank].shape[1], total).t()
        out_scales[to] = came.gather(scales)[arrival]
    return GroupedRows(out_x, expert_ids, _counts(sizes, came), offsets, weights, source, out_scales)


def _source(sizes: Sizes, came: Arrivals) -> Tensor:
    return (came.source_rank * sizes.max_tokens_per_rank + came.token).int()


def _counts(sizes: Sizes, came: Arrivals) -> Tensor:
    """Rows per local expert, int32 [E_l]."""
    return torch.bincount(came.local_ids[came.local_ids >= 0], minlength=sizes.experts_per_rank).int()


def _masked_starts(sizes: Sizes) -> Tensor:
    """First row of each local expert if the masked layout is seen as [E_l * R*M, H]: int64 [E_l]."""
    return torch.arange(sizes.experts_per_rank) * (sizes.ranks * sizes.max_tokens_per_rank)


def _grouped_starts(sizes: Sizes, came: Arrivals, alignment: int) -> Tensor:
    """First row of each local expert in the grouped layout, and the number of rows: int32 [E_l+1]."""
    padded = (_counts(sizes, came) + alignment - 1) // alignment * alignment
    return F.pad(padded.cumsum(0), (1, 0)).int()


def _placements(sizes: Sizes, came: Arrivals, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows of a layout by expert come from: row to[i] belongs to arrival[i], for its k[i]-th choice.

    starts[e] is the first row of local expert e, whose rows follow in the order of arrival. Returns three int64 [C],
    C the number of choices of this rank's experts.
    """
    to, arrival, k = [], [], []
    for expert in range(sizes.experts_per_rank):
        of_arrival, of_k = (came.local_ids == expert).nonzero(as_tuple=True)
        to.append(starts[expert] + torch.arange(len(of_arrival)))
        arrival.append(of_arrival)
        k.append(of_k)
    return torch.cat(to), torch.cat(arrival), torch.cat(k)


# -------------------------------------------------------------------------------------------------------------- combine


def combine_masked(
    sizes: Sizes,
    y: Sequence[Tensor],
    topk_ids: Sequence[Tensor],
    topk_weights: Tensor,
    rank: int,
    hosts: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """What source rank `rank` gets back, [T, H].

    y: every rank's expert outputs [E_l, R*M, H]; topk_ids: every rank's; topk_weights: fp32 [T, K], those of `rank`.
    """
    partials = []
    for owner in range(sizes.ranks):
        came = arrivals(sizes, topk_ids, owner)
        rows = _rows_of_choices(sizes, came, _masked_starts(sizes), rank, topk_weights.shape)
        partials.append(_weighted_sum(y[owner].flatten(0, 1), rows, topk_weights))
    return _sum_over_ranks(partials, rank, hosts)


def combine_grouped(
    sizes: Sizes,
    y: Sequence[Tensor],
    topk_ids: Sequence[Tensor],
    topk_weights: Tensor,
    rank: int,
    alignment: int = 128,
    hosts: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """What source rank `rank` gets back, [T, H].

    y: every rank's expert outputs [P, H]; topk_ids: every rank's; topk_weights: fp32 [T, K], those of `rank`.
    """
    partials = []
    for owner in range(sizes.ranks):
        came = arrivals(sizes, topk_ids, owner)
        starts = _grouped_starts(sizes, came, alignment)
        rows = _rows_of_choices(sizes, came, starts, rank, topk_weights.shape)
        partials.append(_weighted_sum(y[owner], rows, topk_weights))
    return _sum_over_ranks(partials, rank, hosts)


def combine_contiguous(
    sizes: Sizes,
    y: Sequence[Tensor],
    topk_ids: Sequence[Tensor],
    rank: int,
    hosts: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """What source rank `rank` gets back, [T, H]. y: every rank's [N, H], a row a received token, already weighted."""
    partials = []
    for owner in range(sizes.ranks):
        came = arrivals(sizes, topk_ids, owner)
        mine = came.source_rank == rank
        partial = y[owner].new_zeros(topk_ids[rank].shape[0], y[owner].shape[1])
        partial[came.token[mine]] = y[owner][mine]
        partials.append(partial)
    return _sum_over_ranks(partials, rank, hosts)


def moe_output(
    sizes: Sizes,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    rank: int,
    expert: Callable[[int, Tensor], Tensor],
    hosts: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A whole step as source rank `rank` sees it, with combine's roundings: [T, H].

    out[t] = sum_k topk_weights[t, k] * expert(topk_ids[t, k], x[t]). Knows nothing of layouts and slots, and so can
    check them. x, topk_ids and topk_weights are those of `rank`; `expert` maps (global id, rows [n, H]) to rows
    [n, H] of the payload `dtype` (x's unless given), each row by itself.
    """
    partials = []
    for owner in range(sizes.ranks):
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for k in range(topk_ids.shape[1]):
            chosen = topk_ids[local_ids(sizes, topk_ids[:, k], owner) >= 0, k]
            for e in sorted(set(chosen.tolist())):
                tokens = (topk_ids[:, k] == e).nonzero().flatten()
                total[tokens] += topk_weights[tokens, k, None] * expert(e, x[tokens]).float()
        partials.append(total.to(dtype or x.dtype))
    return _sum_over_ranks(partials, rank, hosts)


def _rows_of_choices(sizes: Sizes, came: Arrivals, starts: Tensor, rank: int, shape: torch.Size) -> Tensor:
    """The row of each choice of source rank `rank` on the rank where `came` came: int64 [T, K], -1 for the others."""
    to, arrival, k = _placements(sizes, came, starts)
    mine = came.source_rank[arrival] == rank
    rows = torch.full(shape, -1)
    rows[came.token[arrival[mine]], k[mine]] = to[mine]
    return rows


def _weighted_sum(y: Tensor, rows: Tensor, topk_weights: Tensor) -> Tensor:
    """sum_k topk_weights[t, k] * y[rows[t, k]] over the k with a row, in fp32, rounded to y's dtype: [T, H]."""
    total = torch.zeros(rows.shape[0], y.shape[1])
    for k in range(rows.shape[1]):
        token = (rows[:, k] >= 0).nonzero().flatten()
        total[token] += topk_weights[token, k, None] * y[rows[token, k]].float()
    return total.to(y.dtype)


def _sum_over_ranks(partials: Sequence[Tensor], rank: int, hosts: Sequence[Sequence[int]] | None) -> Tensor:
    """Add one partial sum [T, H] a rank in fp32 and round to its dtype; a remote host's sum is rounded before."""
    dtype = partials[0].dtype
    if hosts is None:
        hosts = [range(len(partials))]
    total = torch.zeros_like(partials[0], dtype=torch.float32)
    for host in hosts:
        host_total = torch.zeros_like(total)
        for member in host:
            host_total += partials[member].float()
        total += host_total if rank in host else host_total.to(dtype).float()
    return total.to(dtype)
