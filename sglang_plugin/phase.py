"""What decode and prefill steps have in common: where they run, and checks of what SGLang brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_a2a.errors import HandleError, InputError, NotFinite
from moe_a2a.sglang_plugin import buffers
from moe_a2a.sglang_plugin.buffers import Shared, Sizes

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One dispatcher's place. channel: the number of its micro-batch. num_local_experts: as SGLang counts them."""

    group: dist.ProcessGroup
    sizes: Sizes
    num_local_experts: int
    channel: int


@dataclass(frozen=True)
class Tokens:
    """What a rank brings to a step. x: bf16 [T, H]; ids: int64 [T, K], -1 for no expert; weights: fp32 [T, K]."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, topk_output: Any, place: Place) -> Tokens:
        """Raises InputError."""
        ids, weights = topk_output.topk_ids, topk_output.topk_weights
        sizes = place.sizes
        if x.dim() != 2 or x.shape[1] != sizes.hidden_size or x.dtype != torch.bfloat16:
            raise InputError(
                f"hidden_states is {x.dtype} {list(x.shape)}; --moe-a2a-backend mooncake takes torch.bfloat16 "
                f"[T, {sizes.hidden_size}]: start the server with --dtype bfloat16"
            )
        if not len(x) and ids.shape[1:] != (sizes.top_k,):
            # SGLang leaves fused shared experts out of the routing of a rank without tokens.
            ids, weights = ids.new_empty((0, sizes.top_k)), weights.new_empty((0, sizes.top_k))
        return Tokens(_whole(x), _whole(ids.to(torch.int64)), _whole(weights.to(torch.float32)))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, from a multiple of 16 bytes on, as kernels read it: usually the tensor itself."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def check_fits(tokens: Tokens, shared: Shared, phase: str, flags: str) -> None:
    """Raises InputError."""
    most = shared.a2a.config.max_tokens_per_rank
    if len(tokens.x) > most:
        raise InputError(
            f"a {phase} batch brings {len(tokens.x)} tokens to a rank whose buffers hold {most}, the most that {flags} "
            "allowed when the server started; lower these flags, or report the combination of flags"
        )


def check_local_experts(place: Place, shared: Shared) -> None:
    """Raises InputError."""
    if shared.a2a.local_experts != place.num_local_experts:
        raise InputError(
            f"a layer has {place.num_local_experts} local experts and {place.sizes.num_experts} in all, which "
            f"{shared.a2a.world_size} ranks would hold by {shared.a2a.local_experts}: --ep-size must be the number of "
            "ranks of the TP group, and every rank hold equally many"
        )


def check_combined(name: str, given: torch.Tensor, dispatched: torch.Tensor) -> None:
    """Combine uses the routing of the dispatch; the one that comes with its input must be the same. Raises
    HandleError."""
    if given.shape != dispatched.shape or given.data_ptr() != dispatched.data_ptr():
        raise HandleError(
            f"combine was given {name} {list(given.shape)}, not those of the dispatch, {list(dispatched.shape)}; "
            "a runner or hook that changes them between dispatch and combine does not work with "
            "--moe-a2a-backend mooncake"
        )


def past_not_finite(call: Callable[[], T]) -> T:
    """Make a call of an `AllToAll`. If it says that an earlier step had values that are not finite (GPU ranks), say so
    in the log and make it again: that step is done, and this one had not begun."""
    try:
        return call()
    except NotFinite as error:
        buffers.note_not_finite(error)
        return call()
