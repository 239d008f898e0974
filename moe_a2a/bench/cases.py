"""What a benchmark measures: one `Case` a line of its table, and the statistics of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_a2a.all_to_all import AllToAll
from moe_a2a.config import Config
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.types import Layout
from moe_a2a.workload import Inputs, Routing, Trace, make_inputs

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
    """One combination of sizes. tokens: T of every rank; routing: a kind, or the path of a trace."""

    tokens: int
    hidden: int
    top_k: int
    experts: int
    dtype: str
    layout: Layout
    routing: str
    iterations: int
    seed: int

    @property
    def name(self) -> str:
        sizes = f"T={self.tokens}"
        if (self.top_k, self.experts) != (TOP_K, EXPERTS):
            sizes += f" K={self.top_k} E={self.experts}"
        routing = "" if self.routing == "uniform" else f" {self.routing.rsplit('/', 1)[-1]}"
        return f"{self.layout} {self.dtype} {sizes}{routing}"

    @property
    def fp8(self) -> ScaleFormat | None:
        return DTYPES[self.dtype][1]

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
        routing: Any = self.routing
        if self.routing not in ("uniform", "zipf", "k-hot"):
            routing = Trace.load(self.routing, self.experts, self.top_k)
        kind: Routing | Trace = routing
        return make_inputs(
            self.seed,
            rank,
            step,
            self.tokens,
            hidden=self.hidden,
            experts=self.experts,
            top_k=self.top_k,
            dtype=DTYPES[self.dtype][0],
            routing=kind,
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
        "mode": mode,
        "correct": not any(problems),
        "problems": [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text],
    }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 of times in us. Samples are those of the slowest rank: a step takes as long as that."""
    p50, p90, p99 = np.percentile(np.asarray(samples, dtype=np.float64), [50, 90, 99])
    return {"p50": round(float(p50), 1), "p90": round(float(p90), 1), "p99": round(float(p99), 1)}
