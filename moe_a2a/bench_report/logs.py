"""Read logs of SGLang's serving benchmark (`python -m sglang.benchmark.serving`, formerly `sglang.bench_serving`).

What a log looks like was read from the sources of 0.5.17, 0.5.20 and 0.5.23 and from runs of all three; the table is
the same in them. A log holds one run or many: a sweep may append to one file. The client's progress bar goes to stderr,
so in a log of both its carriage returns stand between, and before, lines of the report.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What a stream that ended without its last chunk is called here. docs/troubleshooting.md says why they end.
CUT = "stream cut (TransferEncodingError)"
#: Failures that the client counts and does not print: answers other than 200, and all of the OpenAI backends.
UNPRINTED = "not printed by the client"

_START = "benchmark_args=Namespace("
_WARMUP = "Starting warmup with "
_MAIN = "Starting main benchmark run"
_NONE = "All requests failed."
_TITLE = "= Serving Benchmark Result ="
_END = re.compile(r"={50}$")
_PROGRESS = re.compile(r"(\d+)/(\d+) \[")
_ERROR = re.compile(r"""output\.error=(?P<text>(?:'|").*)$""")
_COUNTED = re.compile(r"(\d+) of (\d+) requests failed\.$")  # the Rust client of 0.5.23
_COUNTED_AS = re.compile(r"\s+(\d+) x (.+)$")
_ROW = re.compile(r"(?P<name>[A-Z][^:]*(?:\([^)]*\))?):\s+(?P<value>\S.*?)\s*$")
_NAMED = re.compile(r"_(\d+)\.log$")

_RATES = {
    "request_throughput": "Request throughput (req/s)",
    "input_throughput": "Input token throughput (tok/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "total_throughput": "Total token throughput (tok/s)",
}
_LATENCIES = ("E2E Latency", "TTFT", "TPOT", "ITL")
_OF_REQUESTS = ("Mean", "Median", "P99")


class LogError(ValueError):
    """A log, or a run in it, that has no result; says which file, what was expected and what it has instead."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds, over the requests that succeeded (ITL: over their tokens)."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True)
class Run:
    """One run of the benchmark, as its log tells it.

    `requests` and `failed` are None where the log does not say how many requests there were (no progress bar, and a
    dataset that need not have `--num-prompts` of them). `errors` counts the failures by kind; `cut` is the number of
    those that are CUT. `concurrency` is None where the run had no limit and the file's name has no number.
    """

    file: str
    line: int
    concurrency: int | None
    input_length: int | None
    output_length: int | None
    requests: int | None
    succeeded: int
    failed: int | None
    cut: int
    errors: dict[str, int]
    duration_s: float
    input_tokens: int
    output_tokens: int
    request_throughput: float
    input_throughput: float
    output_throughput: float
    total_throughput: float
    ttft: Latency
    tpot: Latency
    itl: Latency
    e2e: Latency


@dataclass
class _Attempt:
    """The lines of one run, and where it stopped."""

    line: int
    arguments: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    main: bool = False
    total: int | None = None
    errors: dict[str, int] = field(default_factory=dict)
    table: dict[str, str] | None = None
    ended: bool = False
    counted: tuple[int, int] | None = None
    none_succeeded: bool = False
    last: str = ""

    def error(self, kind: str, number: int = 1) -> None:
        self.errors[kind] = self.errors.get(kind, 0) + number


def read(path: Path) -> tuple[list[Run], list[LogError]]:
    """The runs of one log that have a result, in order, and an error for each that has none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return [], [LogError(f"{path}: {error.strerror or error}")]
    attempts = _attempts(text)
    if not attempts:
        has = "it is empty" if not text.strip() else f"its first line is {text.strip().splitlines()[0][:80]!r}"
        expected = f"a log of SGLang's serving benchmark has a line {_START}...) or {_TITLE.strip('= ')!r}"
        return [], [LogError(f"{path}: {expected}; {has}")]
    runs: list[Run] = []
    problems: list[LogError] = []
    for attempt in attempts:
        try:
            runs.append(_run(path, attempt))
        except LogError as error:
            problems.append(error)
    return runs, problems


def _attempts(text: str) -> list[_Attempt]:
    found: list[_Attempt] = []
    for number, physical in enumerate(text.split("\n"), 1):
        for line in physical.split("\r"):
            current = found[-1] if found else None
            if _START in line:
                found.append(
                    _Attempt(number, arguments=_arguments(line[line.index(_START) + len("benchmark_args=") :]))
                )
            elif _WARMUP in line:
                if current is None or current.warm:
                    found.append(_Attempt(number))
                found[-1].warm = True
            elif _TITLE in line:
                if current is None or current.table is not None:
                    found.append(_Attempt(number))
                found[-1].table = {}
            elif current is not None:
                _line(current, line)
    return found


def _line(current: _Attempt, line: str) -> None:
    """One line of a run that is no beginning of anything."""
    current.last = line.strip() or current.last
    if progress := _PROGRESS.search(line):
        current.total = int(progress[2])
    if current.main and (error := _ERROR.search(line)):
        current.error(_kind(error["text"]))
    if _NONE in line:
        current.none_succeeded = True
    if _MAIN in line:
        current.main = True
    elif current.table is not None and not current.ended:
        if _END.match(line):
            current.ended = True
        elif row := _ROW.match(line):
            current.table[row["name"]] = row["value"]
    elif current.ended and (counted := _COUNTED.match(line)):
        current.counted = int(counted[1]), int(counted[2])
    elif current.counted and (counted := _COUNTED_AS.match(line)):
        current.error(CUT if "error decoding response body" in counted[2] else counted[2], int(counted[1]))


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a printed Namespace; those that are no literals (request_rate=inf) are left out."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):  # cut off, or something else was printed into the line
        return {}
    found = {}
    for keyword in call.keywords if isinstance(call, ast.Call) else []:
        if keyword.arg is not None and isinstance(keyword.value, ast.Constant):
            found[keyword.arg] = keyword.value.value
    return found


def _kind(printed: str) -> str:
    """What a printed error is: the traceback that the client prints as one literal ends with the exception."""
    if "TransferEncodingError" in printed:
        return CUT
    lines = [line for line in re.split(r"\\n|\n", printed.strip("'\"")) if line.strip()]
    return lines[-1].partition(":")[0].strip().rpartition(".")[2] if lines else UNPRINTED


def _run(path: Path, attempt: _Attempt) -> Run:
    where = f"{path}, line {attempt.line}"
    concurrency = _integer(attempt.arguments.get("max_concurrency"))
    at = "" if concurrency is None else f" at concurrency {concurrency}"
    table = attempt.table
    if table is None:
        raise LogError(f"{where}: the run{at} has no table {_TITLE.strip('= ')!r}; {_why(attempt)}")
    missing = [name for name in _expected() if name not in table]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        state = "lacks" if attempt.ended else "is cut off: it lacks"
        raise LogError(
            f"{where}: the table of the run{at} {state} {missing[0] + ':'!r}{more} (backends of generation have)"
        )
    if not attempt.ended:
        raise LogError(f"{where}: the table of the run{at} is cut off: its last line, of 50 '=', is missing")
    succeeded = int(_number(where, table, "Successful requests"))
    requests = _requests(attempt, succeeded)
    failed = None if requests is None else requests - succeeded
    errors = dict(attempt.errors)
    if failed is not None and failed > sum(errors.values()):
        errors[UNPRINTED] = failed - sum(errors.values())
    limit = _integer(table["Max request concurrency"])
    named = _NAMED.search(path.name)
    return Run(
        file=str(path),
        line=attempt.line,
        concurrency=limit if limit is not None else int(named[1]) if named else None,
        input_length=_length(attempt, "random_input_len"),
        output_length=_length(attempt, "random_output_len"),
        requests=requests,
        succeeded=succeeded,
        failed=failed,
        cut=errors.get(CUT, 0),
        errors=errors,
        duration_s=_number(where, table, "Benchmark duration (s)"),
        input_tokens=int(_number(where, table, "Total input tokens")),
        output_tokens=int(_number(where, table, "Total generated tokens")),
        request_throughput=_number(where, table, _RATES["request_throughput"]),
        input_throughput=_number(where, table, _RATES["input_throughput"]),
        output_throughput=_number(where, table, _RATES["output_throughput"]),
        total_throughput=_number(where, table, _RATES["total_throughput"]),
        ttft=_latency(where, table, "TTFT"),
        tpot=_latency(where, table, "TPOT"),
        itl=_latency(where, table, "ITL"),
        e2e=_latency(where, table, "E2E Latency"),
    )


def _expected() -> list[str]:
    """The rows that a report is made of, in the table's order."""
    rows = ["Max request concurrency", "Successful requests", "Benchmark duration (s)"]
    rows += ["Total input tokens", "Total generated tokens", *_RATES.values()]
    return rows + [f"{which} {name} (ms)" for name in _LATENCIES for which in _OF_REQUESTS]


def _why(attempt: _Attempt) -> str:
    """Why a run has no table."""
    if attempt.none_succeeded:
        printed = ", ".join(f"{number} x {kind}" for kind, number in attempt.errors.items())
        return f"all requests failed, and the client ends with a traceback then ({printed or UNPRINTED})"
    if not attempt.last:
        return "nothing follows its arguments"
    stage = "the run" if attempt.main else "its warm-up" if attempt.warm else "its start"
    return f"it stopped in {stage}; its last line is {attempt.last[:200]!r}"


def _requests(attempt: _Attempt, succeeded: int) -> int | None:
    """How many requests the run had, if the log says."""
    if attempt.counted:
        return attempt.counted[1]
    total = attempt.total
    if total is None and str(attempt.arguments.get("dataset_name", "")).startswith("random"):
        total = _integer(attempt.arguments.get("num_prompts"))
    if total is not None and total < succeeded:  # several rounds a prompt: the progress bar counts prompts
        return None
    return total


def _length(attempt: _Attempt, name: str) -> int | None:
    """Tokens asked for, of the datasets that these arguments are for."""
    if not str(attempt.arguments.get("dataset_name", "")).startswith("random"):
        return None
    return _integer(attempt.arguments.get(name))


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _latency(where: str, table: dict[str, str], name: str) -> Latency:
    return Latency(*(_number(where, table, f"{which} {name} (ms)") for which in _OF_REQUESTS))


def _number(where: str, table: dict[str, str], name: str) -> float:
    try:
        number = float(table[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise LogError(f"{where}: {name + ':'!r} should be a number, not {table[name]!r}")
    return number
