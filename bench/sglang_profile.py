"""What the GPUs do during a request: SGLang's own profiler, and its traces in a few numbers."""

from __future__ import annotations

import bisect
import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from sglang_process import Server, ServerFailed

_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_MOST = 25
_SETTLE_S = 0.5


def profile(
    server: Server, folder: Path, work: Callable[[], Any], anchor: str = "_fwd_kernel", ranks: int = 2
) -> dict[str, Any]:
    """Run `work` under the profiler of a server that writes to `folder`; returns each rank's `summary` and `layer`.
    anchor: the kernel with which a layer begins. Raises ServerFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.trace.json.gz"):
        old.unlink()
    how = {"output_dir": str(folder), "activities": ["CPU", "GPU"], "with_stack": False, "record_shapes": False}
    server.ask("/start_profile", how, 30)
    work()
    time.sleep(_SETTLE_S)
    server.ask("/stop_profile", {}, 60)
    traces = sorted(folder.glob("*.trace.json.gz"))
    if len(traces) != ranks:
        raise ServerFailed(f"the profiler wrote {len(traces)} traces for {ranks} ranks")
    out: dict[str, Any] = {}
    for number, trace in enumerate(traces):
        with gzip.open(trace) as file:
            events = [event for event in json.load(file)["traceEvents"] if "cat" in event and "dur" in event]
        ran = [(event["name"], event["ts"], event["dur"]) for event in events if event["cat"] in _KINDS]
        out[f"rank {number}"] = {**summary(ran), "layer": layer(events, anchor)}
    return out


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


def layer(events: list[dict[str, Any]], anchor: str) -> list[dict[str, Any]]:
    """What the host called for one layer, the median one of those that begin with a launch of the kernel `anchor`:
    `call`, the kernel's name or the function's; `host_us`, since the layer began; `took_us`, of the call;
    `gpu_us`, of the kernel."""
    kernels = {e["args"].get("correlation"): e for e in events if e["cat"] in _KINDS and "args" in e}
    calls = []
    for event in sorted((e for e in events if e["cat"] in _CALLS), key=lambda e: float(e["ts"])):
        kernel = kernels.get(event.get("args", {}).get("correlation"))
        name = short(kernel["name"]) if kernel else event["name"]
        if kernel or event["dur"] >= 1 or "Synchronize" in event["name"]:
            calls.append((event["ts"], name, event["dur"], kernel["dur"] if kernel else 0.0))
    begins = [at for at, name, _, _ in calls if name == anchor]
    lengths = sorted((end - begin, begin, end) for begin, end in pairwise(begins))
    if not lengths:
        return []
    _, begin, end = lengths[len(lengths) // 2]
    times = [at for at, *_ in calls]
    inside = calls[bisect.bisect_left(times, begin) : bisect.bisect_right(times, end)]
    return [
        {"call": name, "host_us": round(at - begin, 1), "took_us": round(took, 1), "gpu_us": round(ran, 1)}
        for at, name, took, ran in inside
    ]
