"""Tests against SGLang's own sources: `make test-sglang`. Where SGLang is not installed each module is skipped.

Every module begins with `pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")`. (Not
"sglang": this folder has that name, and would be found.)
"""

from __future__ import annotations

import importlib.util

import operators

_sglang = importlib.util.find_spec("sglang")
if _sglang is not None and _sglang.origin is not None:
    operators.declare()
