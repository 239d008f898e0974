"""Reducing the pieces of several ranks, in the order of ranks, so that the result is the same on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from moe_a2a.collectives.signature import Reduction
from moe_a2a.errors import InputError

_OPS = {
    "SUM": Reduction.SUM,
    "AVG": Reduction.AVG,
    "PRODUCT": Reduction.PRODUCT,
    "MIN": Reduction.MIN,
    "MAX": Reduction.MAX,
    "BAND": Reduction.BAND,
    "BOR": Reduction.BOR,
    "BXOR": Reduction.BXOR,
}
_BITWISE = (Reduction.BAND, Reduction.BOR, Reduction.BXOR)
_KINDS = {getattr(dist.ReduceOp, name): ours for name, ours in _OPS.items()}
#: 16-bit floats are added and multiplied in fp32, and rounded once.
_WIDE = (torch.float16, torch.bfloat16)
_WIDENED = (Reduction.SUM, Reduction.AVG, Reduction.PRODUCT)
_UNSUPPORTED = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_Step = Callable[..., torch.Tensor]
_IN_PLACE: dict[Reduction, _Step] = {
    Reduction.SUM: torch.add,
    Reduction.AVG: torch.add,
    Reduction.PRODUCT: torch.mul,
    Reduction.MIN: torch.minimum,
    Reduction.MAX: torch.maximum,
    Reduction.BAND: torch.bitwise_and,
    Reduction.BOR: torch.bitwise_or,
    Reduction.BXOR: torch.bitwise_xor,
}
_FOR_BOOL: dict[Reduction, _Step] = {
    Reduction.SUM: torch.logical_or,
    Reduction.MAX: torch.logical_or,
    Reduction.BOR: torch.logical_or,
    Reduction.PRODUCT: torch.logical_and,
    Reduction.MIN: torch.logical_and,
    Reduction.BAND: torch.logical_and,
    Reduction.BXOR: torch.logical_xor,
}


def reduction_of(op: dist.ReduceOp.RedOpType | dist.ReduceOp, dtype: torch.dtype) -> Reduction:
    """torch's reduction as ours. Raises InputError if tensors of this dtype cannot be reduced so."""
    kind = _KINDS.get(getattr(op, "op", op))
    if kind is None:
        raise InputError(f"reduction {op} is not offered; allowed: {', '.join(name.lower() for name in _OPS)}")
    name = kind.name.lower()
    if dtype in _UNSUPPORTED:
        raise InputError(f"tensors of {dtype} cannot be reduced ({name}); cast them first")
    if kind in _BITWISE and (dtype.is_floating_point or dtype.is_complex):
        raise InputError(f"{name} is for integers and bool, not for {dtype}")
    if kind == Reduction.AVG and dtype == torch.bool:
        raise InputError("avg is not for bool; use max (any) or min (all)")
    if dtype.is_complex and kind not in _WIDENED:
        raise InputError(f"{name} is not for complex numbers")
    return kind


def reduce(kind: Reduction, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """out = parts[0] op parts[1] op ..., for "avg" divided by their number (integers: towards zero).

    All are [n] of one dtype; parts[0] may be out. bool: sum and max mean any, product and min mean all.
    """
    step = _IN_PLACE[kind]
    if out.dtype == torch.bool:
        step = _FOR_BOOL[kind]
    wide = out.dtype in _WIDE and kind in _WIDENED
    total = parts[0].float() if wide else out
    rest = parts[1:]
    if not wide and rest:
        step(parts[0], rest[0], out=out)
        rest = rest[1:]
    elif not wide and out.data_ptr() != parts[0].data_ptr():
        out.copy_(parts[0])
    for part in rest:
        step(total, part, out=total)
    if kind == Reduction.AVG:
        total.div_(len(parts), rounding_mode=None if total.dtype.is_floating_point or total.is_complex() else "trunc")
    if wide:
        out.copy_(total)
