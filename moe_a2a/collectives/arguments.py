"""What a call is given, checked before anything is sent, and as the flat tensors that are moved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from moe_a2a.collectives.letters import MOST_TAG
from moe_a2a.collectives.signature import dtype_code
from moe_a2a.errors import InputError

Tensors = Sequence[torch.Tensor]


def check_tensor(tensor: torch.Tensor) -> None:
    """Raises InputError."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{type(tensor).__name__} given; give a tensor")
    if tensor.device.type != "cpu":
        raise InputError(
            f"a tensor on {tensor.device} given; this group is for CPU tensors: move it with .cpu(), or make another "
            "group for GPUs"
        )
    if tensor.layout != torch.strided:
        raise InputError(f"a {tensor.layout} tensor given; give a dense one (.to_dense())")
    dtype_code(tensor.dtype)


def flat(tensor: torch.Tensor, output: bool = False) -> tuple[torch.Tensor, Callable[[], None] | None]:
    """([n] contiguous, what to call when an operation has written to it (output only), None if nothing). Raises
    InputError."""
    check_tensor(tensor)
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), None
    copy = tensor.contiguous()
    if output and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise InputError("an expanded tensor cannot be written to, several of its elements are one; use .contiguous()")
    return copy.view(-1), (lambda: tensor.copy_(copy)) if output else None  # type: ignore[return-value]


def bytes_of(data: torch.Tensor) -> torch.Tensor:
    """[n] of anything as [nbytes] uint8 over the same memory."""
    return data.view(torch.uint8)


def check_root(rank: int, size: int, name: str, what: str = "root") -> int:
    if not 0 <= rank < size:
        raise InputError(f"{name}: {what}={rank}; allowed is 0 to {size - 1}, ranks of this group")
    return rank


def check_tag(tag: int) -> int:
    if not 0 <= tag <= MOST_TAG:
        raise InputError(f"tag={tag}; allowed is 0 to {MOST_TAG}")
    return tag


def same_dtype(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    check_tensor(one)
    check_tensor(other)
    if one.dtype != other.dtype:
        raise InputError(f"{name}: tensors of {one.dtype} and {other.dtype}; give one dtype")


def check_pieces(pieces: Tensors, like: torch.Tensor, sizes: Collection[int], name: str) -> None:
    """Raises InputError unless there is one piece for each rank, of the size and dtype of `like`."""
    if len(pieces) not in sizes:
        raise InputError(f"{name}: {len(pieces)} tensors for {next(iter(sizes))} ranks; give one for each")
    for piece in pieces:
        same_dtype(piece, like, name)
        if piece.numel() != like.numel():
            raise InputError(
                f"{name}: tensors of {piece.numel()} and {like.numel()} elements; all ranks' have to be equal"
            )


def split_rows(
    data: torch.Tensor, tensor: torch.Tensor, splits: Sequence[int] | None, sizes: Collection[int], name: str
) -> list[torch.Tensor]:
    """The pieces of a tensor's flat data for each rank: these numbers of rows (None or empty: equal ones)."""
    ranks = next(iter(sizes))
    rows = tensor.shape[0] if tensor.dim() else 1
    if not splits:
        if rows % ranks:
            raise InputError(f"all_to_all_single: {rows} rows of {name} for {ranks} ranks; give split sizes")
        splits = [rows // ranks] * ranks
    if len(splits) not in sizes or min(splits) < 0 or sum(splits) != rows:
        raise InputError(
            f"all_to_all_single: {name}_split_sizes={list(splits)} for {rows} rows and {ranks} ranks; give one for "
            "each rank, and the number of rows in all"
        )
    width = data.numel() // rows if rows else 0
    return list(torch.split(data, [count * width for count in splits]))
