"""What kernels found wrong, as words that the host reads at its next synchronisation point.

Word BAD_INPUT: token << 40 | position << 34 | kind << 32 | value. The smallest wins, so that the first wrong token of
a rank is named, whatever program saw it first. kind 0: an id out of range, value id + 2**31 (limited to 32 bits);
1: an id that the token has twice; 2: a scale that cannot be used, value its fp32 bits.
Word LOST: a bit for each rank that was missing from some step.
"""

from __future__ import annotations

import struct

from moe_a2a.config import GROUP
from moe_a2a.gpu.layout import Layout

#: Nothing wrong was seen.
NO_BAD_INPUT = 1 << 62


def describe_bad_input(word: int, layout: Layout) -> str:
    """The message for a BAD_INPUT word other than NO_BAD_INPUT."""
    token, position, kind = word >> 40, (word >> 34) & 63, (word >> 32) & 3
    value = word & 0xFFFFFFFF
    if kind == 2:
        scale = struct.unpack("<f", struct.pack("<I", value))[0]
        first = position * GROUP
        return (
            f"scales: token {token}, columns {first} to {first + GROUP - 1} has scale {scale:g}; scales must be "
            "finite, above 0, and powers of two for 'pow2' and 'ue8m0'"
        )
    chosen = value - (1 << 31)
    if kind == 1:
        return f"topk_ids[{token}] names expert {chosen} twice; a token's experts must differ"
    return f"topk_ids[{token}, {position}] = {chosen}; allowed are 0 to {layout.E - 1}, and -1 for no expert"


def ranks_of(mask: int) -> list[int]:
    """The ranks in a mask."""
    return [r for r in range(mask.bit_length()) if mask >> r & 1]
