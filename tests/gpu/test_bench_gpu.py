"""`moe-a2a bench --device cuda` beside every baseline that is installed: all are right, and all are timed."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from moe_a2a.bench.baselines import GPU_BASELINES, why_absent

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs"),
    pytest.mark.timeout(300),
]
ROOT = pathlib.Path(__file__).parents[2]


def test_ours_and_every_installed_baseline_are_right_and_timed_in_both_modes(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.json"
    options = ["--device", "cuda", "--ranks", "2", "--tokens", "8,128", "--dtype", "bf16,fp8", "--iterations", "5"]
    call = [sys.executable, "-m", "moe_a2a.cli", "bench", *options, "--json", str(out)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(call, capture_output=True, text=True, timeout=280, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 8
    installed = [name for name in GPU_BASELINES if why_absent(name) is None]
    for case in cases:
        assert case["correct"], case["problems"]
        assert list(case["baselines"]) == installed
        for name, beside in case["baselines"].items():
            assert beside["problem"] is None, f"{case['name']}: {name}: {beside['problem']}"
            assert beside["both_us"]["p50"] > 0


def test_contiguous_and_grouped_steps_are_right_and_timed_in_both_modes(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.json"
    options = ["--device", "cuda", "--ranks", "2", "--tokens", "256", "--dtype", "bf16,fp8", "--iterations", "5"]
    layouts = ["--layout", "contiguous,grouped", "--num-sms", "16", "--experts", "16"]
    call = [sys.executable, "-m", "moe_a2a.cli", "bench", *options, *layouts, "--json", str(out)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(call, capture_output=True, text=True, timeout=280, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [(case["layout"], case["dtype"], case["mode"]) for case in cases] == [
        (layout, dtype, mode)
        for layout in ("contiguous", "grouped")
        for dtype in ("bf16", "fp8")
        for mode in ("graph", "eager")
    ]
    for case in cases:
        assert case["correct"], case["problems"]
        assert case["baselines"] == {} and case["both_us"]["p50"] > 0
