"""Kernels compile in a process whose `triton` module has been changed by another library, as SGLang does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, whose compiler reads the kernels: install triton"
)
_PROGRAM = """
import importlib, pkgutil
import triton
from triton.runtime.jit import JITFunction

def foreign(n):
    raise AssertionError

for name in ("next_power_of_2", "cdiv"):
    setattr(triton, name, foreign)
import moe_a2a.kernels
seen = 0
for module in pkgutil.iter_modules(moe_a2a.kernels.__path__):
    for value in vars(importlib.import_module(f"moe_a2a.kernels.{module.name}")).values():
        if isinstance(value, JITFunction):
            assert value.cache_key  # reads the source and everything that it refers to
            seen += 1
print(seen)
"""


def test_kernels_refer_to_nothing_of_triton_that_others_replace() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50
