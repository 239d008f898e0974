"""SGLang's own benchmark client against a real HTTP server without a model, and what `moe-a2a bench-report` reads.

The client's JSON lines are the oracle: what the report reads from the log has to be what the client wrote there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import operators
import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

from moe_a2a.bench_report.logs import CUT, UNPRINTED, read

pytestmark = pytest.mark.timeout(900)  # the client imports SGLang: many seconds, on a machine with other work a minute
STAND_IN = Path(__file__).parent.parent / "serving_stand_in.py"
# The package `datasets` is asked for by one dataset, which is not used here.
CLIENT = (
    operators.PROGRAM
    + """
import runpy, sys, types
sys.modules["datasets"] = types.ModuleType("datasets")
sys.modules["datasets"].load_dataset = None
runpy.run_module("sglang.benchmark.serving", run_name="__main__", alter_sys=True)
"""
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 100 words, in a folder; clients do not start without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "a": 1, **{f"w{i}": i for i in range(2, 100)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return folder


@contextlib.contextmanager
def server(tokenizer: Path, *arguments: str) -> Iterator[int]:
    """The stand-in on a free port."""
    command = [sys.executable, str(STAND_IN), "--model-path", str(tokenizer), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().rsplit(":", 1)[1])
        finally:
            process.send_signal(signal.SIGTERM)


def run_client(log: Path, port: int, tokenizer: Path, concurrency: int, requests: int, *more: str) -> dict[str, Any]:
    """Append one run to the log; returns what the client wrote as JSON."""
    lines = log.with_suffix(".jsonl")
    arguments = ["--backend", "sglang", "--host", "127.0.0.1", "--port", str(port), "--model", str(tokenizer)]
    arguments += ["--dataset-name", "random-ids", "--random-input-len", "16", "--random-output-len", "8"]
    arguments += ["--random-range-ratio", "1.0", "--num-prompts", str(requests), "--output-file", str(lines)]
    arguments += ["--max-concurrency", str(concurrency), *more]
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    with log.open("ab") as file:
        command = [sys.executable, "-c", CLIENT, *arguments]
        code = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=300)
    assert code == 0, log.read_text()[-3000:]
    result = json.loads(lines.read_text().splitlines()[-1])
    assert isinstance(result, dict)
    return result


def test_a_sweep_that_is_appended_to_one_log(tokenizer: Path, tmp_path: Path) -> None:
    log = tmp_path / "benchmark_1_xP1_yD1_stand-in_CONCURRENCY.log"
    with server(tokenizer) as port:
        written = [run_client(log, port, tokenizer, concurrency, 2 * concurrency) for concurrency in (1, 8)]
    runs, problems = read(log)
    assert not problems
    for run, result in zip(runs, written, strict=True):
        assert run.concurrency == result["max_concurrency"]
        assert (run.requests, run.failed) == (2 * result["max_concurrency"], 0)
        assert (run.input_tokens, run.output_tokens) == (result["total_input_tokens"], result["total_output_tokens"])
        for rate in ("request_throughput", "input_throughput", "output_throughput", "total_throughput"):
            assert getattr(run, rate) == pytest.approx(result[rate], abs=0.006)
        for key, name in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2e_latency")):
            for which in ("mean", "median", "p99"):
                read_ms = getattr(getattr(run, key), which)
                assert read_ms == pytest.approx(result[f"{which}_{name}_ms"], abs=0.006), (key, which)


def test_streams_that_end_early_and_requests_that_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    # 32 requests after one of the warm-up: numbers 7, 14, 21, 28 are cut, 11, 22, 33 refused.
    with server(tokenizer, "--cut-every", "7", "--refuse-every", "11") as port:
        result = run_client(log, port, tokenizer, 8, 32)
    (run,), problems = read(log)
    assert not problems
    assert (run.requests, run.succeeded, run.failed) == (32, result["completed"], 7)
    assert run.errors == {CUT: 4, UNPRINTED: 3}
