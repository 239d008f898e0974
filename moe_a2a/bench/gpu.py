"""One GPU rank of a benchmark: check, then time launches, eager and from CUDA graphs; rank 0 gathers."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_a2a.all_to_all import AllToAll
from moe_a2a.bench.baselines import Baselines, OurStep, in_words
from moe_a2a.bench.cases import Case, heading, percentiles, rows_to, spread
from moe_a2a.bench.check import check_case, dispatch
from moe_a2a.bench.low_latency import expert_rows
from moe_a2a.bench.timing import Runner, measure
from moe_a2a.bootstrap import GroupBootstrap
from moe_a2a.config import Options
from moe_a2a.types import Dispatched, Masked
from moe_a2a.workload import Inputs

Result = dict[str, Any]


def run_gpu_case(case: Case, modes: Sequence[str], options: Options, baselines: Baselines) -> list[Result]:
    """Run one case on this rank. Returns an entry of the JSON for each mode, equal on all ranks."""
    gather = GroupBootstrap(None)
    device = torch.device("cuda", torch.cuda.current_device())
    clock = [time.monotonic()]
    with AllToAll(case.config("bench"), device=device, options=options) as a2a:
        clock.append(time.monotonic())
        # What a graph will hold is checked and compiled before, and nothing that is not timed.
        ways = [case.layout == "masked" and mode == "graph" for mode in modes]
        wrong_ours = next(filter(None, [check_case(case, a2a, 0, apart) for apart in dict.fromkeys(ways)]), None)
        problems = gather.all_gather(wrong_ours, options.timeout_s)
        clock.append(time.monotonic())
        runners, wrong = {}, {}
        if case.layout == "masked":
            step, runners["ours"] = _ours(case, a2a, ways[0])
            for name in baselines.names:
                runner, wrong[name] = baselines.prepare(name, step)
                if runner is not None:
                    runners[name] = runner
            del step
        else:
            assert not baselines.names, "baselines have the masked layout"
            runners["ours"] = _prefill(case, a2a)
        compared = _beside(gather.all_gather(wrong, options.timeout_s), case, baselines)
        clock.append(time.monotonic())
        entries = []
        brought = rows_to(case.inputs(a2a.rank, 1, a2a.device).topk_ids, a2a.local_experts, a2a.world_size)
        leave = sum(brought["rows"]) - brought["rows"][a2a.rank]
        for mode in modes:
            # What is wrong is not timed, and on no rank: a step is collective.
            right = ["ours", *(name for name, known in compared.items() if known["problem"] is None)]
            times, failed = _measure({name: runners[name] for name in right}, mode, case.iterations)
            a2a.check()
            own = {"times": times, "failed": failed, "bytes": _bytes(case, a2a, leave), "brought": brought}
            entries.append(entry(case, mode, a2a, problems, gather.all_gather(own, options.timeout_s), compared))
        dist.barrier()
    clock.append(time.monotonic())
    if a2a.rank == 0:  # cases take seconds, most of which are not steps: say what they are
        spent = zip(("buffers", "kernels and check", "baselines", "timing"), itertools.pairwise(clock), strict=True)
        print(f"{case.name}:", ", ".join(f"{what} {b - a:.1f} s" for what, (a, b) in spent), file=sys.stderr)
    del runners
    torch.cuda.empty_cache()  # the next case has other sizes, and baselines allocate beside torch
    return entries


def _measure(
    runners: dict[str, Runner], mode: str, iterations: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Times by name, and what went wrong with a baseline (say, that it cannot be captured)."""
    times, failed = {}, {}
    for name, runner in runners.items():
        try:
            times[name] = measure(runner, mode, iterations)
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = in_words(error)
    return times, failed


def _ours(case: Case, a2a: AllToAll, apart: bool) -> tuple[OurStep, Runner]:
    x, ids, weights = mine = _timed_inputs(case, a2a)
    got = dispatch(a2a, case, Inputs(*mine), apart)
    assert isinstance(got, Masked)
    y = expert_rows(got.x, got.scales, got.counts, a2a.rank, case)
    sums = a2a.combine(y, got.handle, out=torch.empty_like(x))
    return OurStep(case, a2a.config, a2a.rank, x, ids, weights, got, y, sums), _runner(case, a2a, mine, y)


