"""What a benchmark prints and writes: a table, JSON, a plot."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import moe_a2a
from moe_a2a.transport.engine import installed_version

Result = dict[str, Any]


def machine() -> Result:
    """What the figures were measured on."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.system(),
        "kernel": platform.release(),
        "threads_per_rank": torch.get_num_threads(),
    }


def versions() -> Result:
    """Versions of what takes part."""
    engine = installed_version()
    found = {"moe_a2a": moe_a2a.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found["numpy"] = version("numpy")
    found["engine"] = f"{engine[0]} {engine[1]}" if engine else "none"
    return found


def _time(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    return f"{_us(percentiles['p50'])} / {_us(percentiles['p99'])}"


def _us(value: float) -> str:
    return f"{value / 1000:.2f}" if value < 100_000 else f"{value / 1000:.0f}"


def bandwidth(case: Result) -> float | None:
    """GB/s between hosts while the network was busy; None inside one host."""
    network = case["network_us"]
    return None if network is None else case["wire_bytes"] / network["p50"] / 1e3


def print_table(cases: list[Result], console: Console) -> None:
    """p50 / p99 in ms, ours beside the baselines."""
    table = Table(title="p50 / p99 of the slowest rank, ms", title_justify="left")
    for column in (
        "case",
        "ranks",
        "by",
        "dispatch",
        "combine",
        "both",
        "rows only",
        "network",
        "wire MB",
        "GB/s",
        "correct",
    ):
        table.add_column(column, justify="left" if column in ("case", "by") else "right", no_wrap=True)
    for case in cases:
        rate = bandwidth(case)
        table.add_row(
            case["name"],
            f"{case['ranks']} on {case['hosts']}",
            "moe-a2a",
            *(_time(case[f"{what}_us"]) for what in ("dispatch", "combine", "both", "transport", "network")),
            f"{case['wire_bytes'] / 1e6:.1f}",
            "-" if rate is None else f"{rate:.2f}",
            "yes" if case["correct"] else "[bold red]NO[/]",
        )
        for name, base in case["baselines"].items():
            whats = ("dispatch", "combine", "both", "transport", "network")
            table.add_row("", "", name, *(_time(base.get(f"{what}_us")) for what in whats), "", "", "")
        table.add_section()
    console.print(table)
    for case in cases:
        for problem in case["problems"]:
            console.print(f"[bold red]{case['name']}: {problem}[/]")


def write_json(path: str, command: str, cases: list[Result]) -> None:
    """The whole run. Keys are stable."""
    content = {"command": command, "machine": machine(), "versions": versions(), "cases": cases}
    pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_plot(path: str, cases: list[Result]) -> None:
    """Bars of dispatch and combine, ours beside each baseline that has both (PNG or whatever the suffix says)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {"moe-a2a": cases}
    for name in dict.fromkeys(n for case in cases for n, base in case["baselines"].items() if "dispatch_us" in base):
        series[name] = [{**case, **case["baselines"][name]} for case in cases]
    figure, axes = plt.subplots(1, len(cases), figsize=(2.2 + 2.4 * len(cases), 4), squeeze=False)
    for axis, (place, case) in zip(axes[0], enumerate(cases), strict=True):
        for x, entries in enumerate(series.values()):
            entry = entries[place]
            dispatch, combine = entry["dispatch_us"]["p50"] / 1e3, entry["combine_us"]["p50"] / 1e3
            axis.bar(x, dispatch, color="#2b6cb0", label="dispatch" if x == 0 else None)
            axis.bar(x, combine, bottom=dispatch, color="#90cdf4", label="combine" if x == 0 else None)
        axis.set_xticks(range(len(series)), list(series))
        axis.set_title(f"{case['name']}\n{case['ranks']} ranks, {case['hosts']} host(s)", fontsize=9)
    axes[0][0].set_ylabel("ms, p50 of the slowest rank")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
