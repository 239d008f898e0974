"""SGLang's dispatcher layer on GPUs: runs tests/gpu/sglang_dispatcher.py, which also says how long layers take."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
PROGRAM = Path(__file__).with_name("sglang_dispatcher.py")
_sglang = importlib.util.find_spec("sglang")
HERE = _sglang is not None and _sglang.origin is not None  # and not tests/sglang

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs"),
    pytest.mark.skipif(not HERE, reason="SGLang is not installed"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize(
    "section", ["eager", "captured", "two_batches", "two_batches_captured", "single_batch", "not_finite"]
)
def test_sglangs_dispatcher_layer(section: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), *sys.path])}
    command = [sys.executable, str(PROGRAM), "--only", section, "--ranks", "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False)
    assert result.returncode == 0 and f"{section} passed" in result.stdout, result.stdout + result.stderr[-4000:]
