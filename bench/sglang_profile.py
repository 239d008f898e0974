"""What the GPUs do during a request: SGLang's own profiler, and its traces in a few numbers."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_process import Server, ServerFailed

_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_MOST = 25
_SETTLE_S = 0.5


def profile(server: Server, folder: Path, work: Callable[[], Any], ranks: int = 2) -> dict[str, Any]:
    """Run `work` under the profiler of a server that writes to `folder`; returns each rank's `summary`. Raises
    ServerFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.trace.json.gz"):
        old.unlink()
    how = {"output_dir": str(folder), "activities": ["GPU"], "with_stack": False, "record_shapes": False}
    server.ask("/start_profile", how, 30)
    work()
    time.sleep(_SETTLE_S)
    server.ask("/stop_profile", {}, 60)
    traces = sorted(folder.glob("*.trace.json.gz"))
    if len(traces) != ranks:
        raise ServerFailed(f"the profiler wrote {len(traces)} traces for {ranks} ranks")
    return {f"rank {number}": summary(_events(trace)) for number, trace in enumerate(traces)}


def summary(events: list[tuple[str, float, float]]) -> dict[str, Any]:
    """events: (name, begin, duration in us) of what ran on one GPU. `span_ms`, from the first to the last; `busy_ms`,
    with something running; `kernels`, those that took longest, with all of their name added up."""
    if not events:
        raise ServerFailed("a trace has nothing that ran on a GPU")
    took: dict[str, list[float]] = defaultdict(list)
    busy, end = 0.0, 0.0
    for name, begin, duration in sorted(events, key=lambda event: event[1]):
        took[short(name)].append(duration)
        busy += max(0.0, begin + duration - max(begin, end))
        end = max(end, begin + duration)
    longest = sorted(took.items(), key=lambda item: -sum(item[1]))[:_MOST]
    return {
        "span_ms": (end - min(begin for _, begin, _ in events)) / 1e3,
        "busy_ms": busy / 1e3,
        "kernels": {name: {"ms": sum(times) / 1e3, "count": len(times)} for name, times in longest},
    }


def short(name: str) -> str:
    """A kernel's name without its types."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name, maxsplit=1)[0][:80] or name[:80]


def _events(trace: Path) -> list[tuple[str, float, float]]:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    return [(event["name"], event["ts"], event["dur"]) for event in events if event.get("cat") in _KINDS]
