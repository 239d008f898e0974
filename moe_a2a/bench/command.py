"""`moe-a2a bench`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_a2a.bench.baselines import GPU_BASELINES, Baselines, why_absent
from moe_a2a.bench.cases import DTYPES, EXPERTS, TOP_K, Case
from moe_a2a.bench.gpu import run_gpu_case
from moe_a2a.bench.launch import run_ranks
from moe_a2a.bench.report import print_table, write_json, write_plot
from moe_a2a.bench.timing import MODES
from moe_a2a.bench.worker import Result, run_case
from moe_a2a.config import DEFAULT_SMS, Options
from moe_a2a.errors import MoeA2AError
from moe_a2a.types import LAYOUTS
from moe_a2a.workload import ROUTINGS, Skew

#: Baselines by device.
_BASELINES = {"cpu": ("gloo",), "cuda": GPU_BASELINES}


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r}; give numbers above 0, such as 8,128,1024")
    return numbers


def _routings(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Kinds of routing, and paths of traces."""
    found = []
    for text in value.split(","):
        path = text.removeprefix("trace:")
        if path == text:
            try:
                Skew.parse(text)
            except ValueError as error:
                raise click.BadParameter(f"{error}; or trace:FILE with a file that exists") from error
        elif not pathlib.Path(path).is_file():
            raise click.BadParameter(f"{text!r}: trace:FILE needs a file that exists")
        elif os.sep not in path:  # a path in any case, also of a file that is called as a kind is
            path = os.path.join(".", path)
        found.append(path)
    return found


