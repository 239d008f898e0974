"""What rows and scales look like, as numbers that launchers hand to kernels. No kernel is here."""

from __future__ import annotations

#: What happens to a row on its way: sent as it is, quantised (fp32 scales, or powers of two), or FP8 already.
COPY, QUANTISE, QUANTISE_POW2, GIVEN, GIVEN_POW2 = range(5)
#: Bits of a header that tell the receiver what the rows hold.
BITS_FP8, BITS_POW2, BITS_WEIGHTS, BITS_CONTIGUOUS = 1, 2, 4, 8

#: Form in which scales are handed out.
NO_SCALES, FP32_SCALES, PACKED_SCALES = range(3)


def header_bits(mode: int, weights: bool, contiguous: bool = False) -> int:
    """What a header says about rows that are sent in this mode, and how they lie."""
    bits = 0 if mode == COPY else BITS_FP8
    if mode in (QUANTISE_POW2, GIVEN_POW2):
        bits |= BITS_POW2
    return bits | (BITS_WEIGHTS if weights else 0) | (BITS_CONTIGUOUS if contiguous else 0)
