"""What kernels found wrong, as words that the host reads at its next synchronisation point.

Word BAD_INPUT: token << 42 | position << 35 | kind << 32 | value. The smallest wins, so that the first wrong token of
a rank is named, whatever program saw it first. position: of the choice, or of the scale, at most 127. kind 0: an id
out of range, value id + 2**31 (limited to 32 bits); 1: an id that the token has twice; 2: a scale that cannot be used,
value its fp32 bits; 3: the same for a scale that quantising made; 4: a weight that cannot be used, value its fp32 bits.
Word LOST: a bit for each rank that was missing from some step. Word MISUSE: steps that were made in a wrong order.
"""

from __future__ import annotations

import struct

import torch

from moe_a2a.config import GROUP
from moe_a2a.gpu.layout import Layout

#: Nothing wrong was seen.
NO_BAD_INPUT = 1 << 62
#: The words of a report that says nothing.
NOTHING = (NO_BAD_INPUT, 0, 0)
_GOOD_SCALES = "scales must be finite and above 0"
_SCALES = {
    2: ("scales", ", and powers of two for 'pow2' and 'ue8m0'"),
    3: ("x", " (a NaN or infinity in the hidden states gives such a scale)"),
}


def describe_bad_input(word: int, layout: Layout, dtype: torch.dtype) -> str:
    """The message for a BAD_INPUT word other than NO_BAD_INPUT. dtype: of the payload."""
    token, position, kind = word >> 42, (word >> 35) & 127, (word >> 32) & 7
    value = word & 0xFFFFFFFF
    number = struct.unpack("<f", struct.pack("<I", value))[0]
    if kind in (2, 3):
        what, why = _SCALES[kind]
        first = position * GROUP
        last = f"to {first + GROUP - 1}" if position < 127 else "or later"
        return f"{what}: token {token}, columns {first} {last} has scale {number:g}; {_GOOD_SCALES}{why}"
    if kind == 4:
        return (
            f"topk_weights[{token}, {position}] = {number:g}; router weights must be finite and within "
            f"{torch.finfo(dtype).max:g} for {dtype}"
        )
    chosen = value - (1 << 31)
    if kind == 1:
        return f"topk_ids[{token}] names expert {chosen} twice; a token's experts must differ"
    return f"topk_ids[{token}, {position}] = {chosen}; allowed are 0 to {layout.E - 1}, and -1 for no expert"


def is_value(word: int) -> bool:
    """Does a BAD_INPUT word report a weight or hidden state, sent as it is, and not an id or a given scale?"""
    return (word >> 32) & 7 in (3, 4)


def describe_misuse(word: int) -> str:
    """The message for a MISUSE word other than 0."""
    what = []
    if word & Layout.STARTED_EARLY:
        what.append("a step was dispatched, by a call or a replayed graph, while the one before the last was open")
    if word & Layout.ENDED_TWICE:
        what.append("a step was combined that had ended, by a graph that was replayed without its dispatch")
    if word & Layout.ROUTING_GONE:
        what.append("a step followed (like=) a routing that a later step, of another graph perhaps, had overwritten")
    return (
        f"{'; '.join(what)}: it sent nothing, and its result is lost. End each step of a channel before the next but "
        "one begins, replays included"
    )


def ranks_of(mask: int) -> list[int]:
    """The ranks in a mask."""
    return [r for r in range(mask.bit_length()) if mask >> r & 1]