def _names(allowed: Sequence[str]) -> click.ParamType[list[str]]:
    class Names(click.ParamType[list[str]]):
        name = ",".join(allowed)

        def convert(
            self, value: str | list[str], parameter: click.Parameter | None, context: click.Context | None
        ) -> list[str]:
            if isinstance(value, list):
                return value
            names = [part for part in value.split(",") if part]
            unknown = [name for name in names if name not in allowed]
            if unknown:
                self.fail(f"{unknown[0]!r}; allowed: {', '.join(allowed)}", parameter, context)
            return names

    return Names()


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where ranks run.")
@click.option(
    "--ranks",
    type=click.IntRange(1),
    help="Ranks to start here; torchrun's count if run under it.  [default: 4; with --device cuda, one for each GPU]",
)
@click.option(
    "--hosts",
    type=click.IntRange(1),
    help="Play this many hosts: ranks of different ones talk through the Transfer Engine.  [default: as it is]",
)
@click.option(
    "--tokens", default="8,128,1024", show_default=True, callback=_numbers, help="Tokens per rank, one case each."
)
@click.option("--hidden", type=int, default=7168, show_default=True, help="Hidden size.")
@click.option(
    "--experts", default=str(EXPERTS), show_default=True, callback=_numbers, help="Routed experts of the group."
)
@click.option("--top-k", default=str(TOP_K), show_default=True, callback=_numbers, help="Experts per token.")
@click.option(
    "--dtype",
    type=_names(list(DTYPES)),
    default="bf16",
    show_default=True,
    help="Payload; fp8 dispatches FP8 and combines bf16.",
)
@click.option(
    "--mode",
    type=_names(MODES),
    help="How GPU ranks launch: eager, or replays of a captured graph.  [default: graph,eager]",
)
@click.option("--layout", type=_names(LAYOUTS), default="masked", show_default=True, help="Layout of received rows.")
@click.option(
    "--routing",
    default="uniform",
    show_default=True,
    callback=_routings,
    help=f"{', '.join(ROUTINGS)}, or trace:FILE (see docs/bench.md).",
)
@click.option(
    "--iterations", type=click.IntRange(1), help="Timed iterations of each case.  [default: 50, 20 above 256 tokens]"
)
@click.option(
    "--baseline",
    type=_names([name for names in _BASELINES.values() for name in names]),
    help="Peers in the same run; '' for none.  [default: gloo; with --device cuda, nccl, and deep_ep and mooncake "
    "where they are installed]",
)
@click.option(
    "--num-sms",
    callback=_numbers,
    help=f"SMs of a GPU that contiguous and grouped steps use, with --device cuda.  [default: {DEFAULT_SMS}]",
)
@click.option("--protocol", default="tcp", show_default=True, help="Transfer Engine protocol between hosts.")
@click.option("--device-filter", default="", help="RDMA devices of the engine.")
@click.option(
    "--metadata-server",
    default="P2PHANDSHAKE",
    show_default=True,
    help="Where engines find each other: P2PHANDSHAKE, http://..., etcd://..., redis://...",
)
@click.option(
    "--timeout", type=float, default=60.0, show_default=True, help="Seconds before a missing rank ends the run."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of inputs and routing.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, writable=True), help="Write all figures to this file."
)
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, writable=True), help="Write a bar chart (PNG).")
def bench(
    device: str,
    ranks: int | None,
    hosts: int | None,
    tokens: list[int],
    hidden: int,
    experts: list[int],
    top_k: list[int],
    dtype: list[str],
    mode: list[str] | None,
    layout: list[str],
    routing: list[str],
    iterations: int | None,
    baseline: list[str] | None,
    num_sms: list[int] | None,
    protocol: str,
    device_filter: str,
    metadata_server: str,
    timeout: float,
    seed: int,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Correctness, then latency and bandwidth, of dispatch and combine.

    Starts the ranks itself, or takes part in a torchrun launch. Every case is checked against the oracle before it is
    timed.
    """
    if ranks is None:
        ranks = _gpus() if device == "cuda" else 4
    world = int(os.environ.get("WORLD_SIZE", ranks))
    _check_device(device, world, mode, layout, hosts, baseline)
    chosen = _choose(device, baseline)
    sms = {name: num_sms or [DEFAULT_SMS] if device == "cuda" and name != "masked" else [None] for name in layout}
    cases = [
        Case(t, hidden, k, e, d, layout_name, kind, iterations or (50 if t <= 256 else 20), seed, limit)  # type: ignore[arg-type]
        for layout_name in layout
        for d in dtype
        for e in experts
        for k in top_k
        for kind in routing
        for t in tokens
        for limit in sms[layout_name]
    ]
    try:
        for case in cases:
            case.config("bench").local_experts(world)
            if case.has_trace:
                case.inputs(0, 0)
            Options(num_sms=case.num_sms)
        if hosts is not None and hosts > world:
            raise click.UsageError(f"--hosts {hosts} is more than {world} ranks")
        options = Options(
            timeout_s=timeout,
            protocol=protocol,
            device_filter=device_filter,
            metadata_server=metadata_server,
        )
    except (MoeA2AError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if "RANK" not in os.environ:
        sys.exit(run_ranks(sys.argv[1:], ranks))
    if device == "cuda":
        results = _run_gpus(cases, mode or list(MODES), options, tuple(chosen))
    else:
        results = _run(cases, hosts, options, tuple(chosen))
    if dist.get_rank() == 0:
        print_table(results, Console() if sys.stdout.isatty() else Console(width=120))
        if json_path:
            write_json(json_path, shlex.join(["moe-a2a", *sys.argv[1:]]), results)
        if plot_path:
            write_plot(plot_path, results)
    dist.destroy_process_group()
    sys.exit(0 if all(result["correct"] for result in results) else 1)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_device(
    device: str, world: int, mode: list[str] | None, layout: list[str], hosts: int | None, baselines: list[str] | None
) -> None:
    """Refuse options that do not go together. baselines: as asked for."""
    for name in baselines or ():
        if name not in _BASELINES[device]:
            raise click.UsageError(f"--baseline {name} goes with another --device than {device}")
    if device == "cpu":
        if mode is not None:
            raise click.UsageError("--mode is for --device cuda; CPU ranks have one way to run")
        return
    if not _gpus():
        raise click.UsageError("--device cuda, but torch sees no GPU (`moe-a2a doctor` says why)")
    if baselines and layout != ["masked"]:
        raise click.UsageError(f"--baseline {baselines[0]} has the masked layout only; --layout is {','.join(layout)}")
    if hosts not in (None, 1):
        raise click.UsageError(f"--hosts {hosts}: GPU ranks are on one host")
    if baselines != [] and "masked" in layout and world > _gpus():
        raise click.UsageError(
            f"--baseline {baselines[0] if baselines else 'nccl'} needs a GPU for each of {world} ranks, here are "
            f"{_gpus()}; give ''"
        )


def _choose(device: str, asked: list[str] | None) -> list[str]:
    """The baselines of a run. Asked for by name, a package that is missing is an error; by default it is left out."""
    if asked is None:
        return [name for name in _BASELINES[device] if why_absent(name) is None]
    for name in asked:
        why = why_absent(name)
        if why is not None:
            raise click.UsageError(f"--baseline {name}: {why}")
    return asked


def _run_gpus(cases: list[Case], modes: list[str], options: Options, baselines: tuple[str, ...]) -> list[Result]:
    dist.init_process_group("gloo")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device())
    beside = Baselines(baselines, [case for case in cases if case.layout == "masked"], device)
    alone = Baselines((), (), device)
    results = []
    for case in cases:
        its = dataclasses.replace(options, fp8_only=case.fp8 is not None, num_sms=case.num_sms)
        results += run_gpu_case(case, modes, its, beside if case.layout == "masked" else alone)
    beside.close()
    return results


def _run(cases: list[Case], hosts: int | None, options: Options, baselines: tuple[str, ...]) -> list[Result]:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if hosts is not None:
        options = dataclasses.replace(options, host=f"host-{rank * hosts // world}")
    console = Console(stderr=True, quiet=rank != 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console, transient=True, disable=rank != 0) as progress:
        for case in cases:
            task = progress.add_task(case.name, total=case.iterations)
            results.append(run_case(case, options, baselines, lambda task=task: progress.advance(task)))  # type: ignore[misc]
    return results
