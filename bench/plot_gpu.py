"""Plots of how the cost on GPU ranks grows with T, K and E, from files that `moe-a2a bench --device cuda` wrote.

python bench/plot_gpu.py bench/results/gpu_2xh200.json [...] --out docs

From the entries in graph mode that were correct it writes what they are enough for, and says what they are not:

    gpu_tokens.png          masked layout, over T: both halves and each, and the baselines' both
    gpu_topk_experts.png    masked layout, over K, and over E
    gpu_contiguous.png      contiguous layout, over T: each half on its slowest rank, by routing and SMs, and the
                            baselines' halves

Of the entries that differ in a panel's axis alone (for gpu_contiguous, in dtype, routing and SMs too) it shows the
largest set.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moe_a2a.bench.report import COLOURS

AXES = {"tokens": "tokens per rank T", "top_k": "experts per token K", "experts": "routed experts E"}
PARTS = {"both": "#1a202c", "dispatch": COLOURS[0], "combine": COLOURS[1]}
BASELINES = {"nccl": "#a0aec0", "deep_ep": "#dd6b20", "mooncake": "#805ad5"}
DASHES = {"fp8": "-", "bf16": "--"}
MARKERS = {"fp8": "s", "bf16": "o"}
ROUTED = ("#1a202c", "#2b6cb0", "#2f855a", "#c53030", "#b7791f", "#6b46c1")  # one kind of routing after the other
SHARES = ("-", "--", ":", "-.")  # one number of SMs after the other
Entry = dict[str, Any]


class TooFew(Exception):
    """There are not entries enough for a figure."""


def load(paths: list[str]) -> list[Entry]:
    """Entries to be plotted. Later files replace entries of earlier ones that measured the same. Raises SystemExit."""
    found = {}
    for path in paths:
        content = json.loads(pathlib.Path(path).read_text())
        if "cases" not in content:
            raise SystemExit(f"{path} has no cases; give files that moe-a2a bench --device cuda --json wrote")
        for entry in content["cases"]:
            if entry["device"] == "cuda" and entry["mode"] == "graph" and entry["correct"]:
                names = ("layout", "dtype", "ranks", "hidden", "routing", *AXES)
                found[(*(entry[name] for name in names), entry.get("num_sms"))] = entry
    return list(found.values())


def largest(entries: list[Entry], layout: str, axis: str, free: tuple[str, ...]) -> dict[tuple[Any, ...], list[Entry]]:
    """The largest set of a layout's entries that differ in `axis` and what is `free` alone, as lines: entries sorted by
    `axis`, by the values of what is free. Raises TooFew if none of them has two."""
    rest = [name for name in ("ranks", "hidden", "routing", *AXES) if name not in (axis, *free)]
    sets: Any = collections.defaultdict(lambda: collections.defaultdict(list))
    for entry in sorted(entries, key=lambda e: e[axis]):
        if entry["layout"] == layout:
            sets[tuple(entry[name] for name in rest)][tuple(entry[name] for name in free)].append(entry)
    found = [{key: points for key, points in lines.items() if len(points) > 1} for lines in sets.values()]
    most = max(found, key=lambda lines: sum(map(len, lines.values())), default={})
    if not most:
        raise TooFew(f"no two correct {layout} entries in graph mode that differ in {axis} alone")
    return most


def panel(axes: Any, entries: list[Entry], axis: str) -> None:
    """Lines of both, dispatch and combine, and of the baselines' both."""
    found = largest([e for e in entries if e["dtype"] in DASHES], "masked", axis, ("dtype",))
    series = {dtype: found[dtype,] for dtype in DASHES if (dtype,) in found}
    for dtype, points in series.items():
        for part, colour in PARTS.items():
            draw(axes, points, axis, lambda e, part=part: e[f"{part}_us"], f"{part}, {dtype}", colour, dtype)
        for name, colour in BASELINES.items():
            with_it = [e for e in points if "both_us" in e["baselines"].get(name, {})]
            if with_it:
                label = f"{name}, both, {dtype}"
                draw(axes, with_it, axis, lambda e, name=name: e["baselines"][name]["both_us"], label, colour, dtype)
    finish(axes, series, axis)
    if (routing := next(iter(series.values()))[0]["routing"]) != "uniform":
        axes.set_title(f"{routing}, {axes.get_title()}", fontsize=9)


