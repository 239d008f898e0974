"""Correctness before time: one step of a case against the oracle."""

from __future__ import annotations

import torch

from moe_a2a import reference
from moe_a2a.all_to_all import AllToAll
from moe_a2a.bench.cases import Case
from moe_a2a.types import Contiguous, Masked

#: Largest difference allowed between combine and the oracle, relative to 1 + |expected|: a partial sum and the final
#: sum may each fall on the other side of a rounding of the payload dtype.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}


def check_case(case: Case, a2a: AllToAll, step: int) -> str | None:
    """Run one step with an expert that is different for every expert id. Returns what is wrong, or None.

    Every rank derives every rank's input from the seed and computes what it should receive and get back.
    """
    sizes = reference.Sizes(a2a.world_size, case.experts, case.tokens)
    all_inputs = [case.inputs(rank, step) for rank in range(a2a.world_size)]
    mine = all_inputs[a2a.rank]
    rows, scales = [i.x for i in all_inputs], None
    if case.fp8 is not None:
        quantised = [reference.quantise(x, case.fp8) for x in rows]
        rows, scales = [q for q, _ in quantised], [s for _, s in quantised]
    ids = [i.topk_ids for i in all_inputs]
    weights = [i.topk_weights for i in all_inputs]
    dtype = a2a.config.dtype

    def scale_of(expert: torch.Tensor) -> torch.Tensor:
        return 1 + expert / case.experts

    got = a2a.dispatch(mine.x, mine.topk_ids, mine.topk_weights, layout=case.layout, fp8=case.fp8)
    first = a2a.rank * a2a.local_experts
    wrong: str | None = None
    if isinstance(got, Masked):
        wanted = reference.dispatch_masked(sizes, rows, ids, a2a.rank, scales)
        y = torch.empty(got.x.shape, dtype=dtype)
        if not torch.equal(got.counts, wanted.counts):
            wrong = "counts differ from the oracle"
        else:
            for e, count in enumerate(got.counts.tolist()):
                same = _same(got.x[e, :count], wanted.x[e, :count]) and torch.equal(
                    got.source[e, :count], wanted.source[e, :count]
                )
                if got.scales is not None and wanted.scales is not None:
                    same = same and torch.equal(got.scales[e, :count], wanted.scales[e, :count])
                if not same:
                    wrong = f"rows of local expert {e} differ from the oracle"
                values = _values(got.x[e, :count], None if got.scales is None else got.scales[e, :count])
                y[e, :count] = (values * scale_of(torch.tensor(first + e))).to(dtype)
    elif isinstance(got, Contiguous):
        flat = reference.dispatch_contiguous(sizes, rows, ids, weights, a2a.rank, scales)
        if not (_same(got.x, flat.x) and torch.equal(got.topk_ids, flat.topk_ids)):
            wrong = "received rows differ from the oracle"
        assert got.topk_weights is not None
        factors = (got.topk_weights * scale_of(first + got.topk_ids.clamp(min=0))).sum(dim=1, keepdim=True)
        y = (_values(got.x, got.scales) * factors).to(dtype)
    else:
        grouped = reference.dispatch_grouped(sizes, rows, ids, weights, a2a.rank, 128, scales)
        valid = grouped.expert_ids >= 0
        if not (torch.equal(got.expert_ids, grouped.expert_ids) and _same(got.x[valid], grouped.x[valid])):
            wrong = "received rows differ from the oracle"
        y = torch.zeros(got.x.shape, dtype=dtype)
        values = _values(got.x, got.scales)
        y[valid] = (values * scale_of(first + got.expert_ids)[:, None]).to(dtype)[valid]
    out = a2a.combine(y, got.handle)

    source = mine.x if scales is None else _values(rows[a2a.rank], scales[a2a.rank]).to(dtype)
    expected = reference.moe_output(
        sizes,
        source,
        mine.topk_ids,
        mine.topk_weights,
        a2a.rank,
        lambda e, x: (x.float() * scale_of(torch.tensor(e))).to(dtype),
        a2a.hosts,
        dtype,
    )
    error = ((out.float() - expected.float()).abs() / (1 + expected.float().abs())).max().item() if len(out) else 0.0
    limit = TOLERANCE[dtype] * (4 if case.layout == "contiguous" or case.fp8 else 1)
    if wrong is None and not error <= limit:
        wrong = f"combine differs from the oracle by {error:.2e} (allowed {limit:.2e})"
    return wrong


def _same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if got.dtype == torch.float8_e4m3fn:
        return torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    return torch.equal(got, wanted)


def _values(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """fp32 rows."""
    return x.float() if scales is None else reference.dequantise(x, scales.float())
