"""Tensors over device memory that torch did not allocate."""

from __future__ import annotations

import math

import torch

from moe_a2a.errors import MoeA2AError


class _Place:
    """Tells torch where bytes lie (the CUDA array interface, version 3), and keeps their owner alive."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
        }


def bytes_at(address: int, nbytes: int, device: torch.device, owner: object) -> torch.Tensor:
    """[nbytes] uint8 over memory that `device` can read and write, without a copy. owner: lives as long as the tensor.

    The tensor's device is the one given, also where the memory is another GPU's or the host's.
    """
    made = torch.as_tensor(_Place(address, nbytes, owner), device=device)
    if made.data_ptr() != address or made.device != device:
        raise MoeA2AError(
            f"torch {torch.__version__} made a copy on {made.device} of memory that {device} maps; "
            "this version of torch cannot be used for GPU ranks"
        )
    return made


def part(data: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor over a place in `data` [n] uint8. offset: bytes. Raises ValueError for a place outside, or unaligned."""
    end = offset + math.prod(shape) * dtype.itemsize
    if offset < 0 or end > data.numel():
        raise ValueError(f"bytes {offset} to {end} are outside a region of {data.numel()} bytes")
    if offset % dtype.itemsize:
        raise ValueError(f"offset {offset} is not a multiple of {dtype}'s {dtype.itemsize} bytes")
    return data[offset:end].view(dtype).view(shape)
