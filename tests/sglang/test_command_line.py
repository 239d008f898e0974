"""SGLang's own command, with this package found by its entry point: what a user sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import operators
import sglang
import sglang_process
from servers import FLAGS, MOONCAKE


def launch(site: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `sglang.launch_server` on this machine; without a GPU it ends by itself."""
    sglang_process.make_site(site)
    (site / "sitecustomize.py").write_text(operators.PROGRAM)
    sources = str(Path(sglang.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), sources]),
        "SGLANG_PLUGINS": "moe-a2a",
        **env,
    }
    command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", *FLAGS, *flags]
    return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, timeout=120)


def test_the_reason_is_the_last_line(tmp_path: Path) -> None:
    got = launch(tmp_path, *MOONCAKE, "--elastic-ep-backend", "mooncake")
    assert got.returncode != 0
    lines = [line for line in got.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith(
        "moe_a2a.sglang_plugin.limits.FlagError: --elastic-ep-backend mooncake with --moe-a2a-backend"
    )


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="with a GPU the server would start")
@pytest.mark.parametrize("switched_off", [True, False])
def test_otherwise_sglang_goes_its_own_way(tmp_path: Path, switched_off: bool) -> None:
    flags = [*MOONCAKE, "--elastic-ep-backend", "mooncake"] if switched_off else ["--elastic-ep-backend", "mooncake"]
    got = launch(tmp_path, *flags, MOE_A2A_SGLANG="0" if switched_off else "1")
    assert "No accelerator" in got.stderr and "FlagError" not in got.stderr
    assert "Failed to" not in got.stderr + got.stdout, "a plug-in failed"
