"""`moe-a2a bench-report` on logs of SGLang's own benchmark client.

The logs in bench_logs/ are what the client of 0.5.17, 0.5.20 and 0.5.23 wrote, stdout and stderr together, against
serving_stand_in.py (only names of folders were shortened). tests/sglang/test_serving_client.py runs the client itself.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moe_a2a.bench_report.logs import CUT, UNPRINTED, Latency, Run, read
from moe_a2a.bench_report.report import _lines
from moe_a2a.cli import main

LOGS = Path(__file__).with_name("bench_logs")
SWEEP = LOGS / "benchmark_71_xP1_yD1_stand-in_CONCURRENCY.log"
CUTS = LOGS / "release-0.5.17.log"


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench-report", *map(str, arguments)])


def only(path: Path) -> Run:
    runs, problems = read(path)
    assert not problems
    (run,) = runs
    return run


def problem(path: Path) -> str:
    runs, problems = read(path)
    assert not runs
    (error,) = problems
    assert str(path) in str(error)
    return str(error)


def test_a_run_is_read_as_its_table_says() -> None:
    run = only(CUTS)
    text = CUTS.read_text()
    for value, row in (
        (run.request_throughput, "Request throughput (req/s)"),
        (run.input_throughput, "Input token throughput (tok/s)"),
        (run.output_throughput, "Output token throughput (tok/s)"),
        (run.total_throughput, "Total token throughput (tok/s)"),
        (run.ttft.mean, "Mean TTFT (ms)"),
        (run.tpot.median, "Median TPOT (ms)"),
        (run.itl.p99, "P99 ITL (ms)"),
        (run.e2e.p99, "P99 E2E Latency (ms)"),
    ):
        printed = re.search(rf"^{re.escape(row)}: +(\S+)", text, re.MULTILINE)
        assert printed is not None and float(printed[1]) == value, row
    assert (run.concurrency, run.input_length, run.output_length) == (8, 16, 8)
    assert (run.input_tokens, run.output_tokens) == (25 * 16, 25 * 8)


def test_streams_that_were_cut_are_counted_apart_from_other_failures() -> None:
    # The stand-in cut 4 streams and answered 503 to 3 requests; the client prints the first kind only.
    run = only(CUTS)
    assert (run.requests, run.succeeded, run.failed, run.cut) == (32, 25, 7, 4)
    assert run.errors == {CUT: 4, UNPRINTED: 3}


def test_the_client_written_in_rust_counts_its_failures_itself() -> None:
    run = only(LOGS / "rust-client-0.5.23.log")
    assert (run.requests, run.succeeded, run.failed, run.cut) == (32, 27, 5, 3)
    assert sum(run.errors.values()) == 5 and any("Service Unavailable" in kind for kind in run.errors)


def test_a_sweep_in_one_file_is_a_run_for_each_concurrency() -> None:
    runs, problems = read(SWEEP)
    assert not problems
    assert [(run.concurrency, run.requests, run.failed) for run in runs] == [(1, 2, 0), (4, 8, 0), (16, 32, 0)]
    assert len({run.line for run in runs}) == 3


def test_a_concurrency_that_the_client_was_not_told_is_in_the_name_of_the_file(tmp_path: Path) -> None:
    log = LOGS / "without-a-limit_32.log"
    assert only(log).concurrency == 32
    assert only(Path(shutil.copy(log, tmp_path / "whatever.log"))).concurrency is None
    # What the client was told wins over a name.
    assert only(Path(shutil.copy(CUTS, tmp_path / "benchmark_x_512.log"))).concurrency == 8


def test_errors_of_the_warm_up_are_no_failures_of_the_run(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    text = CUTS.read_text()
    error = next(line for line in text.replace("\r", "\n").split("\n") if "output.error=" in line)
    error = error[error.index("output.error=") :]
    log.write_text(text.replace("Warmup completed", error + "\nWarmup completed"))
    assert only(log).cut == 4


def test_without_a_progress_bar_requests_come_from_the_arguments_where_these_say_it(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    text = re.sub(r"\d+/\d+ \[", "", CUTS.read_text())
    log.write_text(text)
    assert (only(log).requests, only(log).failed) == (32, 7)
    # Of this dataset, --num-prompts is the most that there can be.
    log.write_text(text.replace("dataset_name='random-ids'", "dataset_name='sharegpt'"))
    run = only(log)
    assert (run.requests, run.failed, run.cut) == (None, None, 4)
    assert "?" in report(log).output


def test_a_table_without_the_lines_before_it_is_a_run(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(CUTS.read_text()[CUTS.read_text().index("====") :])
    run = only(log)
    assert (run.concurrency, run.succeeded, run.requests) == (8, 25, None)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_way_to_be_cut_off_is_an_error_that_says_where(newline: str, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    text = CUTS.read_text()
    start, end = text.index("benchmark_args="), text.rindex("=" * 50)
    for cut in range(start + 40, end, 97):
        log.write_text(text[:cut], newline=newline)
        assert re.search(r"concurrency|has no table|is cut off", problem(log)), cut
    log.write_text(text[:end], newline=newline)
    assert "its last line, of 50 '=', is missing" in problem(log)


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "it is empty"),
        (" \n\n", "it is empty"),
        ("INFO: Started server process [1]\n", "its first line is 'INFO: Started server process [1]'"),
        ("\x00\x01\xff" * 100, "its first line is"),
    ],
)
def test_what_is_no_log_of_the_client_is_refused(content: str, says: str, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_bytes(content.encode("latin-1"))
    assert says in problem(log) and "a log of SGLang's serving benchmark has a line benchmark_args=" in problem(log)


def test_a_folder_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "Is a directory" in problem(tmp_path)
    assert "No such file" in problem(tmp_path / "none.log")


def test_a_run_without_one_success_says_so() -> None:
    assert "all requests failed" in problem(LOGS / "all-requests-failed.log")
    said = problem(LOGS / "warm-up-failed.log")
    assert "it stopped in its warm-up" in said and "TransferEncodingError" in said


def test_a_row_that_is_no_number_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(re.sub(r"(Mean TTFT \(ms\): +)\S+", r"\1nan", CUTS.read_text()))
    assert "'Mean TTFT (ms):' should be a number, not 'nan'" in problem(log)
    log.write_text(re.sub(r"Mean TTFT \(ms\): +\S+ *\n", "", CUTS.read_text()))
    assert "lacks 'Mean TTFT (ms):'" in problem(log)


def test_the_table_has_a_row_for_each_run_and_points_at_the_advice() -> None:
    result = report(CUTS, SWEEP)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if " 16/8 " in line]
    assert [row[0] for row in rows] == ["1", "4", "8", "16"] * 2
    assert rows[2][2:6] == ["32", "25", "7", "4"]
    assert "docs/troubleshooting.md, 'Requests dropped at high concurrency'" in result.output
    assert "docs/troubleshooting.md" not in report(SWEEP).output


def test_the_advice_is_where_the_report_says() -> None:
    page = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
    assert "\n## Requests dropped at high concurrency\n" in page.read_text()


def test_csv_and_json_hold_every_run(tmp_path: Path) -> None:
    result = report(SWEEP, CUTS, "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["concurrency"] for row in rows] == ["1", "4", "8", "16"]
    run = only(CUTS)
    assert float(rows[2]["ttft_p99_ms"]) == run.ttft.p99 and rows[2]["cut"] == "4"
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["problems"] == []
    assert Latency(**content["runs"][2]["itl"]) == run.itl and content["runs"][2]["errors"][CUT] == 4


def test_a_run_without_a_result_does_not_hide_the_others(tmp_path: Path) -> None:
    failed = LOGS / "all-requests-failed.log"
    result = report(SWEEP, failed, "--json", tmp_path / "a.json")
    assert result.exit_code == 1 and "Error: " + str(failed) in result.output
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["runs"]) == 3 and len(content["problems"]) == 1


def test_the_plot_is_a_picture_and_needs_concurrencies(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    assert report(SWEEP, CUTS, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    log = shutil.copy(LOGS / "without-a-limit_32.log", tmp_path / "a.log")
    result = report(log, "--plot", tmp_path / "b.png")
    assert result.exit_code == 1 and "--max-concurrency N" in result.output


@pytest.mark.parametrize("option", ["--csv", "--json", "--plot"])
def test_a_forgotten_name_does_not_write_over_a_log(option: str, tmp_path: Path) -> None:
    log = Path(shutil.copy(CUTS, tmp_path / "a.log"))
    result = report(option, log, SWEEP)
    assert result.exit_code == 2 and f"'{option}'" in result.output and "a.log is written over" in result.output
    assert log.read_bytes() == CUTS.read_bytes()


def test_logs_with_the_same_case_are_lines_of_their_own(tmp_path: Path) -> None:
    sweep, once = read(SWEEP)[0], [only(CUTS)]
    assert {name: len(line) for name, line in _lines([*sweep, *once]).items()} == {"16/8": 4}
    again = [only(LOGS / "release-0.5.23.log")]  # at 16, as a run of the sweep
    assert {name: len(line) for name, line in _lines([*sweep, *again]).items()} == {
        f"16/8 {SWEEP.stem}": 3,
        "16/8 release-0.5.23": 1,
    }


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    result = report(SWEEP, "--csv", tmp_path / "none" / "a.csv")
    assert result.exit_code == 1 and "a.csv cannot be written: No such file or directory" in result.output
