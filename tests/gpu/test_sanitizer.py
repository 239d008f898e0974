"""compute-sanitizer's memcheck finds nothing in a small program that runs every kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("sanitizer_program.py")
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(900),
]


def _run(*command: str) -> str:
    root = PROGRAM.parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, str(PROGRAM)], env=environment, cwd=root, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_program_itself_runs_to_its_end() -> None:
    assert _run().splitlines()[-1] == "done"


@pytest.mark.skipif(
    TOOL is None, reason="compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin: MEMCHECK DID NOT RUN"
)
def test_memcheck_finds_nothing() -> None:
    assert TOOL is not None
    # Errors of API calls are torch's own trials (is this pointer pinned, is peer access on); memory is the question.
    output = _run(TOOL, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "1")
    assert "ERROR SUMMARY: 0 errors" in output and "done" in output
