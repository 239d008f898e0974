"""What a benchmark prints and writes: a table, JSON, a plot."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import moe_a2a
from moe_a2a.bench.cases import PARTS
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
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> Result:
    """Versions of what takes part."""
    found = {"moe_a2a": moe_a2a.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found["numpy"] = version("numpy")
    found["engine"] = ", ".join(f"{name} {number}" for name, number in installed_versions().items()) or "none"
    for name, wheel in (("triton", "triton"), ("deep_ep", "sgl-deep-ep"), ("deep_ep", "deep-ep")):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(wheel)
    return found


#: Of dispatch and combine in plots.
COLOURS = ("#2b6cb0", "#90cdf4")
_COLUMNS = ("dispatch", "combine", "both", "transport", "network")


def _time(percentiles: dict[str, float] | None, device: str) -> str:
    """p50 / p90 / p99: in ms, three digits each, or in us for GPU ranks."""
    if percentiles is None:
        return "-"
    return " / ".join(_number(percentiles[p], device) for p in ("p50", "p90", "p99"))


def _number(us: float, device: str) -> str:
    return _ms(us) if device == "cpu" else str(us)


def _ms(us: float) -> str:
    ms = us / 1000
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def bandwidth(case: Result) -> float | None:
    """GB/s between hosts while the network was busy; None inside one host."""
    network = case["network_us"]
    return None if network is None else float(case["wire_bytes"] / network["p50"] / 1e3)


def print_table(cases: list[Result], console: Console) -> None:
    """A block for each case: ours beside the baselines, times in ms."""
    if cases and cases[0]["device"] == "cpu":
        console.print("Times are p50 / p90 / p99 of the slowest rank in ms.", soft_wrap=True)
    else:
        console.print("Times are p50 / p90 / p99 of all ranks in us.", soft_wrap=True)
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
        table.add_row("moe-a2a", *(_time(case[f"{what}_us"], case["device"]) for what in _COLUMNS))
        if case["ranks"] > 1:
            median, worst = case["median_rank"], {part: case["worst_rank"][f"{part}_us"] for part in PARTS}
            table.add_row("median rank", *(_number(median[f"{part}_us"], case["device"]) for part in PARTS))
            table.add_row(
                "worst rank", *(f"{_number(at['p50'], case['device'])} (rank {at['rank']})" for at in worst.values())
            )
        for name, base in case["baselines"].items():
            table.add_row(name, *(_time(base.get(f"{what}_us"), case["device"]) for what in _COLUMNS))
        console.print(table)
        if case["ranks"] > 1:
            named = {at["rank"]: at["rows"] for at in worst.values()}
            each = ", ".join(f"rank {rank} {rows}" for rank, rows in sorted(named.items()))
            console.print(f"Rows received: {each}, median of ranks {median['rows']:g}", soft_wrap=True)
        for problem in case["problems"]:
            console.print(f"[bold red]{problem}[/]", soft_wrap=True)
        for name, base in case["baselines"].items():
            if base.get("problem"):
                console.print(f"[yellow]{name} was not timed: {escape(base['problem'])}[/]", soft_wrap=True)


def write_json(path: str, command: str, cases: list[Result]) -> None:
    """The whole run. Keys are stable."""
    content = {"command": command, "machine": machine(), "versions": versions(), "cases": cases}
    pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_plot(path: str, cases: list[Result]) -> None:
    """Bars of dispatch and combine, ours beside each baseline that has both (PNG or whatever the suffix says). Times
    are in ms, of GPU ranks in us."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = dict.fromkeys(n for case in cases for n, base in case["baselines"].items() if "dispatch_us" in base)
    gpu = bool(cases) and cases[0]["device"] == "cuda"
    scale = 1.0 if gpu else 1e3
    figure, axes = plt.subplots(1, len(cases), figsize=(2.2 + 2.4 * len(cases), 4), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        entries = {"moe-a2a": case, **{name: case["baselines"].get(name, {}) for name in names}}
        for x, entry in enumerate(entries.values()):
            if "dispatch_us" not in entry:
                continue
            dispatch, combine = entry["dispatch_us"]["p50"] / scale, entry["combine_us"]["p50"] / scale
            axis.bar(x, dispatch, color=COLOURS[0], label="dispatch" if x == 0 else None)
            axis.bar(x, combine, bottom=dispatch, color=COLOURS[1], label="combine" if x == 0 else None)
        axis.set_xticks(range(len(entries)), list(entries))
        axis.set_title(f"{case['name']}\n{case['ranks']} ranks, {case['hosts']} host(s)", fontsize=9)
    axes[0][0].set_ylabel("us, p50 of all ranks" if gpu else "ms, p50 of the slowest rank")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