def contiguous_panel(axes: Any, entries: list[Entry], part: str) -> None:
    """Lines of one half on its slowest rank, by dtype, routing and SMs, and of the baselines'."""
    found = largest(entries, "contiguous", "tokens", ("dtype", "routing", "num_sms"))
    _, routings, shares = (list(dict.fromkeys(values)) for values in zip(*found, strict=True))
    colours = {routing: ROUTED[i % len(ROUTED)] for i, routing in enumerate(routings)}
    dashes = {sms: SHARES[i % len(SHARES)] for i, sms in enumerate(sorted(shares))}
    for (dtype, routing, sms), points in found.items():
        style = {"marker": MARKERS.get(dtype, "x"), "markersize": 4}
        x, y = [e["tokens"] for e in points], [e["worst_rank"][f"{part}_us"]["p50"] for e in points]
        label = f"{routing}, {sms} SMs, {dtype}"
        axes.plot(x, y, color=colours[routing], linestyle=dashes[sms], label=label, **style)
        for name, colour in BASELINES.items():
            with_it = [e for e in points if f"{part}_us" in e["baselines"].get(name, {})]
            x, y = [e["tokens"] for e in with_it], [e["baselines"][name][f"{part}_us"]["p50"] for e in with_it]
            if with_it:
                axes.plot(x, y, ":", color=colour, label=f"{name} (all ranks), {routing}, {dtype}", **style)
    finish(axes, found, "tokens")
    axes.set_title(f"{part}, {axes.get_title()}", fontsize=9)


def finish(axes: Any, lines: Mapping[Any, list[Entry]], axis: str) -> None:
    """Scales, ticks and a title that says what is the same in all lines."""
    chosen = [entry for points in lines.values() for entry in points]
    ticks = sorted({e[axis] for e in chosen})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    marks = [m * 10**p for p in range(6) for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10**p <= high]
    axes.set_yticks(marks, [f"{m:g}" for m in marks])
    axes.grid(alpha=0.3)
    axes.set_xlabel(AXES[axis])
    held = {"tokens": "T", "top_k": "K", "experts": "E", "hidden": "H"}
    others = ", ".join(f"{letter}={chosen[0][name]}" for name, letter in held.items() if name != axis)
    axes.set_title(f"{chosen[0]['ranks']} ranks, {others}", fontsize=9)


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
    figures: dict[str, list[Callable[[Any], None]]] = {
        "gpu_tokens": [lambda axes: panel(axes, entries, "tokens")],
        "gpu_topk_experts": [lambda axes: panel(axes, entries, "top_k"), lambda axes: panel(axes, entries, "experts")],
        "gpu_contiguous": [
            lambda axes: contiguous_panel(axes, entries, "dispatch"),
            lambda axes: contiguous_panel(axes, entries, "combine"),
        ],
    }
    missing = []
    for name, panels in figures.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(7.5 if len(panels) == 1 else 10, 4.2), squeeze=False)
        try:
            for place, draw_panel in zip(axes[0], panels, strict=True):
                draw_panel(place)
        except TooFew as error:
            missing.append(f"{name}.png was not drawn: {error}")
            plt.close(figure)
            continue
        rank = "the slowest rank" if name == "gpu_contiguous" else "all ranks"
        axes[0][0].set_ylabel(f"us, p50 of {rank}, in a graph")
        labels = {
            text: line for place in axes[0] for line, text in zip(*place.get_legend_handles_labels(), strict=True)
        }
        axes[0][-1].legend(
            labels.values(), labels.keys(), handlelength=3, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )
        save(figure, arguments.out / f"{name}.png")
    print("\n".join(missing), file=sys.stderr)
    sys.exit(1 if len(missing) == len(figures) else 0)


if __name__ == "__main__":
    main()
