"""Times of events, as the programs here report them."""

from __future__ import annotations

import statistics


def summary(seconds: list[float], digits: int = 2) -> dict[str, float]:
    """Median, 99th percentile and largest, in milliseconds."""
    ordered = sorted(1e3 * s for s in seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    found = {"p50": statistics.median(ordered), "p99": last, "max": ordered[-1]}
    return {name: round(value, digits) for name, value in found.items()}
