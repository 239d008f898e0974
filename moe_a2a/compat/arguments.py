"""Checks that the calls of both of DeepEP's modes make."""

from __future__ import annotations

import torch

from moe_a2a.errors import InputError


def capturing(device: torch.device) -> bool:
    """Is a CUDA graph being captured on the current stream?"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor of exactly this kind. Raises InputError."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; give a torch tensor {list(shape)}")
    if value.device != device or value.dtype != dtype or tuple(value.shape) != shape or not value.is_contiguous():
        raise InputError(
            f"{name} is {value.dtype} {list(value.shape)} on {value.device} with strides {list(value.stride())}; "
            f"give a contiguous {dtype} {list(shape)} on {device}"
        )
    return value
