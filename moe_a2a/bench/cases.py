"""What a benchmark measures: one `Case` a line of its table, and the statistics of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_a2a.all_to_all import AllToAll
from moe_a2a.config import Config
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.types import Layout
from moe_a2a.workload import Inputs, Routing, Skew, Trace, make_inputs

#: DeepSeek-V3's experts per token and routed experts: the command line's defaults.
TOP_K, EXPERTS = 8, 256

#: dtype names of the command line -> (payload dtype, FP8 scales or None).
DTYPES: dict[str, tuple[torch.dtype, ScaleFormat | None]] = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
    "fp8": (torch.bfloat16, "fp32"),
}


@dataclass(frozen=True)
class Case:
    """One combination of sizes. tokens: T of every rank; routing: a kind (`moe_a2a.workload.Skew`), or the path of a
    trace; num_sms: SMs that contiguous and grouped steps of GPU ranks use, None where it does not matter."""

    tokens: int
    hidden: int
    top_k: int
    experts: int
    dtype: str
    layout: Layout
    routing: str
    iterations: int
    seed: int
    num_sms: int | None = None

    @property
    def name(self) -> str:
        sizes = f"T={self.tokens}"
        if (self.top_k, self.experts) != (TOP_K, EXPERTS):
            sizes += f" K={self.top_k} E={self.experts}"
        routing = "" if self.routing == "uniform" else f" {self.routing.rsplit('/', 1)[-1]}"
        sms = "" if self.num_sms is None else f" {self.num_sms} SMs"
        return f"{self.layout} {self.dtype} {sizes}{routing}{sms}"

    @property
    def fp8(self) -> ScaleFormat | None:
        return DTYPES[self.dtype][1]

    @property
    def has_trace(self) -> bool:
        try:
            Skew.parse(self.routing)
        except ValueError:
            return True
        return False

    def config(self, channel: str) -> Config:
        """Buffers for exactly this case's tokens."""
        return Config(
            num_experts=self.experts,
            hidden_size=self.hidden,
            top_k=self.top_k,
            max_tokens_per_rank=self.tokens,
            dtype=DTYPES[self.dtype][0],
            channels=(channel,),
        )

    def inputs(self, rank: int, step: int, device: torch.device | str = "cpu") -> Inputs:
        """What `rank` brings to `step`: x on `device` (other devices, other values), the rest on the CPU."""
        routing: Routing | Trace = self.routing
        if self.has_trace:
            routing = Trace.load(self.routing, self.experts, self.top_k)
        return make_inputs(
            self.seed,
            rank,
            step,
            self.tokens,
            hidden=self.hidden,
            experts=self.experts,
            top_k=self.top_k,
            dtype=DTYPES[self.dtype][0],
            routing=routing,
            device=device,
        )


def heading(case: Case, a2a: AllToAll, device: str, mode: str, problems: Sequence[str | None]) -> dict[str, Any]:
    """What a case's JSON entry says before its figures. problems: what each rank found wrong, or None."""
    return {
        "name": case.name,
        "device": device,
        "layout": case.layout,
        "dtype": case.dtype,
        "ranks": a2a.world_size,
        "hosts": len(a2a.hosts),
        "tokens": case.tokens,
        "hidden": case.hidden,
        "top_k": case.top_k,
        "experts": case.experts,
        "routing": case.routing,
        "num_sms": case.num_sms,
        "mode": mode,
        "correct": not any(problems),
        "problems": [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text],
    }


#: What `spread` looks at.
PARTS = ("dispatch", "combine", "both")


def rows_to(topk_ids: torch.Tensor, local_experts: int, ranks: int) -> dict[str, list[int]]:
    """What one rank's tokens bring to each rank: "rows", the tokens that go there, and "expert_rows", one row for each
    of its experts that they chose. topk_ids: [T, K]."""
    owner = torch.where(topk_ids >= 0, topk_ids // local_experts, -1)
    there = [owner == rank for rank in range(ranks)]
    return {"rows": [int(t.any(dim=1).sum()) for t in there], "expert_rows": [int(t.sum()) for t in there]}


def spread(
    everyone: Sequence[Mapping[str, Sequence[float]]], brought: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, Any]:
    """What a case's JSON entry says of ranks apart. everyone: each rank's samples of PARTS in us; brought: `rows_to`
    of each rank's tokens."""
    by_rank: dict[str, list[Any]] = {
        what: np.sum([one[what] for one in brought], axis=0).tolist() for what in ("rows", "expert_rows")
    }
    worst: dict[str, Any] = {}
    for part in PARTS:
        p50 = [round(float(np.median(times[part])), 1) for times in everyone]
        rank = int(np.argmax(p50))
        by_rank[f"{part}_us"] = p50
        worst[f"{part}_us"] = {"p50": p50[rank], "rank": rank, "rows": by_rank["rows"][rank]}
    median = {what: round(float(np.median(values)), 1) for what, values in by_rank.items()}
    return {"by_rank": by_rank, "median_rank": median, "worst_rank": worst}


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 of times in us. Samples are those of the slowest rank: a step takes as long as that."""
    p50, p90, p99 = np.percentile(np.asarray(samples, dtype=np.float64), [50, 90, 99])
    return {"p50": round(float(p50), 1), "p90": round(float(p90), 1), "p99": round(float(p99), 1)}
