"""`moe-a2a chaos`."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moe_a2a.chaos.director import Director, repeat
from moe_a2a.chaos.events import CUTS, KINDS, draw, fits
from moe_a2a.chaos.group import Group
from moe_a2a.chaos.network import Network, why_not
from moe_a2a.chaos.rank import MAKERS
from moe_a2a.chaos.steps import Workload
from moe_a2a.chaos.tally import Tally
from moe_a2a.errors import ConfigError


def _kinds(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return KINDS
    found = tuple(part.strip() for part in value.split(",") if part.strip())
    unknown = [kind for kind in found if kind not in KINDS]
    if unknown or not found:
        raise click.BadParameter(f"{value!r}; allowed: {', '.join(KINDS)}")
    return found


@click.command()
@click.option("--ranks", type=click.IntRange(2, 64), default=8, show_default=True, help="Ranks of the group.")
@click.option("--hosts", type=click.IntRange(1), default=4, show_default=True, help="Hosts that they are on.")
@click.option("--kills", type=click.IntRange(1), default=50, show_default=True, help="Events in all.")
@click.option(
    "--make",
    "makes",
    type=click.Choice(list(MAKERS)),
    default="steps",
    show_default=True,
    help="What ranks make all the time: dispatch and combine, or collectives of a process group.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="What happens follows from it.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first event.")
@click.option(
    "--only", callback=_kinds, help=f"Kinds of events, separated by commas.  [default: all: {', '.join(KINDS)}]"
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.2),
    default=3.0,
    show_default=True,
    help="Seconds that a step waits for a rank.",
)
@click.option(
    "--namespaces",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    show_default=True,
    help="Hosts are network namespaces (root only), or are played by labels.",
)
@click.option(
    "--resume", type=click.Path(dir_okay=False, path_type=Path), help="Keep the state here, and go on from it."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def chaos(
    ranks: int,
    hosts: int,
    kills: int,
    makes: str,
    seed: int,
    first: int,
    only: tuple[str, ...],
    timeout: float,
    namespaces: str,
    resume: Path | None,
    json_path: Path | None,
) -> None:
    """Lose ranks, store, watchers and network of an elastic group at random, and check every row and every view.

    The exit code is 1 if anything hung, was wrong or was not agreed on. docs/elastic.md says what is done and checked.
    """
    if hosts > ranks:
        raise click.UsageError(f"--hosts {hosts} is more than {ranks} ranks")
    if not any(fits(kind, ranks, hosts) for kind in only):
        raise click.UsageError(f"--only {','.join(only)}: not with {ranks} ranks on {hosts} hosts")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    reason = "--namespaces no" if namespaces == "no" else why_not()
    if namespaces == "yes" and reason:
        raise click.UsageError(f"--namespaces yes: {reason}")
    if reason:
        if not set(only) - set(CUTS):
            raise click.UsageError(f"--only {','.join(only)}: {reason}")
        console.print(f"hosts are played by labels, partitions are skipped: {reason}")
    given = {"makes": makes, "seed": seed, "ranks": ranks, "hosts": hosts, "timeout_s": timeout, "first": first}
    given["kinds"] = list(only)
    try:
        tally = Tally.load(resume, given) if resume and resume.exists() else Tally(given, drawn=first)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    _run(tally, kills, reason, resume, console)
    summary = {**tally.summary(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    summary |= {"python": platform.python_version(), "namespaces": not reason, "why_no_namespaces": reason}
    _show(summary, console)
    if json_path:
        json_path.write_text(json.dumps(summary, indent=2) + "\n")
    for kind, number, _ in tally.faults:
        console.print(f"wrong ({kind}) in event {number}: {repeat(given, number)}")
    if tally.faults:
        raise SystemExit(1)


def _run(tally: Tally, kills: int, reason: str, resume: Path | None, console: Console) -> None:
    """Carry out events until there were so many."""
    given = tally.given
    ranks, hosts, kinds = given["ranks"], given["hosts"], given["kinds"]
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    network = None if reason else Network(hosts)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which lets go of everything below
    make = partial(Group, Workload(ranks, given["seed"]), given["makes"], hosts, given["timeout_s"], network)
    director = Director(make, network, tally, console.print)
    shown = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    try:
        with shown:
            task = shown.add_task("", total=kills, completed=tally.events)
            while tally.events < kills:
                started = time.monotonic()
                event = draw(given["seed"], tally.drawn, ranks, hosts, kinds)
                tally.drawn += 1
                if event.kind in CUTS and network is None:
                    tally.count(tally.skipped, event.kind)
                    console.print(f"{event.describe(given['makes'])}: skipped, {reason}")
                    continue
                shown.update(task, description=event.describe(given["makes"]))
                director.carry_out(event)
                tally.events += 1
                tally.seconds += time.monotonic() - started
                shown.advance(task)
                if resume:
                    tally.save(resume)
    finally:
        director.close()
        if network is not None:
            network.close()
    if resume:
        tally.save(resume)


def _show(summary: dict[str, object], console: Console) -> None:
    times = summary["times_ms"]
    assert isinstance(times, dict)
    table = Table("ms", "count", "p50", "p99", "max")
    for what, values in times.items():
        table.add_row(what, *(str(values[column]) for column in ("count", "p50", "p99", "max")))
    console.print(table)
    for name in ("counts", "points", "skipped", "uncalled"):
        values = summary[name]
        assert isinstance(values, dict)
        if values:
            console.print(f"{name}: {', '.join(f'{what} {count}' for what, count in values.items())}")
    faults = summary["faults"]
    assert isinstance(faults, dict)
    console.print(
        f"{summary['events']} events in {summary['seconds']} s; {summary['steps_checked']} steps with "
        f"{summary['rows_checked']} rows and sums checked; {', '.join(f'{n} {count}' for n, count in faults.items())}"
    )
