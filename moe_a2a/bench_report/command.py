"""`moe-a2a bench-report`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from moe_a2a.bench_report import report
from moe_a2a.bench_report.logs import LogError, Run, read


def _named(suffix: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """Lets a file pass that is named as what is written: a forgotten name would make the first log the table's file."""

    def check(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() != suffix:
            raise click.BadParameter(f"{path} is written over; give a name that ends in {suffix}", ctx, parameter)
        return path

    return check


_OUT = click.Path(path_type=Path, dir_okay=False)


@click.command("bench-report")
@click.argument("logs", nargs=-1, required=True, metavar="LOG...", type=click.Path(path_type=Path))
@click.option("--csv", "csv_path", type=_OUT, callback=_named(".csv"), help="Write a row for each run.")
@click.option("--json", "json_path", type=_OUT, callback=_named(".json"), help="Write all that was read.")
@click.option("--plot", "plot_path", type=_OUT, callback=_named(".png"), help="Draw it over the concurrency.")
def bench_report(logs: tuple[Path, ...], csv_path: Path | None, json_path: Path | None, plot_path: Path | None) -> None:
    """Tabulate logs of SGLang's serving benchmark at several concurrencies.

    Throughput, TTFT, TPOT, ITL and end-to-end latency, and the requests that failed, with those apart whose stream was
    cut. A log may hold several runs, one after the other; a concurrency that the client was not told is taken from the
    file's name, benchmark_..._64.log. The exit code is 1 if a log, or a run in it, has no result; the others are shown.
    """
    runs: list[Run] = []
    problems: list[LogError] = []
    for log in dict.fromkeys(logs):
        found, without = read(log)
        runs += found
        problems += without
    runs = report.order(runs)
    if runs:
        # Into a file or a pipe, a row is a line.
        report.print_tables(runs, Console(width=None if sys.stdout.isatty() else 200))
    try:
        if csv_path and runs:
            report.write_csv(csv_path, runs)
        if json_path:
            report.write_json(json_path, runs, problems)
        if plot_path and runs:
            _plot(plot_path, runs)
    except OSError as error:
        raise click.ClickException(f"{error.filename} cannot be written: {error.strerror}") from error
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    if problems:
        raise SystemExit(1)


def _plot(path: Path, runs: list[Run]) -> None:
    if all(run.concurrency is None for run in runs):
        raise click.ClickException(
            "--plot draws over the concurrency, and no run has one: give the client --max-concurrency N, "
            "or name the logs benchmark_..._N.log"
        )
    try:
        report.write_plot(path, runs)
    except ImportError as error:
        raise click.ClickException(f"--plot needs matplotlib ({error}): pip install 'moe-a2a[plot]'") from error
