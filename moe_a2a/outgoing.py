"""What a CPU rank sends, in the form in which it travels. Checks run before anything is sent, and raise InputError."""

from __future__ import annotations

import torch

from moe_a2a import checks
from moe_a2a.config import Config
from moe_a2a.errors import InputError
from moe_a2a.fp8 import FP8, ScaleFormat, quantize
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.wire import FloatArray


def row_format(fp8: ScaleFormat | None) -> RowFormat:
    if fp8 is None:
        return RowFormat.PLAIN
    return RowFormat.FP8 if fp8 == "fp32" else RowFormat.FP8_POW2


def encode(
    config: Config, x: torch.Tensor, scales: torch.Tensor | None, fp8: ScaleFormat | None, goes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, ScaleFormat | None]:
    """(rows to send, their scales, form in which scales are handed out). goes: [T], tokens with an expert; what
    padding holds does not matter."""
    if x.dtype == FP8:
        if scales is None:
            raise InputError("x is float8_e4m3fn but scales is None; give fp32 scales [T, H/128]")
        fp8 = fp8 or "fp32"
        return x.view(torch.uint8), checks.check_scales(config, scales, x.shape[0], fp8), fp8
    if scales is not None:
        raise InputError(
            f"scales belong to an x that is float8_e4m3fn; x is {x.dtype}: leave scales out, and give fp8= to quantise"
        )
    if fp8 is None:
        return x.detach(), None, None
    q, made = quantize(x.detach(), power_of_two=fp8 != "fp32")
    checks.check_finite_scales(made.where(goes[:, None], 1.0), "x")
    return q.view(torch.uint8), made, fp8


def late_weights(config: Config, step: Step, topk_weights: torch.Tensor | None) -> FloatArray | None:
    """Router weights [T, K] that are given at combine; None if they travelled with the dispatch."""
    if step.layout == "contiguous":
        if topk_weights is not None:
            raise InputError(
                "the contiguous layout combines rows that carry their weights already; leave topk_weights out"
            )
        return None
    if step.has_weights and topk_weights is not None:
        raise InputError("topk_weights were given at dispatch; give them once, there or here")
    if not step.has_weights and topk_weights is None:
        raise InputError("topk_weights were not given at dispatch; give them here, fp32 [T, K]")
    return None if topk_weights is None else checks.check_weights(config, topk_weights, step.tokens)
