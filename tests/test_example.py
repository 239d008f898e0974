"""The DeepSeek-V3 example: it proves what it says, notices a difference, and does not hang when a process dies."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rich.console import Console

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "deepseek_v3.py"


def start_example(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def test_sharded_model_decodes_the_unsharded_models_tokens() -> None:
    example = start_example("--tokens", "8", "--layers", "2", "--prefill-layout", "grouped")
    output, _ = example.communicate(timeout=150)
    assert example.returncode == 0, output
    proof = next(line for line in output.splitlines() if line.startswith("Proved:"))
    assert "4 ranks on 2 hosts, 16 of the routed experts each" in proof
    assert "(4 x 8, at least" in proof
    assert output.count("8 of 8") == 4


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_a_process_that_dies_ends_the_run_and_is_named() -> None:
    example = start_example("--tokens", "500", "--layers", "2")
    # The ranks and the unsharded model are children of the server that forks them.
    deadline = time.monotonic() + 60
    processes: list[int] = []
    while len(processes) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
        processes = [grandchild for child in children(example.pid) for grandchild in children(child)]
    try:
        assert len(processes) == 5
        os.kill(max(processes), signal.SIGKILL)
        output, _ = example.communicate(timeout=60)
    finally:
        example.kill()
    assert example.returncode == 1
    assert "died with exit code -9" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.fixture(scope="module")
def example_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepseek_v3_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE.parent)
        spec.loader.exec_module(module)
    return module


ARGS = argparse.Namespace(ranks=1, hosts=1, tokens=3)


def made_up_results() -> dict:
    """One rank whose prompt has two tokens and whose logits are 0 .. 1."""
    logits = np.linspace(0, 1, 4 * 256, dtype=np.float32).reshape(4, 256)
    expected = {"tokens": np.array([5, 6, 7]), "logits": logits, "without_experts": logits[:2] + 1}
    got = {"tokens": np.array([5, 6, 7]), "logits": logits.copy(), "held": 64, "of": 64}
    return {"unsharded model": [expected], "rank 0, host-0": got}


def judged(example: ModuleType, results: dict) -> tuple[int, str]:
    console = Console(record=True, width=300)
    code = example.judge(ARGS, results, console)
    return code, console.export_text()


def test_equal_results_are_judged_equal(example_module: ModuleType) -> None:
    code, text = judged(example_module, made_up_results())
    assert code == 0 and "Proved:" in text


def test_a_token_that_differs_fails_the_run_and_is_named(example_module: ModuleType) -> None:
    results = made_up_results()
    results["rank 0, host-0"]["tokens"][1] = 9
    results["rank 0, host-0"]["logits"][3] += 1  # of another text already: not held against it
    code, text = judged(example_module, results)
    assert code == 1 and "DIFFERS: rank 0, host-0: token 1 is 9, unsharded 6" in text
    assert "a logit differs" not in text and "Proved" not in text


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_a_logit_beyond_the_tolerance_fails_the_run(example_module: ModuleType, wrong: float) -> None:
    results = made_up_results()
    results["rank 0, host-0"]["logits"][3, 17] += wrong
    code, text = judged(example_module, results)
    assert code == 1 and "a logit differs by" in text


def test_experts_that_do_not_matter_prove_nothing(example_module: ModuleType) -> None:
    results = made_up_results()
    results["unsharded model"][0]["without_experts"] -= 1
    code, text = judged(example_module, results)
    assert code == 1 and "proves nothing" in text
