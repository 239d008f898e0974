"""Run functions in processes of their own: progress bars, their results, and no process left behind if one fails."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# Imported once, by the server that the processes are forked from (before it has threads of its own): transformers takes
# seconds, and there are more processes than cores.
PRELOAD = ["transformers.models.deepseek_v3.modeling_deepseek_v3", "moe_a2a"]


class ChildFailed(Exception):
    """A process ended without a result, or took too long; the message names it."""


@dataclass(frozen=True)
class Job:
    """target(*arguments, pipe) sends ("step", None) `steps` times, and ("result", its result) at the end."""

    name: str
    steps: int
    target: Callable[..., None]
    arguments: tuple[Any, ...]


def run_all(jobs: Sequence[Job], timeout_s: float, console: Console) -> dict[str, Any]:
    """Run all jobs at once; returns their results by name. When one fails, ends the rest and raises ChildFailed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    running: dict[Connection, tuple[Job, Any]] = {}
    columns = (TextColumn("  {task.description:<16}"), BarColumn(), MofNCompleteColumn(), TextColumn("forward passes"))
    with Progress(*columns, console=console) as progress:
        try:
            for job in jobs:
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(job, theirs), name=job.name, daemon=True)
                process.start()
                theirs.close()  # so that the process's end is the end of the pipe
                running[ours] = (job, process)
            return _collect(running, time.monotonic() + timeout_s, timeout_s, progress)
        finally:
            for _, process in running.values():
                process.kill()
                process.join()


def _collect(
    running: dict[Connection, tuple[Job, Any]], deadline: float, timeout_s: float, progress: Progress
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    bars = {job.name: progress.add_task(job.name, total=job.steps) for job, _ in running.values()}
    pipes = set(running)
    while pipes:
        ready = wait(pipes, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(running[pipe][0].name for pipe in pipes)
            raise ChildFailed(f"not finished after {timeout_s:.0f} s: {late}")
        for pipe in ready:
            job, process = running[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                process.join()
                if job.name not in results:
                    raise ChildFailed(f"{job.name} died with exit code {process.exitcode}") from None
                pipes.remove(pipe)
                continue
            if kind == "step":
                progress.advance(bars[job.name])
            elif kind == "result":
                results[job.name] = value
            else:
                raise ChildFailed(f"{job.name} failed:\n{value}")
    return results


def _child(job: Job, pipe: Connection) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    torch.set_num_threads(1)
    try:
        job.target(*job.arguments, pipe)
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        sys.exit(1)
