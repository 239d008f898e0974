"""bench/collective_times.py measures what it says: a short run, and its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_short_run_gives_every_figure(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    sizes = ["--ranks=2", "--hosts=2", "--repeats=5", "--limit=8"]
    command = [sys.executable, "bench/collective_times.py", *sizes, f"--json={file}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(file.read_text())
    assert (result["ranks"], result["hosts"], result["repeats"]) == (2, 2, 5)
    assert [case["call"] for case in result["cases"]] == [
        "barrier",
        "all_reduce",
        "broadcast",
        "all_gather",
        "ping_pong",
    ]
    for case in result["cases"]:
        assert case["gloo_over_moe_a2a"] == case["us"]["gloo"] / case["us"]["moe_a2a"] > 0
