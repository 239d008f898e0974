"""What bench/sglang_server.py makes of what it found: comparisons with the oracle, medians, ratios."""

from __future__ import annotations

import statistics
from typing import Any

from sglang_compare import compare
from sglang_variants import is_exact, reference_of

#: Answers that are compared; too long for a report.
COMPARED = ("answers", "crowd", "crowd_again")
_MEASURED = ("decode", "stream", "one", "prefill")
_KEPT = ("start_s", "ready_s", "first_request_s", "in_place", "failed", "prefill_profile")


def report(results: dict[str, dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """`comparisons` by "variant/part", `measured` by variant, `ratios` of the medians of tokens a second."""
    measured = {variant: _measured(found) for variant, found in results.items()}
    ratios: dict[str, float] = {}
    for variant in [name for name in results if name.startswith("moe-a2a") and not is_exact(name)]:
        for other in ("upstream", "none", "oracle"):
            for part in _MEASURED:
                if part in measured[variant] and part in measured.get(other, {}):
                    ours, theirs = (measured[one][part]["tokens_per_s"]["median"] for one in (variant, other))
                    ratios[f"{part}: {variant} / {other}"] = ours / theirs
    return {"ratios": ratios, "measured": measured, "comparisons": _comparisons(results, tolerance)}


def _comparisons(results: dict[str, dict[str, Any]], tolerance: float) -> dict[str, Any]:
    out = {}
    for variant, found in results.items():
        reference = results.get(reference_of(variant), {})
        own = variant == reference_of(variant)
        for one, other in [("crowd", "crowd_again")] if own else [("answers", "answers"), ("crowd", "crowd")]:
            if one in reference and other in found:
                out[f"{variant}/{other}"] = compare(reference[one], found[other], tolerance)
    return out


def _measured(found: dict[str, Any]) -> dict[str, Any]:
    out = {name: found[name] for name in _KEPT if name in found}
    for part in _MEASURED:
        if rounds := found.get(part):
            out[part] = middles(rounds)
    return out


def middles(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The median, least and most of each value that all rounds have."""
    return {name: _middle([one[name] for one in rounds]) for name in rounds[0]}


def _middle(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "rounds": len(values)}