def _prefill(case: Case, a2a: AllToAll) -> Runner:
    """A step of the contiguous or grouped layout, with as many rows as could arrive, as nothing waits for counts."""
    mine = _timed_inputs(case, a2a)
    got = dispatch(a2a, case, Inputs(*mine), False)
    y = torch.ones(got.x.shape, dtype=a2a.config.dtype, device=a2a.device)
    a2a.combine(y, got.handle)
    return _runner(case, a2a, mine, y)


def _timed_inputs(case: Case, a2a: AllToAll) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and weights on this rank's GPU."""
    mine = case.inputs(a2a.rank, 1, a2a.device)
    return mine.x, mine.topk_ids.to(a2a.device), mine.topk_weights.to(a2a.device)


def _runner(
    case: Case, a2a: AllToAll, mine: tuple[torch.Tensor, torch.Tensor, torch.Tensor], y: torch.Tensor
) -> Runner:
    """y: rows that lie ready for combine. The masked layout returns what it received, if that is no FP8."""
    out = torch.empty_like(mine[0])
    returned = case.layout == "masked" and case.fp8 is None

    def run_dispatch() -> Dispatched:
        return a2a.dispatch(*mine, layout=case.layout, fp8=case.fp8)

    def combine(got: Dispatched) -> torch.Tensor:
        return a2a.combine(got.x if returned else y, got.handle, out=out)

    return Runner(run_dispatch, combine)


def _beside(wrong: Sequence[dict[str, str | None]], case: Case, baselines: Baselines) -> dict[str, Result]:
    """A baseline's entry of the JSON before it is timed. wrong: by rank and baseline."""
    compared: dict[str, Result] = {}
    for name in baselines.names:
        found = [f"rank {rank}: {texts[name]}" for rank, texts in enumerate(wrong) if texts[name]]
        compared[name] = {"problem": found[0] if found else None}
        nbytes = baselines.buffer_bytes(name, case)
        if nbytes is not None:
            compared[name]["buffer_bytes"] = nbytes
    return compared


def _bytes(case: Case, a2a: AllToAll, rows: int) -> list[int]:
    """[what this rank stores into its peers' memory in a step, both ways; payload alone]. rows: that leave it."""
    config = a2a.config
    row = (config.hidden_size + 4 * config.groups if case.fp8 else config.row_bytes) + config.row_bytes
    peers = a2a.world_size - 1
    if case.layout == "masked":
        # To every peer: tables and weights of all tokens, counts, header, two flags.
        beside = peers * (case.tokens * case.top_k * 8 + a2a.local_experts * 4 + 5 * 8 + 2 * 8)
    else:
        # With each row: ids, weights, source. To every peer: counts for ranks and experts, header, three flags.
        beside = rows * (config.top_k * 12 + 4) + peers * ((a2a.world_size + a2a.local_experts) * 4 + 7 * 8 + 3 * 8)
    return [rows * row + beside, rows * row]


def entry(
    case: Case,
    mode: str,
    a2a: AllToAll,
    problems: Sequence[str | None],
    everyone: Sequence[Result],
    compared: dict[str, Result],
) -> Result:
    """The JSON entry of a case in one mode. everyone: {"times", "failed", "bytes", "brought"} of each rank; compared:
    what each baseline's entry says beside its times."""
    failed = {name: f"rank {r}: {text}" for r, rank in enumerate(everyone) for name, text in rank["failed"].items()}

    def of(name: str) -> Result:
        """Percentiles over the samples of all ranks; nothing for what was not timed."""
        return {
            f"{what}_us": percentiles(np.concatenate([rank["times"][name][what] for rank in everyone]).tolist())
            for what in everyone[0]["times"].get(name, ())
            if name not in failed
        }

    return {
        **heading(case, a2a, "cuda", mode, problems),
        "name": f"{case.name} {mode}",
        **of("ours"),
        **spread([rank["times"]["ours"] for rank in everyone], [rank["brought"] for rank in everyone]),
        "transport_us": None,
        "network_us": None,
        "wire_bytes": sum(rank["bytes"][0] for rank in everyone),
        "min_wire_bytes": sum(rank["bytes"][1] for rank in everyone),
        "buffer_bytes": a2a.buffer_bytes,
        "baselines": {
            name: {**known, "problem": failed.get(name, known["problem"]), **of(name)}
            for name, known in compared.items()
        },
    }
