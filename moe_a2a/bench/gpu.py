"""One GPU rank of a benchmark: check, then time launches, eager and from CUDA graphs; rank 0 gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_a2a.all_to_all import AllToAll
from moe_a2a.bench.baselines import Baselines, OurStep, in_words
from moe_a2a.bench.cases import Case, heading, percentiles
from moe_a2a.bench.check import check_case
from moe_a2a.bench.low_latency import expert_rows
from moe_a2a.bench.timing import Runner, measure
from moe_a2a.bootstrap import GroupBootstrap
from moe_a2a.config import Options
from moe_a2a.types import Dispatched, Masked

Result = dict[str, Any]


def run_gpu_case(case: Case, modes: Sequence[str], options: Options, baselines: Baselines) -> list[Result]:
    """Run one case on this rank. Returns an entry of the JSON for each mode, equal on all ranks."""
    gather = GroupBootstrap(None)
    device = torch.device("cuda", torch.cuda.current_device())
    with AllToAll(case.config("bench"), device=device, options=options) as a2a:
        problems = gather.all_gather(check_case(case, a2a, 0), options.timeout_s)
        runners, wrong = {}, {}
        if case.layout == "masked":
            step, runners["ours"] = _ours(case, a2a)
            for name in baselines.names:
                runner, wrong[name] = baselines.prepare(name, step)
                if runner is not None:
                    runners[name] = runner
            del step
        else:
            assert not baselines.names, "baselines have the masked layout"
            runners["ours"] = _prefill(case, a2a)
        compared = _beside(gather.all_gather(wrong, options.timeout_s), case, baselines)
        entries = []
        for mode in modes:
            # What is wrong is not timed, and on no rank: a step is collective.
            right = ["ours", *(name for name, known in compared.items() if known["problem"] is None)]
            times, failed = _measure({name: runners[name] for name in right}, mode, case.iterations)
            a2a.check()
            own = {"times": times, "failed": failed, "bytes": _bytes(case, a2a)}
            entries.append(entry(case, mode, a2a, problems, gather.all_gather(own, options.timeout_s), compared))
        dist.barrier()
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


def _ours(case: Case, a2a: AllToAll) -> tuple[OurStep, Runner]:
    mine, device = case.inputs(a2a.rank, 1), a2a.device
    x, ids, weights = mine.x.to(device), mine.topk_ids.to(device), mine.topk_weights.to(device)
    got = a2a.dispatch(x, ids, weights, fp8=case.fp8)
    y = expert_rows(got.x, got.scales, got.counts, a2a.rank, case)
    sums = a2a.combine(y, got.handle, out=torch.empty_like(x))
    out = torch.empty_like(x)

    def dispatch() -> Masked:
        return a2a.dispatch(x, ids, weights, fp8=case.fp8)

    def combine(got: Masked) -> torch.Tensor:
        return a2a.combine(got.x if case.fp8 is None else y, got.handle, out=out)

    return OurStep(case, a2a.config, a2a.rank, x, ids, weights, got, y, sums), Runner(dispatch, combine)


def _prefill(case: Case, a2a: AllToAll) -> Runner:
    """A step of the contiguous or grouped layout, with as many rows as could arrive, as nothing waits for counts."""
    mine, device, layout = case.inputs(a2a.rank, 1), a2a.device, case.layout
    x, ids, weights = mine.x.to(device), mine.topk_ids.to(device), mine.topk_weights.to(device)
    got = a2a.dispatch(x, ids, weights, layout=layout, fp8=case.fp8)
    y = torch.ones(got.x.shape, dtype=x.dtype, device=device)
    out = torch.empty_like(x)
    a2a.combine(y, got.handle, out=out)

    def dispatch() -> Dispatched:
        return a2a.dispatch(x, ids, weights, layout=layout, fp8=case.fp8)

    def combine(got: Dispatched) -> torch.Tensor:
        return a2a.combine(y, got.handle, out=out)

    return Runner(dispatch, combine)


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


def _bytes(case: Case, a2a: AllToAll) -> list[int]:
    """[what this rank stores into its peers' memory in a step, both ways; payload alone]."""
    config, ids = a2a.config, case.inputs(a2a.rank, 1).topk_ids
    owner = torch.where(ids >= 0, ids // a2a.local_experts, -1)
    rows = sum(int((owner == r).any(dim=1).sum()) for r in range(a2a.world_size) if r != a2a.rank)
    row = (config.hidden_size + 4 * config.groups if case.fp8 else config.row_bytes) + config.row_bytes
    peers = a2a.world_size - 1
    if case.layout == "masked":
        # To every peer: tables and weights of all tokens, counts, header, two flags.
        beside = peers * (ids.numel() * 8 + a2a.local_experts * 4 + 5 * 8 + 2 * 8)
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
    """The JSON entry of a case in one mode. everyone: {"times", "failed", "bytes"} of each rank; compared: what each
    baseline's entry says beside its times."""
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
