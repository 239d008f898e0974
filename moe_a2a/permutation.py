"""Tokens to rows that are grouped by expert, for a grouped GEMM, and back. No communication.

The rows are those of the grouped layout: with all experts on one rank, dispatch hands out what `permute` returns.
On a GPU the work is done by `moe_a2a.kernels.permute` and `unpermute`; on a CPU by torch, with the same results.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import TYPE_CHECKING

import torch

from moe_a2a import permutation_cpu
from moe_a2a.checks import check_alignment
from moe_a2a.config import GROUP, MAX_EXPERTS, MAX_TOP_K
from moe_a2a.errors import InputError
from moe_a2a.fp8 import FP8
from moe_a2a.gpu.inputs import check_tensor
from moe_a2a.permuted import Permuted, worst_case_rows

if TYPE_CHECKING:
    from moe_a2a.kernels.permute import Outputs

_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int32, torch.int64)
_ROW_BYTES = 16  # kernels move this many bytes at once
_MAX_ROWS = 1 << 29  # kernels count in int32: 1024 experts times a count for every 256 choices fit too


def permute(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    topk_weights: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    alignment: int = 128,
    valid: torch.Tensor | None = None,
    capacity: int | None = None,
) -> Permuted:
    """Copy each token to a row of each of its experts, grouped by expert. Forward only.

    x: [T, H], bfloat16, float16, float32 or float8_e4m3fn, rows of a multiple of 16 bytes.
    topk_ids: int32 or int64 [T, K], 0 to num_experts - 1, or -1 for no expert. A token that names an expert twice has
        two rows there.
    topk_weights: fp32 [T, K], to be handed out by row.
    scales: of FP8 tokens, fp32 [T, H/128] or packed int32 [T, ceil(H/512)], row-major or column-major.
    alignment: a power of two; each expert's rows are padded to a multiple of it.
    valid: int32 [1] on the device of x: only the first `valid` tokens count, for batches that are padded to T.
    capacity: rows of the result, if you know that they suffice.

    On a GPU this launches kernels on the current stream and returns: nothing waits for the device, shapes do not depend
    on the routing, and it can be captured in a CUDA graph, once it has run with these sizes. So what only the ids can
    tell is reported late, by `Permuted.check`: an id out of range, which has no row; and rows that do not fit
    `capacity`, in which case there are none at all (`counts` are 0, `places` -1).

    Raises InputError, on a CPU for these two as well.
    """
    tokens, top_k = _check_tokens(x, topk_ids, num_experts)
    check_alignment(alignment)
    device = x.device
    if topk_weights is not None:
        topk_weights = check_tensor("topk_weights", topk_weights, (tokens, top_k), (torch.float32,), device)
    if scales is not None:
        _check_scales(x, scales)
    _check_valid(valid, device)
    worst = worst_case_rows(tokens, top_k, num_experts, alignment)
    rows = worst if capacity is None else _check_capacity(capacity)
    if max(worst, rows) > _MAX_ROWS:
        raise InputError(
            f"{tokens} tokens with {top_k} choices and num_experts={num_experts}, alignment={alignment} may need "
            f"{worst} rows, and capacity={capacity}; allowed are {_MAX_ROWS}: split the batch"
        )
    x = x.detach()
    if device.type == "cpu":
        return permutation_cpu.permute(x, topk_ids, num_experts, topk_weights, scales, alignment, valid, capacity)

    from moe_a2a.kernels import permute as kernels

    with _on(device):
        out = new_outputs(x, topk_ids, num_experts, rows, topk_weights is not None, scales)
        kernels.permute(
            x,
            topk_ids,
            out,
            alignment,
            topk_weights=topk_weights,
            scales=scales,
            names=None,
            valid=valid,
            processors=_processors(device),
        )
    by_row = None if out.scales is None else out.scales.t()
    return Permuted(
        out.x, out.expert_ids, out.counts, out.offsets, out.topk_weights, out.source, by_row, out.places, out.report
    )


def unpermute(
    y: torch.Tensor,
    places: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum each token's rows: out[t] = sum over k of topk_weights[t, k] * y[places[t, k]]. Forward only.

    y: [P, H], bfloat16, float16 or float32, rows of a multiple of 16 bytes. places: int32 [T, K] from `permute`; a
    choice of -1 adds nothing, whatever its weight. topk_weights: fp32 [T, K]; None: ones. valid: int32 [1] on the
    device of y: rows of later tokens are not written. out: [T, H] of y's dtype.

    Returns [T, H]. Sums are made in fp32 in the order of k and rounded once, so that the bits are the same on CPUs and
    GPUs. A token without experts gives zeros. On a GPU nothing waits for the device, and a place that y does not have
    makes its token NaN. Raises InputError, on a CPU for such a place as well.
    """
    _check_rows("y", y, _PLAIN)
    device, hidden = y.device, y.shape[1]
    if not isinstance(places, torch.Tensor) or places.dim() != 2:
        raise InputError("places is no matrix; give the places [T, K] that permute returned")
    tokens, top_k = places.shape
    check_tensor("places", places, ("T", "K"), (torch.int32,), device)
    if not 1 <= top_k <= MAX_TOP_K:
        raise InputError(f"places has {top_k} columns; allowed are 1 to {MAX_TOP_K}")
    if topk_weights is not None:
        topk_weights = check_tensor("topk_weights", topk_weights, (tokens, top_k), (torch.float32,), device)
    _check_valid(valid, device)
    if out is None:
        out = torch.empty(tokens, hidden, dtype=y.dtype, device=device)
    else:
        check_tensor("out", out, (tokens, hidden), (y.dtype,), device)
    if device.type == "cpu":
        permutation_cpu.unpermute(y.detach(), places, topk_weights, valid, out)
        return out

    from moe_a2a.kernels.unpermute import unpermute as kernel

    with _on(device):
        kernel(y.detach(), places, topk_weights, out, valid=valid, processors=_processors(device))
    return out


