"""Comparing the answers of two servers to the same prompts."""

from __future__ import annotations

import math
from typing import Any


def compare(reference: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """How far the second server's logits are from the first's.

    Teacher-forced: differences of the log-probabilities of prompt tokens. Greedy: where a prompt's answers part, the
    reference's best two log-probabilities of that step must be within the tolerance, and so must the best ones of all
    steps before. `agrees` is whether all of that holds.
    """
    forced: list[float] = []
    before: list[float] = []
    parted: list[dict[str, Any]] = []
    finite = True
    for number, (one, two) in enumerate(zip(reference, other, strict=True)):
        finite = finite and all(map(math.isfinite, one["input"] + two["input"]))
        forced += [abs(a - b) for a, b in zip(one["input"], two["input"], strict=True)]
        steps = zip(one["output"], two["output"], strict=True)
        first = next((step for step, (a, b) in enumerate(steps) if a != b), len(one["output"]))
        before += [abs(a[0] - b[0]) for a, b in zip(one["top"][:first], two["top"][:first], strict=True)]
        if first < len(one["output"]):
            best, second = one["top"][first]
            parted.append({"prompt": number, "step": first, "gap": best - second})
    gaps = [part["gap"] for part in parted]
    # not(<=), so that a NaN is not within it
    close = not any(not (difference <= tolerance) for difference in forced + before + gaps)
    return {
        "agrees": finite and close,
        "tolerance": tolerance,
        "forced": _spread(forced),
        "greedy_before_parting": _spread(before),
        "parted": len(parted),
        "prompts": len(reference),
        "largest_gap": max(gaps, default=0.0),
        "partings": parted[:16],
    }


def _spread(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"count": 0}
    ordered = sorted(values)
    return {
        "count": len(values),
        "exact": sum(value == 0 for value in values),
        "mean": sum(values) / len(values),
        "p99": ordered[len(ordered) * 99 // 100],
        "max": ordered[-1],
    }
