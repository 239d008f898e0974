"""bench/mooncake_times.py measures what it says: a short run, and its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_short_run_gives_every_figure(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, "bench/mooncake_times.py", "--ranks=3", "--hosts=1", "--kills=3", f"--json={file}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(file.read_text())
    assert (result["ranks"], result["hosts"], result["kills"]) == (3, 1, 3)
    for figure in ("next_ended_ms", "activate_ms", "join_ms", "join_to_first_ms", "new_group_ms"):
        assert 0 < result[figure]["p50"] <= result[figure]["p99"] <= result[figure]["max"] < 10_000
    assert result["join_ms"]["p50"] <= result["join_to_first_ms"]["p50"]
