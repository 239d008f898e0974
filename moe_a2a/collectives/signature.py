"""What an operation is, in two words that all ranks compare before any of them looks at data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from moe_a2a.errors import InputError


class Kind(IntEnum):
    ALL_REDUCE = 1
    BROADCAST = 2
    REDUCE = 3
    ALL_GATHER = 4
    REDUCE_SCATTER = 5
    ALL_TO_ALL = 6
    ALL_TO_ALL_SPLIT = 7
    GATHER = 8
    SCATTER = 9
    BARRIER = 10


class Reduction(IntEnum):
    NONE = 0
    SUM = 1
    AVG = 2
    PRODUCT = 3
    MIN = 4
    MAX = 5
    BAND = 6
    BOR = 7
    BXOR = 8


#: Numbered for good: ranks of two versions of torch may be in one group.
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
#: Bits of the first word: the view in which an operation runs is settled for the rank that says so; it has been in
#: another one before, and has written its data once more.
SETTLED, RETURNED = 1 << 31, 1 << 30
_NO_ROOT = 0xFF
_MOST = (1 << 63) - 1


@dataclass(frozen=True)
class Signature:
    """count: elements of the tensor, or of each rank's piece; for ALL_TO_ALL_SPLIT of one row."""

    kind: Kind
    count: int = 0
    dtype: torch.dtype = torch.uint8
    reduction: Reduction = Reduction.NONE
    root: int = -1

    def words(self, roll: int) -> tuple[int, int]:
        """roll: 30 bits that stand for the ranks that take part; those above them are `SETTLED` and `RETURNED`."""
        root = _NO_ROOT if self.root < 0 else self.root
        return (self.kind << 24 | self.reduction << 16 | root << 8 | dtype_code(self.dtype)) << 32 | roll, self.count

    def differs(self, words: tuple[int, int]) -> bool:
        """Whether a rank with these words calls something else; who takes part does not count."""
        own = self.words(0)
        return words[0] >> 32 != own[0] >> 32 or words[1] != own[1]

    def __str__(self) -> str:
        return describe(self.words(0))


def dtype_code(dtype: torch.dtype) -> int:
    """Raises InputError."""
    try:
        return DTYPES.index(dtype)
    except ValueError:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise InputError(f"tensors of {dtype} cannot be sent; allowed: {names}") from None


def dtype_name(code: int) -> str:
    return str(DTYPES[code]).removeprefix("torch.") if code < len(DTYPES) else f"dtype {code}"


def describe(words: tuple[int, int]) -> str:
    """In a message: all_reduce(sum) of 8 float32. Takes whatever another rank sent."""
    code = words[0] >> 32
    kind, reduction, root, dtype = code >> 24 & 0xFF, code >> 16 & 0xFF, code >> 8 & 0xFF, code & 0xFF
    if kind not in list(Kind):
        return f"something of another version (kind {kind})"
    text = Kind(kind).name.lower()
    if reduction in list(Reduction) and reduction:
        text += f"({Reduction(reduction).name.lower()})"
    if kind != Kind.BARRIER:
        of = "rows of " if kind == Kind.ALL_TO_ALL_SPLIT else ""
        text += f" of {of}{words[1]} {dtype_name(dtype)}"
    if root != _NO_ROOT:
        text += f", root {root}"
    return text
