"""Correctness before time: one step of a case against the oracle.

Every rank derives every rank's input from the seed and computes what it should receive and get back. The oracle lays
out the numbers of rows, on the CPU; by these numbers the rows are compared to the last byte, where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_a2a import reference
from moe_a2a.all_to_all import AllToAll
from moe_a2a.bench.cases import DTYPES, Case
from moe_a2a.types import Contiguous, Dispatched, Grouped, Masked
from moe_a2a.workload import Inputs

#: Largest difference allowed between combine and the oracle, relative to 1 + |expected|: a partial sum and the final
#: sum may each fall on the other side of a rounding of the payload dtype.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}
_ALIGNMENT = 128


def check_case(case: Case, a2a: AllToAll, step: int, apart: bool = False) -> str | None:
    """Run one step with an expert that is different for every expert id. Returns what is wrong, or None. apart: see
    `dispatch`."""
    inputs = [case.inputs(rank, step, a2a.device) for rank in range(a2a.world_size)]
    mine, expected = inputs[a2a.rank], _Expected.of(case, a2a, inputs)
    # Exactly the rows that came, on GPU ranks too.
    exact: dict[str, Any] = {} if case.layout == "masked" else {"host_counts": True}
    got = dispatch(a2a, case, mine, apart, **exact)
    wrong, y = expected.received(got)
    out = a2a.combine(y, got.handle)
    if wrong is not None:
        return wrong
    want = expected.sums(mine, a2a).float()
    error = ((out.float() - want).abs() / (1 + want.abs())).max().item() if len(out) else 0.0
    limit = TOLERANCE[a2a.config.dtype] * (4 if case.layout == "contiguous" or case.fp8 else 1)
    return None if error <= limit else f"combine differs from the oracle by {error:.2e} (allowed {limit:.2e})"


def dispatch(a2a: AllToAll, case: Case, mine: Inputs, apart: bool, **receive: Any) -> Dispatched:
    """Dispatch a case's tokens. apart: in two calls, which on GPU ranks launch the kernels that a graph of the masked
    layout holds; one call outside of a graph is one kernel there. receive: options of `dispatch_recv`."""
    x, ids, weights = (tensor.to(a2a.device) for tensor in (mine.x, mine.topk_ids, mine.topk_weights))
    if not apart:
        return a2a.dispatch(x, ids, weights, layout=case.layout, fp8=case.fp8, **receive)
    handle = a2a.dispatch_send(x, ids, weights, layout=case.layout, fp8=case.fp8)
    return a2a.dispatch_recv(handle, layout=case.layout, **receive)


@dataclass(frozen=True)
class _Expected:
    """What a rank should receive. payload: all ranks' rows one below the other, [R*T, H], as they are sent; scales:
    fp32 [R*T, H/128], or None; numbers: by rank, int64 [T, 1], each row's number among those; factors: fp32 [E], what
    each expert multiplies by. Rows, scales and factors are on the rank's device, the
    rest is on the CPU."""

    case: Case
    sizes: reference.Sizes
    rank: int
    payload: torch.Tensor
    scales: torch.Tensor | None
    numbers: list[torch.Tensor]
    topk_ids: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    factors: torch.Tensor

    @staticmethod
    def of(case: Case, a2a: AllToAll, inputs: list[Inputs]) -> _Expected:
        rows, scales = [i.x for i in inputs], None
        if case.fp8 is not None:  # on the CPU, as is the division of the factors: on a GPU torch's is not the IEEE one
            quantised = [reference.quantise(x.cpu(), case.fp8) for x in rows]
            rows = [q for q, _ in quantised]
            scales = torch.cat([s for _, s in quantised]).to(a2a.device)
        every = torch.arange(a2a.world_size * case.tokens)[:, None]
        return _Expected(
            case=case,
            sizes=reference.Sizes(a2a.world_size, case.experts, case.tokens),
            rank=a2a.rank,
            payload=torch.cat([row.view(torch.uint8) for row in rows]).to(a2a.device).view(rows[0].dtype),
            scales=scales,
            numbers=list(torch.split(every, case.tokens)),
            topk_ids=[i.topk_ids for i in inputs],
            topk_weights=[i.topk_weights for i in inputs],
            factors=(1 + torch.arange(case.experts) / case.experts).to(a2a.device),
        )

    def received(self, got: Dispatched) -> tuple[str | None, torch.Tensor]:
        """What is wrong with it, and what the experts of this rank make of it."""
        if isinstance(got, Masked):
            return self._masked(got)
        return self._contiguous(got) if isinstance(got, Contiguous) else self._grouped(got)

    def sums(self, mine: Inputs, a2a: AllToAll) -> torch.Tensor:
        """What this rank should get back, [T, H]."""
        dtype = a2a.config.dtype
        own = slice(self.rank * self.case.tokens, (self.rank + 1) * self.case.tokens)
        return reference.moe_output(
            self.sizes,
            _values(self.payload[own], None if self.scales is None else self.scales[own]).to(dtype),
            mine.topk_ids.to(a2a.device),
            mine.topk_weights.to(a2a.device),
            self.rank,
            lambda expert, x: (x.float() * self.factors[expert]).to(dtype),
            a2a.hosts,
            dtype,
        )

    def _masked(self, got: Masked) -> tuple[str | None, torch.Tensor]:
        want = reference.dispatch_masked(self.sizes, self.numbers, self.topk_ids, self.rank)
        y = self._no_rows(got)
        if not torch.equal(got.counts.cpu(), want.counts):
            return "counts differ from the oracle", y
        valid = torch.arange(want.source.shape[1]) < want.counts[:, None]
        expert, slot = (index.to(got.x.device) for index in valid.nonzero(as_tuple=True))
        rows, scales = _take(got.x, expert, slot), None if got.scales is None else got.scales[expert, slot]
        differs = self._differs(rows, scales, want.x[valid])
        differs |= got.source[expert, slot] != want.source[valid].to(got.x.device)
        y[expert, slot] = (_values(rows, scales) * self._of_experts(expert)).to(y.dtype)
        return f"rows of local expert {int(expert[differs][0])} differ from the oracle" if differs.any() else None, y

    def _contiguous(self, got: Contiguous) -> tuple[str | None, torch.Tensor]:
        want = reference.dispatch_contiguous(self.sizes, self.numbers, self.topk_ids, self.topk_weights, self.rank)
        assert got.topk_weights is not None and want.topk_weights is not None
        factors = self._of_experts(got.topk_ids.clamp(min=0))[..., 0]
        whole = (got.topk_weights * factors).sum(dim=1, keepdim=True)
        y = (_values(got.x, got.scales) * whole).to(self._dtype)
        for name in ("source", "counts", "tokens_per_rank", "topk_ids", "topk_weights"):
            if not torch.equal(getattr(got, name).cpu(), getattr(want, name)):
                return f"{name} of received rows differ from the oracle", y
        differs = self._differs(got.x, got.scales, want.x)
        return "received rows differ from the oracle" if differs.any() else None, y

    def _grouped(self, got: Grouped) -> tuple[str | None, torch.Tensor]:
        want = reference.dispatch_grouped(
            self.sizes, self.numbers, self.topk_ids, self.topk_weights, self.rank, _ALIGNMENT
        )
        y = self._no_rows(got)
        for name in ("expert_ids", "source", "counts", "offsets", "topk_weights"):
            if not torch.equal(getattr(got, name).cpu(), getattr(want, name)):
                return f"{name} of received rows differ from the oracle", y
        (places,) = (want.expert_ids >= 0).nonzero(as_tuple=True)
        here = places.to(got.x.device)
        rows, scales = _take(got.x, here), None if got.scales is None else got.scales[here]
        y[here] = (_values(rows, scales) * self._of_experts(got.expert_ids[here])).to(y.dtype)
        differs = self._differs(rows, scales, want.x[places])
        return "received rows differ from the oracle" if differs.any() else None, y

    def _differs(self, rows: torch.Tensor, scales: torch.Tensor | None, numbers: torch.Tensor) -> torch.Tensor:
        """Which rows [n, H] are not, with their scales, those with the `numbers` [n, 1]: bool [n]."""
        numbers = numbers[:, 0].to(rows.device)
        differs = (_bytes(rows) != _bytes(_take(self.payload, numbers))).any(dim=1)
        if (scales is None) != (self.scales is None):
            return torch.ones_like(differs)
        if scales is not None and self.scales is not None:
            differs |= (scales != self.scales[numbers]).any(dim=1)
        return differs

    def _of_experts(self, local: torch.Tensor) -> torch.Tensor:
        """Factors of experts of this rank, with a last dimension for the columns of a row."""
        return self.factors[self.rank * self.sizes.experts_per_rank + local][..., None]

    def _no_rows(self, got: Masked | Grouped) -> torch.Tensor:
        """Experts' outputs, no row of which is filled in yet: most never are, and gigabytes stay untouched."""
        return torch.empty(got.x.shape, dtype=self._dtype, device=got.x.device)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype][0]


def _take(x: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
    """x[index]; not every torch can index FP8."""
    return x[index] if x.element_size() > 1 else x.view(torch.uint8)[index].view(x.dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def _values(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """fp32 rows."""
    return x.float() if scales is None else reference.dequantise(x, scales.float())
