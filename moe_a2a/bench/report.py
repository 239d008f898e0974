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
from moe_a2a.transport.engine import installed_versions

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
    found = {"moe_a2a": moe_a2a.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found["numpy"] = version("numpy")
    found["engine"] = ", ".join(f"{name} {number}" for name, number in installed_versions().items()) or "none"
    return found


_COLUMNS = ("dispatch", "combine", "both", "transport", "network")


def _time(percentiles: dict[str, float] | None) -> str:
    """p50 / p90 / p99 in ms, three digits each."""
    if percentiles is None:
        return "-"
    return " / ".join(_ms(percentiles[p]) for p in ("p50", "p90", "p99"))


def _ms(us: float) -> str:
    ms = us / 1000
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def bandwidth(case: Result) -> float | None:
    """GB/s between hosts while the network was busy; None inside one host."""
    network = case["network_us"]
    return None if network is None else float(case["wire_bytes"] / network["p50"] / 1e3)


def print_table(cases: list[Result], console: Console) -> None:
    """A block for each case: ours beside the baselines, times in ms."""
    console.print("Times are p50 / p90 / p99 of the slowest rank in ms.", soft_wrap=True)
    for case in cases:
        ratio = case["wire_bytes"] / max(1, case["min_wire_bytes"])
        rate = bandwidth(case)
        title = (
            f"\n[bold]{case['name']}[/]: {case['ranks']} ranks on {case['hosts']} host{'s' * (case['hosts'] > 1)}, "
            f"{case['wire_bytes'] / 1e6:.1f} MB moved ({ratio:.3f} x the least)"
            + ("" if rate is None else f", {rate:.2f} GB/s between hosts")
            + f", buffers {case['buffer_bytes'] / 1e6:.0f} MB a rank, "
            + ("[green]equal to the oracle[/]" if case["correct"] else "[bold red]WRONG[/]")
        )
        console.print(title, soft_wrap=True)
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        table.add_column("")
        for column in _COLUMNS:
            table.add_column(column, justify="right", overflow="fold")
        table.add_row("moe-a2a", *(_time(case[f"{what}_us"]) for what in _COLUMNS))
        for name, base in case["baselines"].items():
            table.add_row(name, *(_time(base.get(f"{what}_us")) for what in _COLUMNS))
        console.print(table)
        for problem in case["problems"]:
            console.print(f"[bold red]{problem}[/]", soft_wrap=True)


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
