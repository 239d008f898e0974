"""`moe-a2a bench` checks before it times, and its JSON keeps its keys."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from ranks import Ctx, run_ranks

from moe_a2a.bench import check
from moe_a2a.bench.cases import Case, percentiles, rows_to, spread
from moe_a2a.bench.report import bandwidth

SMALL = ["--hidden", "256", "--experts", "8", "--top-k", "2", "--iterations", "3", "--timeout", "30"]
TIMES = {"p50", "p90", "p99"}


def run_bench(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MOE_A2A_HOST")}
    start = [sys.executable, *launcher, "-m", "moe_a2a.cli", "bench", *arguments]
    return subprocess.run(start, capture_output=True, text=True, timeout=120, env=env, check=False)


def test_two_hosts_of_two_ranks_give_json_a_table_and_a_plot(tmp_path: pathlib.Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--ranks", "4", "--hosts", "2", "--tokens", "4,16", "--dtype", "bf16,fp8", "--layout", "masked,grouped"]
    done = run_bench(*SMALL, *options, "--json", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal to the oracle") == 8
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(out.read_text())
    assert set(content) == {"command", "machine", "versions", "cases"}
    assert content["command"].startswith("moe-a2a bench")
    assert len(content["cases"]) == 8
    for case in content["cases"]:
        assert case["correct"] is True
        assert (case["ranks"], case["hosts"], case["device"], case["mode"]) == (4, 2, "cpu", "eager")
        for times in ("dispatch_us", "combine_us", "both_us", "transport_us", "network_us"):
            assert set(case[times]) == TIMES
            assert 0 < case[times]["p50"] <= case[times]["p90"] <= case[times]["p99"]
        assert set(case["baselines"]["gloo"]) == {"dispatch_us", "combine_us", "both_us", "transport_us"}
        assert set(case["baselines"]["raw_engine"]) == {"network_us"}
        assert case["min_wire_bytes"] < case["wire_bytes"]
        assert case["buffer_bytes"] > 0
        assert bandwidth(case) > 0


def test_one_host_has_no_network_and_every_routing_is_correct(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("[[0, 1], [2, 3], [7, -1]]\n[[5, 6]]\n")
    routings, out = ["zipf:1.3", "k-hot", "k-hot-packed:1", f"trace:{trace}"], tmp_path / "out.json"
    some = ["--ranks", "2", "--tokens", "8", "--layout", "contiguous", "--baseline", ""]
    done = run_bench(*SMALL, *some, "--routing", ",".join(routings), "--json", str(out))
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [case["routing"] for case in cases] == [routing.removeprefix("trace:") for routing in routings]
    for case in cases:
        assert case["network_us"] is None
        assert case["baselines"] == {}
        worst, by_rank = case["worst_rank"], case["by_rank"]
        for part in ("dispatch_us", "combine_us", "both_us"):
            assert worst[part] == {
                "p50": max(by_rank[part]), "rank": by_rank[part].index(max(by_rank[part])),
                "rows": by_rank["rows"][worst[part]["rank"]],
            }  # fmt: skip
            assert min(by_rank[part]) <= case["median_rank"][part] <= max(by_rank[part])
    assert cases[2]["by_rank"]["rows"] == [16, 0]
    assert cases[2]["by_rank"]["expert_rows"] == [32, 0]
    assert "Rows received: rank" in done.stdout
    assert "worst rank" in done.stdout


def test_lists_of_top_k_and_experts_give_a_case_for_each_pair(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.json"
    sizes = ["--experts", "8,16", "--top-k", "1,2", "--tokens", "4", "--hidden", "256", "--iterations", "2"]
    done = run_bench(*sizes, "--ranks", "2", "--baseline", "", "--timeout", "30", "--json", str(out))
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [(case["experts"], case["top_k"]) for case in cases] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert len({case["name"] for case in cases}) == 4


def test_it_takes_part_in_a_torchrun_launch(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.json"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    done = run_bench(*SMALL, "--tokens", "4", "--layout", "contiguous", "--json", str(out), launcher=launcher)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert (case["ranks"], case["hosts"], case["correct"]) == (2, 1, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "0"], "numbers above 0"),
        (["--top-k", "2,x"], "numbers above 0"),
        (["--experts", "8,4", "--top-k", "8", "--ranks", "2"], "top_k"),
        (["--dtype", "int8"], "allowed: bf16, fp16, fp32, fp8"),
        (["--experts", "10", "--ranks", "4"], "does not divide by 4 ranks"),
        (["--hidden", "200"], "not a multiple of 128"),
        (["--routing", "trace:/does/not/exist"], "trace:FILE"),
        (["--routing", "uniform,zipf:-1"], "allowed: uniform, zipf, k-hot"),
        (["--ranks", "2", "--hosts", "3"], "more than 2 ranks"),
    ],
)
def test_options_that_cannot_work_are_refused_before_ranks_start(arguments: list[str], says: str) -> None:
    done = run_bench(*arguments)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


def test_a_protocol_that_is_not_there_ends_the_run_with_the_reason() -> None:
    done = run_bench(*SMALL, "--ranks", "2", "--hosts", "2", "--tokens", "4", "--protocol", "carrier-pigeon")
    assert done.returncode != 0
    assert "carrier-pigeon" in done.stderr
    assert "tcp" in done.stderr


def _check_with(ctx: Ctx, layout: Any, fault: str) -> str | None:
    from moe_a2a import combine, unpack

    case = Case(6, 256, 2, 8, "bf16", layout, "uniform", 1, 3)
    if fault == "rows" and ctx.rank == 1:
        real = unpack.gather, unpack.gather_segments

        def shifted(place: int) -> Any:
            def move(table: torch.Tensor, index: Any, *rest: Any) -> None:
                real[place](table, index[::-1].copy(), *rest)

            return move

        unpack.gather, unpack.gather_segments = shifted(0), shifted(1)
    if fault == "sums" and ctx.rank == 1:
        real_sum = combine.sum_rows

        def doubled(table: torch.Tensor, index: Any, offsets: Any, out: torch.Tensor, *rest: Any) -> None:
            real_sum(table, index, offsets, out, *rest)
            out.mul_(1.25)

        combine.sum_rows = doubled
    with ctx.a2a(case.config("c")) as a2a:
        return check.check_case(case, a2a, 0)


@pytest.mark.parametrize("layout", ["masked", "contiguous", "grouped"])
def test_the_check_finds_wrong_rows_and_wrong_sums(layout: str) -> None:
    assert run_ranks(_check_with, 2, layout, "none") == [None, None]
    assert "differ" in (run_ranks(_check_with, 2, layout, "rows")[1] or "")
    assert "combine differs" in " ".join(filter(None, run_ranks(_check_with, 2, layout, "sums")))


def test_rows_of_a_rank_are_its_tokens_and_those_of_its_experts_their_choices() -> None:
    ids = torch.tensor([[0, 1], [1, 3], [-1, 2], [-1, -1]])
    assert rows_to(ids, 2, 2) == {"rows": [2, 2], "expert_rows": [3, 2]}


def test_the_worst_rank_is_named_part_by_part_with_the_rows_that_it_receives() -> None:
    times = [{"dispatch": [1.0, 2.0, 9.0], "combine": [8.0], "both": [5.0]}]
    times += [
        {"dispatch": [3.0], "combine": [2.0], "both": [5.5]},
        {"dispatch": [1.0], "combine": [4.0], "both": [1.0]},
    ]
    brought = [{"rows": [1, 2, 3], "expert_rows": [1, 2, 6]}, {"rows": [4, 0, 1], "expert_rows": [9, 0, 1]}]
    found = spread(times, brought)
    assert found["by_rank"] == {
        "rows": [5, 2, 4], "expert_rows": [10, 2, 7], "dispatch_us": [2.0, 3.0, 1.0], "combine_us": [8.0, 2.0, 4.0],
        "both_us": [5.0, 5.5, 1.0],
    }  # fmt: skip
    assert found["worst_rank"] == {
        "dispatch_us": {"p50": 3.0, "rank": 1, "rows": 2},
        "combine_us": {"p50": 8.0, "rank": 0, "rows": 5},
        "both_us": {"p50": 5.5, "rank": 1, "rows": 2},
    }
    assert found["median_rank"] == {
        "rows": 4, "expert_rows": 7, "dispatch_us": 2.0, "combine_us": 4.0, "both_us": 5.0
    }  # fmt: skip


def test_percentiles_are_those_of_the_samples() -> None:
    assert percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
