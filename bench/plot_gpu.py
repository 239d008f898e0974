"""Plots of how the cost on GPU ranks grows with T, K and E, from files that `moe-a2a bench --device cuda` wrote.

python bench/plot_gpu.py bench/results/gpu_tokens.json [...] --out docs

Writes gpu_tokens.png (over T) and gpu_topk_experts.png (over K, and over E), from the entries in graph mode that were
correct. Of the entries that differ in a panel's axis alone it shows the largest set.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moe_a2a.bench.report import COLOURS

AXES = {"tokens": "tokens per rank T", "top_k": "experts per token K", "experts": "routed experts E"}
PARTS = {"both": "#1a202c", "dispatch": COLOURS[0], "combine": COLOURS[1]}
BASELINES = {"nccl": "#a0aec0", "deep_ep": "#dd6b20", "mooncake": "#805ad5"}
DASHES = {"fp8": "-", "bf16": "--"}
Entry = dict[str, Any]


def load(paths: list[str]) -> list[Entry]:
    """Entries to be plotted. Later files replace entries of earlier ones that have the same name."""
    found = {}
    for path in paths:
        for entry in json.loads(pathlib.Path(path).read_text())["cases"]:
            if entry["device"] == "cuda" and entry["mode"] == "graph" and entry["correct"]:
                key = tuple(entry[name] for name in ("dtype", "ranks", "hidden", "routing", *AXES))
                found[key] = entry
    return list(found.values())


def along(entries: list[Entry], axis: str) -> dict[str, list[Entry]]:
    """The largest set of entries that differ in `axis` and dtype alone, by dtype, sorted. Raises SystemExit if none
    has two values of `axis`."""
    rest = [name for name in ("ranks", "hidden", "routing", *AXES) if name != axis]
    values = collections.defaultdict(set)
    for entry in entries:
        values[tuple(entry[name] for name in rest)].add((entry["dtype"], entry[axis]))
    common = max(values, key=lambda key: len(values[key]), default=())
    chosen = sorted((e for e in entries if tuple(e[name] for name in rest) == common), key=lambda e: e[axis])
    series = {dtype: [entry for entry in chosen if entry["dtype"] == dtype] for dtype in DASHES}
    lines = {dtype: points for dtype, points in series.items() if len(points) > 1}
    if not lines:
        raise SystemExit(f"no two correct entries in graph mode that differ in {axis} alone: nothing to plot over it")
    return lines


def panel(axes: Any, entries: list[Entry], axis: str) -> None:
    """Lines of both, dispatch and combine, and of the baselines' both."""
    series = along(entries, axis)
    for dtype, points in series.items():
        for part, colour in PARTS.items():
            draw(axes, points, axis, lambda e, part=part: e[f"{part}_us"], f"{part}, {dtype}", colour, dtype)
        for name, colour in BASELINES.items():
            with_it = [e for e in points if "both_us" in e["baselines"].get(name, {})]
            if with_it:
                label = f"{name}, both, {dtype}"
                draw(axes, with_it, axis, lambda e, name=name: e["baselines"][name]["both_us"], label, colour, dtype)
    ticks = sorted({e[axis] for points in series.values() for e in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    marks = [m * 10**p for p in range(6) for m in (1, 2, 5) if low <= m * 10**p <= high]
    axes.set_yticks(marks, [str(m) for m in marks])
    axes.grid(alpha=0.3)
    axes.set_xlabel(AXES[axis])
    first = next(iter(series.values()))[0]
    held = {"tokens": "T", "top_k": "K", "experts": "E", "hidden": "H"}
    others = ", ".join(f"{letter}={first[name]}" for name, letter in held.items() if name != axis)
    axes.set_title(f"{first['ranks']} ranks, {others}", fontsize=9)


def draw(axes: Any, points: list[Entry], axis: str, time: Any, label: str, colour: str, dtype: str) -> None:
    x = [e[axis] for e in points]
    axes.plot(x, [time(e)["p50"] for e in points], DASHES[dtype], color=colour, marker="o", markersize=3, label=label)


def save(figure: Any, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", help="files of moe-a2a bench --device cuda --json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"), help="folder (default: docs)")
    arguments = parser.parse_args()
    entries = load(arguments.json)
    for name, names in {"gpu_tokens": ["tokens"], "gpu_topk_experts": ["top_k", "experts"]}.items():
        figure, axes = plt.subplots(1, len(names), figsize=(7.5 if len(names) == 1 else 10, 4.2), squeeze=False)
        for place, axis in zip(axes[0], names, strict=True):
            panel(place, entries, axis)
        axes[0][0].set_ylabel("us, p50 of all ranks, in a graph")
        axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        save(figure, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
