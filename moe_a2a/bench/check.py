"""Correctness before time: one step of a case against the oracle."""

from __future__ import annotations

from typing import Any

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
    payload, scales = [i.x for i in all_inputs], None
    if case.fp8 is not None:
        quantised = [reference.quantise(x, case.fp8) for x in payload]
        payload, scales = [q for q, _ in quantised], [s for _, s in quantised]
    ids = [i.topk_ids for i in all_inputs]
    weights = [i.topk_weights for i in all_inputs]
    dtype = a2a.config.dtype

    def scale_of(expert: torch.Tensor) -> torch.Tensor:
        return 1 + expert / case.experts

    given = (tensor.to(a2a.device) for tensor in (mine.x, mine.topk_ids, mine.topk_weights))
    # Exactly the rows that came, on GPU ranks too.
    exact: dict[str, Any] = {} if case.layout == "masked" else {"host_counts": True}
    got = a2a.dispatch(*given, layout=case.layout, fp8=case.fp8, **exact)
    first = a2a.rank * a2a.local_experts
    wrong: str | None = None
    if isinstance(got, Masked):
        wanted = reference.dispatch_masked(sizes, payload, ids, a2a.rank, scales)
        y = torch.empty(got.x.shape, dtype=dtype, device=a2a.device)
        if not torch.equal(got.counts.cpu(), wanted.counts):
            wrong = "counts differ from the oracle"
        else:
            for e, count in enumerate(got.counts.tolist()):
                rows, there = got.x[e, :count].cpu(), got.source[e, :count].cpu()
                scale = None if got.scales is None else got.scales[e, :count].cpu()
                same = _same(rows, wanted.x[e, :count]) and torch.equal(there, wanted.source[e, :count])
                if scale is not None and wanted.scales is not None:
                    same = same and torch.equal(scale, wanted.scales[e, :count])
                if not same:
                    wrong = f"rows of local expert {e} differ from the oracle"
                y[e, :count] = (_values(rows, scale) * scale_of(torch.tensor(first + e))).to(dtype)
    elif isinstance(got, Contiguous):
        flat = reference.dispatch_contiguous(sizes, payload, ids, weights, a2a.rank, scales)
        rows, chosen, scale = got.x.cpu(), got.topk_ids.cpu(), None if got.scales is None else got.scales.cpu()
        if not (_same(rows, flat.x) and torch.equal(chosen, flat.topk_ids)):
            wrong = "received rows differ from the oracle"
        assert got.topk_weights is not None
        factors = (got.topk_weights.cpu() * scale_of(first + chosen.clamp(min=0))).sum(dim=1, keepdim=True)
        y = (_values(rows, scale) * factors).to(dtype)
    else:
        grouped = reference.dispatch_grouped(sizes, payload, ids, weights, a2a.rank, 128, scales)
        valid = grouped.expert_ids >= 0
        rows, experts = got.x.cpu(), got.expert_ids.cpu()
        if not (torch.equal(experts, grouped.expert_ids) and _same(rows[valid], grouped.x[valid])):
            wrong = "received rows differ from the oracle"
        y = torch.zeros(rows.shape, dtype=dtype)
        values = _values(rows, None if got.scales is None else got.scales.cpu())
        y[valid] = (values * scale_of(first + experts)[:, None]).to(dtype)[valid]
    out = a2a.combine(y.to(a2a.device), got.handle).cpu()

    source = mine.x if scales is None else _values(payload[a2a.rank], scales[a2a.rank]).to(dtype)
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
