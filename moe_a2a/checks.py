"""Checks of a call's arguments. All run before anything is sent; all raise InputError with what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_a2a.config import GROUP, Config
from moe_a2a.errors import InputError, NotFinite
from moe_a2a.fp8 import FP8, SCALE_FORMATS, ScaleFormat, is_power_of_two
from moe_a2a.transport.wire import FloatArray, IntArray


def _tensor(name: str, value: object, shape: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; give a torch tensor {shape}")
    if value.device.type != "cpu":
        raise InputError(f"{name} is on {value.device}; this group's ranks are CPU ranks: give a CPU tensor (x.cpu())")
    return value


def check_matrix(name: str, value: object, shape: Sequence[int | str], dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    """A contiguous CPU tensor of this shape (a string stands for any size) and one of these dtypes."""
    text = f"[{', '.join(map(str, shape))}]"
    tensor = _tensor(name, value, text)
    if tensor.dtype not in dtypes:
        raise InputError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise InputError(f"{name} has shape {list(tensor.shape)}; expected {text}")
    if not tensor.is_contiguous():
        raise InputError(f"{name} has strides {tensor.stride()}; give a contiguous tensor (.contiguous())")
    return tensor


def check_tokens(config: Config, x: object, fp8: ScaleFormat | None) -> torch.Tensor:
    """x of a dispatch: [T, H], payload dtype or float8_e4m3fn, T <= max_tokens_per_rank."""
    tensor = check_matrix("x", x, ("T", config.hidden_size), (config.dtype, FP8))
    tokens = tensor.shape[0]
    if tokens > config.max_tokens_per_rank:
        raise InputError(
            f"max_tokens_per_rank={config.max_tokens_per_rank}, but this call brings {tokens} tokens; "
            "split the batch or raise max_tokens_per_rank"
        )
    if fp8 is not None and fp8 not in SCALE_FORMATS:
        raise InputError(f"fp8={fp8!r}; allowed: None, {', '.join(repr(f) for f in SCALE_FORMATS)}")
    return tensor


def check_ids(config: Config, topk_ids: object, tokens: int) -> IntArray:
    """topk_ids: [T, K] int32 or int64, each -1 or an expert, no expert twice for a token. Returns int32 [T, K]."""
    tensor = check_matrix("topk_ids", topk_ids, (tokens, config.top_k), (torch.int32, torch.int64))
    ids = tensor.numpy()
    wrong = (ids < -1) | (ids >= config.num_experts)
    if wrong.any():
        token, k = np.argwhere(wrong)[0]
        raise InputError(
            f"topk_ids[{token}, {k}] = {ids[token, k]}; allowed are 0 to {config.num_experts - 1}, and -1 for no expert"
        )
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token, k = np.argwhere(twice)[0]
        raise InputError(f"topk_ids[{token}] names expert {ordered[token, k]} twice; a token's experts must differ")
    return ids.astype(np.int32, copy=False)


def check_weights(config: Config, topk_weights: object, tokens: int) -> FloatArray:
    """topk_weights: fp32 [T, K], finite, and within fp16's range if the payload is fp16."""
    tensor = check_matrix("topk_weights", topk_weights, (tokens, config.top_k), (torch.float32,))
    weights: FloatArray = tensor.detach().numpy()
    limit = torch.finfo(config.dtype).max
    wrong = ~(np.abs(weights) <= limit)
    if wrong.any():
        token, k = np.argwhere(wrong)[0]
        raise NotFinite(
            f"topk_weights[{token}, {k}] = {weights[token, k]}; router weights must be finite and within {limit:g} "
            f"for {config.dtype}"
        )
    return weights


def check_scales(config: Config, scales: object, tokens: int, fp8: ScaleFormat) -> torch.Tensor:
    """scales of an x that is FP8 already: fp32 [T, H/128], finite and positive; powers of two for "pow2" and
    "ue8m0"."""
    tensor = check_matrix("scales", scales, (tokens, config.groups), (torch.float32,))
    check_finite_scales(tensor, "scales")
    if fp8 != "fp32" and not is_power_of_two(tensor):
        raise InputError(
            f"fp8={fp8!r} needs scales that are powers of two; round them up before quantising, or use fp8='fp32'"
        )
    return tensor


def check_finite_scales(scales: torch.Tensor, name: str) -> None:
    """Raise unless every scale is finite and above 0. name: what the scales belong to, for the message."""
    good = torch.isfinite(scales) & (scales > 0)
    if not bool(good.all()):
        token, group = (int(i) for i in torch.nonzero(~good)[0])
        columns = f"columns {group * GROUP} to {group * GROUP + GROUP - 1}"
        kind = NotFinite if name == "x" else InputError
        raise kind(
            f"{name}: token {token}, {columns} has scale {float(scales[token, group])}; scales must be finite and "
            f"above 0 "
            "(a NaN or infinity in the hidden states gives such a scale)"
        )


def check_alignment(alignment: object) -> int:
    """Rows per expert of the grouped layout are padded to this power of two."""
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"alignment={alignment!r}; give a power of two (1 for no padding, 128 for grouped GEMMs)")
    return alignment


def check_like(topk_ids: object, topk_weights: object, tokens: int, earlier: int) -> None:
    """What goes with like=: no routing of its own, and as many tokens as the step that is named."""
    if topk_ids is not None or topk_weights is not None:
        raise InputError("like= takes routing and weights from an earlier step; leave topk_ids and topk_weights out")
    if tokens != earlier:
        raise InputError(f"x has {tokens} tokens, and the step that like= names had {earlier}; give as many")


def padded(counts: Sequence[int], alignment: int) -> list[int]:
    """Each count rounded up to a multiple of `alignment`."""
    return [-(-count // alignment) * alignment for count in counts]
