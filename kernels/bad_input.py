"""Reporting a wrong id, scale or weight: see `moe_a2a.gpu.report` for the word that this writes.

Nothing is reduced and nothing waits: each wrong element has an atomic of its own, and the smallest word stays. Where
all is well this costs the comparison.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def report_bad(bad, token, position, kind, value, report, L: tl.constexpr):
    """Report the elements of a tensor for which `bad` is true.

    bad, position, value: tensors of one shape; value: int32 or int64, of which 32 bits are kept; token, kind: numbers,
    or tensors that broadcast to that shape.
    """
    word = (value.to(tl.int64) & 0xFFFFFFFF) + (position * 0).to(tl.int64)
    word |= (token + position * 0).to(tl.int64) << 42
    word |= tl.minimum(position, 127).to(tl.int64) << 35
    word |= (kind + position * 0).to(tl.int64) << 32
    tl.atomic_min(report + L.BAD_INPUT + position * 0, word, mask=bad, sem="relaxed")


@triton.jit
def report_bad_weights(weights, inside, token, k, report, LARGEST: tl.constexpr, L: tl.constexpr):
    """Report weights that are not finite, or beyond LARGEST. weights: fp32 [..., K_PAD]; k: choices, of that shape."""
    # A NaN compares as false.
    bad = inside & ((tl.abs(weights) <= LARGEST) == 0)
    report_bad(bad, token, k, 4, weights.to(tl.int32, bitcast=True), report, L)
