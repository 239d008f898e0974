"""Checks of a call's tensors that need not read them: shape, dtype, device, strides. All raise InputError."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_a2a.config import Config
from moe_a2a.errors import InputError
from moe_a2a.fp8 import FP8, SCALE_FORMATS, ScaleFormat
from moe_a2a.gpu.layout import Layout
from moe_a2a.kernels.formats import COPY, GIVEN, GIVEN_POW2, QUANTISE, QUANTISE_POW2

#: Rows, ids, router weights, scales.
Brought = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def check_tensor(
    name: str, value: object, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], device: torch.device
) -> torch.Tensor:
    """A contiguous tensor on `device` of this shape (a string stands for any size) and one of these dtypes."""
    if (  # runs several times at every call, nearly always with this outcome
        value.__class__ is torch.Tensor
        and value.shape == shape
        and value.dtype in dtypes
        and value.device == device
        and value.is_contiguous()
        and not value.data_ptr() & 15
        and not value.requires_grad
    ):
        return value
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; give a torch tensor {_text(shape)}")
    if value.device != device:
        raise InputError(f"{name} is on {value.device}; this rank's device is {device}: give a tensor there")
    if value.dtype not in dtypes:
        raise InputError(f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if not _fits(value.shape, shape):
        raise InputError(f"{name} has shape {list(value.shape)}; expected {_text(shape)}")
    if not value.is_contiguous():
        raise InputError(f"{name} has strides {value.stride()}; give a contiguous tensor (.contiguous())")
    if value.data_ptr() % 16:
        raise InputError(f"{name} starts at an address that is no multiple of 16 bytes; give a copy (.clone())")
    return value.detach() if value.requires_grad else value


def _text(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _fits(have: torch.Size, want: Sequence[int | str]) -> bool:
    return len(have) == len(want) and all(isinstance(w, str) or h == w for h, w in zip(have, want, strict=True))


def check_tokens(config: Config, x: object, fp8: ScaleFormat | None, device: torch.device) -> torch.Tensor:
    """x of a dispatch: [T, H], payload dtype or float8_e4m3fn, T <= max_tokens_per_rank."""
    shape: tuple[int | str, ...] = ("T", config.hidden_size)
    if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] == config.hidden_size:
        shape = x.shape  # quicker to compare
    tensor = check_tensor("x", x, shape, (config.dtype, FP8), device)
    tokens = tensor.shape[0]
    if tokens > config.max_tokens_per_rank:
        raise InputError(
            f"max_tokens_per_rank={config.max_tokens_per_rank}, but this call brings {tokens} tokens; "
            "split the batch or raise max_tokens_per_rank"
        )
    if fp8 is not None and fp8 not in SCALE_FORMATS:
        raise InputError(f"fp8={fp8!r}; allowed: None, {', '.join(repr(f) for f in SCALE_FORMATS)}")
    return tensor


def check_scales(config: Config, x: torch.Tensor, scales: object, device: torch.device) -> torch.Tensor | None:
    """scales belong to an x that is FP8 already: fp32 [T, H/128]."""
    if x.dtype == FP8:
        if scales is None:
            raise InputError("x is float8_e4m3fn but scales is None; give fp32 scales [T, H/128]")
        return check_tensor("scales", scales, (x.shape[0], config.groups), (torch.float32,), device)
    if scales is not None:
        raise InputError(
            f"scales belong to an x that is float8_e4m3fn; x is {x.dtype}: leave scales out, and give fp8= to quantise"
        )
    return None


def check_weights(config: Config, weights: object, tokens: int, device: torch.device) -> torch.Tensor:
    """Router weights: fp32 [T, K]."""
    return check_tensor("topk_weights", weights, (tokens, config.top_k), (torch.float32,), device)


def row_mode(layout: Layout, fp8: ScaleFormat | None, given: bool) -> tuple[int, ScaleFormat | None]:
    """(what happens to rows on their way, the form in which scales are handed out). given: rows are FP8 already."""
    if given:
        fp8 = fp8 or "fp32"
        return GIVEN if fp8 == "fp32" else GIVEN_POW2, fp8
    if fp8 is not None:
        return QUANTISE if fp8 == "fp32" else QUANTISE_POW2, fp8
    if layout.fp8_only:
        raise InputError("this group's buffers hold FP8 rows only; give fp8='fp32', 'pow2' or 'ue8m0'")
    return COPY, None


def check_brought(
    config: Config,
    layout: Layout,
    device: torch.device,
    x: object,
    topk_ids: object,
    topk_weights: object,
    scales: object,
    fp8: ScaleFormat | None,
) -> tuple[Brought, int, ScaleFormat | None]:
    """All that a masked dispatch brings. Returns (it, the mode in which rows are sent, the form in which scales are
    handed out)."""
    rows = check_tokens(config, x, fp8, device)
    given = check_scales(config, rows, scales, device)
    tokens = rows.shape[0]
    if tokens > layout.W:
        raise InputError(
            f"this call brings {tokens} tokens, and a masked step has room for {layout.W} of each rank, because "
            f"recv_capacity is {layout.capacity} rows; split the batch, raise recv_capacity to {layout.R * tokens}, or "
            "use the contiguous layout"
        )
    ids = check_tensor("topk_ids", topk_ids, (tokens, config.top_k), (torch.int32, torch.int64), device)
    weights = None if topk_weights is None else check_weights(config, topk_weights, tokens, device)
    mode, fp8 = row_mode(layout, fp8, given is not None)
    return (rows, ids, weights, given), mode, fp8
