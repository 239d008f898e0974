"""What `moe-a2a bench-report` prints and writes: tables, CSV, JSON, a plot."""

from __future__ import annotations

import collections
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_a2a.bench_report.logs import CUT, Latency, LogError, Run

ADVICE = "docs/troubleshooting.md, 'Requests dropped at high concurrency', says why and what helps"


def order(runs: Sequence[Run]) -> list[Run]:
    """By lengths, then concurrency, with no limit last; of one case, in the order of the logs."""
    return sorted(runs, key=lambda run: (_lengths(run), run.concurrency is None, run.concurrency or 0))


def print_tables(runs: Sequence[Run], console: Console) -> None:
    """Throughput and failures, then latencies, a row a run."""
    several = len({run.file for run in runs}) > 1
    rates = _table(several, "requests", "ok", "failed", "cut", "req/s", "in tok/s", "out tok/s")
    times = _table(several, "TTFT", "TPOT", "ITL", "E2E")
    for run in runs:
        first = [str(run.concurrency or "no limit"), _lengths_text(run)]
        last = [escape(Path(run.file).name)] if several else []
        rates.add_row(
            *first,
            _count(run.requests),
            str(run.succeeded),
            _alarm(run.failed),
            _alarm(run.cut),
            *(_short(rate) for rate in (run.request_throughput, run.input_throughput, run.output_throughput)),
            *last,
        )
        times.add_row(*first, *(_percentiles(latency) for latency in (run.ttft, run.tpot, run.itl, run.e2e)), *last)
    console.print(rates)
    console.print("\nmean / median / p99 in ms, of the requests that succeeded", soft_wrap=True)
    console.print(times)
    for line in _remarks(runs):
        console.print(escape(line), soft_wrap=True)


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """A row a run; `ttft_p99_ms` and so on. What is not known is empty."""
    rows = [_flat(run) for run in runs]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, runs: Sequence[Run], problems: Sequence[LogError]) -> None:
    """{"runs": [...], "problems": [...]}: the fields of Run, and the runs that have no result. Keys are stable."""
    content = {"runs": [asdict(run) for run in runs], "problems": [str(problem) for problem in problems]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, runs: Sequence[Run]) -> None:
    """Output tokens/s, failures, TTFT and ITL over the concurrency; runs without one are left out. A line for each pair
    of lengths, and for each log if several have the same case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    (throughput, failures), (ttft, itl) = axes
    for number, (name, points) in enumerate(_lines([run for run in runs if run.concurrency is not None]).items()):
        colour = f"C{number}"
        x = [run.concurrency for run in points]
        throughput.plot(x, [run.output_throughput for run in points], "o-", color=colour, label=name)
        failures.plot(
            x,
            [math.nan if run.failed is None else run.failed for run in points],
            "o-",
            color=colour,
            label=f"{name}: failed",
        )
        failures.plot(x, [run.cut for run in points], "x--", color=colour, label=f"{name}: of these cut")
        for axis, key in ((ttft, "ttft"), (itl, "itl")):
            axis.plot(x, [getattr(run, key).median for run in points], "o-", color=colour, label=f"{name}: median")
            axis.plot(x, [getattr(run, key).p99 for run in points], "x--", color=colour, label=f"{name}: p99")
    ticks = sorted({run.concurrency for run in runs if run.concurrency is not None})
    titles = ("output tokens/s", "requests that failed", "time to first token, ms", "between tokens, ms")
    for axis, title in zip((throughput, failures, ttft, itl), titles, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("concurrent requests")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _lines(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that belong together, by what the legend says of them."""
    cases = collections.Counter((_lengths(run), run.concurrency) for run in runs)
    repeated = len({run.file for run in runs}) > 1 and max(cases.values()) > 1
    found: dict[str, list[Run]] = {}
    for run in runs:
        name = _lengths_text(run) + (f" {Path(run.file).stem}" if repeated else "")
        found.setdefault(name, []).append(run)
    return found


def _table(several: bool, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in ("concurrency", "in/out", *columns):
        table.add_column(column, justify="right", overflow="fold")
    if several:
        table.add_column("log", overflow="fold")
    return table


def _remarks(runs: Sequence[Run]) -> list[str]:
    """What the failures were, if there are any."""
    lines = []
    for run in runs:
        if run.errors:
            kinds = ", ".join(f"{number} x {kind}" for kind, number in run.errors.items())
            lines.append(f"concurrency {run.concurrency or 'no limit'}: {kinds}")
    if any(run.cut for run in runs):
        lines.append(f"{CUT}: {ADVICE}")
    if any(run.failed is None for run in runs):
        lines.append("?: the log does not say how many requests there were (keep the progress bar, which is on stderr)")
    return lines


def _flat(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in asdict(run).items():
        if key == "errors":
            row[key] = "; ".join(f"{number} x {kind}" for kind, number in value.items())
        elif isinstance(value, dict):
            row.update({f"{key}_{which}_ms": ms for which, ms in value.items()})
        else:
            row[key] = value
    return row


def _lengths(run: Run) -> tuple[int, int]:
    return run.input_length or 0, run.output_length or 0


def _lengths_text(run: Run) -> str:
    return f"{_count(run.input_length)}/{_count(run.output_length)}"


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _alarm(number: int | None) -> str:
    return f"[bold red]{number}[/]" if number else _count(number)


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 100 else f"{number:.0f}"


def _percentiles(latency: Latency) -> str:
    return " / ".join(_short(ms) for ms in (latency.mean, latency.median, latency.p99))
