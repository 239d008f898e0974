"""bench/elastic_times.py runs, and every time that it says it measures is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_program_measures_cost_losses_and_joins(tmp_path):
    file = tmp_path / "times.json"
    sizes = ["--ranks=2", "--hosts=2", "--tokens", "4", "--steps=2", "--kills=1", "--json", str(file)]
    command = [sys.executable, str(ROOT / "bench" / "elastic_times.py"), *sizes]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    (cost,) = result["cost"]
    assert cost["tokens"] == 4 and cost["ordinary_ms"] > 0 and cost["elastic_ms"] > 0
    for what in ("whole_again_ms", "next_step_ms", "joined_ms"):
        assert 0 < result[what]["p50"] <= result[what]["max"]
