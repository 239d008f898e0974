"""What came of a chaos run so far: kept in a file, so that it can go on another day."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_a2a.errors import ConfigError

#: What must not happen: kind of fault -> what to call it.
FAULTS = {
    "hang": "hangs",
    "rows": "wrong rows",
    "views": "disagreeing views",
    "ended": "processes that ended by themselves",
    "errors": "errors that are none of this package",
}
_VERSION = 1


@dataclass
class Tally:
    """given: what a run is asked for, and must be asked for again to go on with it. events: how many were carried out;
    drawn: the number of the next one. counts: by kind; skipped: likewise, of those that this machine cannot do. points:
    how often ranks were struck where. times: name -> seconds. faults: [kind, number of the event, text]. uncalled:
    ranks excluded and steps not whole to which nothing was done: a machine that is too busy does that."""

    given: dict[str, Any]
    events: int = 0
    drawn: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    victims: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    faults: list[tuple[str, int, str]] = field(default_factory=list)
    uncalled: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0

    def count(self, counts: dict[str, int], what: str) -> None:
        counts[what] = counts.get(what, 0) + 1

    def time(self, what: str, seconds: float) -> None:
        self.times.setdefault(what, []).append(round(seconds, 5))

    def save(self, path: Path) -> None:
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps({"moe_a2a_chaos": _VERSION, **asdict(self)}) + "\n")
        os.replace(beside, path)

    @classmethod
    def load(cls, path: Path, given: dict[str, Any]) -> Tally:
        """Raises ConfigError if it is none, or of a run that was asked for something else."""
        try:
            said = json.loads(path.read_text())
            if said.pop("moe_a2a_chaos") != _VERSION:
                raise ValueError("of another version")
            tally = cls(**said)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path} is not what a chaos run has left: {error}; give another file") from error
        for name, value in given.items():
            if tally.given.get(name) != value:
                raise ConfigError(
                    f"{path} is of a run with {name}={tally.given.get(name)!r}, this one has {value!r}; "
                    "give the same, or another file"
                )
        return tally

    def summary(self) -> dict[str, Any]:
        """For people and for bench/results: times in ms."""
        return {
            **self.given,
            "events": self.events,
            "counts": dict(sorted(self.counts.items())),
            "skipped": self.skipped,
            "points": dict(sorted(self.points.items())),
            "victims": dict(sorted(self.victims.items())),
            "steps_checked": self.steps,
            "rows_checked": self.rows,
            "seconds": round(self.seconds, 1),
            "faults": {name: sum(kind == k for kind, _, _ in self.faults) for k, name in FAULTS.items()},
            "uncalled": self.uncalled,
            "times_ms": {what: distribution(seconds) for what, seconds in sorted(self.times.items())},
        }


def distribution(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1e3 * s for s in seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered), 1),
        "p99": round(last, 1),
        "max": round(ordered[-1], 1),
    }