def new_outputs(
    x: torch.Tensor, topk_ids: torch.Tensor, experts: int, rows: int, weights: bool, scales: torch.Tensor | None
) -> Outputs:
    """Storage for what the kernels write."""
    from moe_a2a.kernels.permute import REPORT_WORDS, Outputs

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    return Outputs(
        x=x.new_empty(rows, x.shape[1]),
        expert_ids=ints(rows),
        source=ints(rows),
        counts=ints(experts),
        offsets=ints(experts + 1),
        places=ints(*topk_ids.shape),
        topk_weights=torch.empty(rows, dtype=torch.float32, device=x.device) if weights else None,
        scales=None if scales is None else scales.new_empty(scales.shape[1], rows),
        report=torch.empty(REPORT_WORDS, dtype=torch.int64, device=x.device),
    )


def _check_rows(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """A matrix on a CPU or a GPU, whose rows kernels can move."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; give a torch tensor [rows, H]")
    if value.device.type not in ("cpu", "cuda"):
        raise InputError(f"{name} is on {value.device}; allowed: cpu, cuda")
    check_tensor(name, value, ("rows", "H"), dtypes, value.device)
    step = _ROW_BYTES // value.element_size()
    if value.shape[1] == 0 or value.shape[1] % step:
        raise InputError(
            f"{name} has {value.shape[1]} columns of {value.dtype}; give a multiple of {step}: rows are moved "
            f"{_ROW_BYTES} bytes at a time"
        )


def _check_tokens(x: object, topk_ids: object, num_experts: object) -> tuple[int, int]:
    """x, ids and the number of experts of `permute`. Returns T and K."""
    _check_rows("x", x, (*_PLAIN, FP8))
    assert isinstance(x, torch.Tensor)
    ids = check_tensor("topk_ids", topk_ids, (x.shape[0], "K"), _IDS, x.device)
    if not 1 <= ids.shape[1] <= MAX_TOP_K:
        raise InputError(f"topk_ids has {ids.shape[1]} columns; allowed are 1 to {MAX_TOP_K}")
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not 1 <= num_experts <= MAX_EXPERTS:
        raise InputError(f"num_experts={num_experts!r}; allowed is an int from 1 to {MAX_EXPERTS}")
    return ids.shape[0], ids.shape[1]


def _check_scales(x: torch.Tensor, scales: object) -> None:
    """Scales of FP8 tokens, as the contiguous layout hands them out. Their values are not looked at."""
    if x.dtype != FP8:
        raise InputError(f"scales belong to an x that is float8_e4m3fn; x is {x.dtype}: leave scales out")
    tokens, hidden = x.shape
    if hidden % GROUP:
        raise InputError(f"x has {hidden} columns; scales are for groups of {GROUP}: give a multiple of {GROUP}")
    shapes = {torch.float32: (tokens, hidden // GROUP), torch.int32: (tokens, -(-hidden // (4 * GROUP)))}
    if not isinstance(scales, torch.Tensor) or scales.device != x.device or shapes.get(scales.dtype) != scales.shape:
        allowed = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in shapes.items())
        given = type(scales).__name__
        if isinstance(scales, torch.Tensor):
            given = f"{scales.dtype} {list(scales.shape)} on {scales.device}"
        raise InputError(f"scales is {given}; give {allowed} on {x.device}")
    if 1 not in scales.stride() or scales.data_ptr() % 16:
        raise InputError(
            f"scales has strides {scales.stride()}, at an address that is {scales.data_ptr() % 16} modulo 16; give a "
            "row-major or column-major matrix that starts at a multiple of 16 bytes (.contiguous())"
        )


def _check_valid(valid: object, device: torch.device) -> None:
    if valid is not None:
        check_tensor("valid", valid, (1,), (torch.int32,), device)


def _check_capacity(capacity: object) -> int:
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
        raise InputError(f"capacity={capacity!r}; give a number of rows, or None for the worst case")
    return capacity


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes launches go to this GPU."""
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
