"""Mooncake's Python surface over moe-a2a: `moe_a2a.compat.mooncake.pg` is `mooncake.pg` (docs/mooncake.md)."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from moe_a2a.errors import ConfigError

_OURS = "moe_a2a.compat.mooncake.pg"
_THEIRS = "mooncake.pg"


def install() -> None:
    """Let `import mooncake.pg` and `from mooncake import pg` give `moe_a2a.compat.mooncake.pg` in this process.

    Everything else of an installed `mooncake` package (its Transfer Engine, above all) stays as it is. Without such a
    package there is a `mooncake` that has `pg` and nothing more. May be called again.

    Raises ConfigError if something has imported Mooncake's own `mooncake.pg` before: it has registered its backends.
    """
    pg = importlib.import_module(_OURS)
    if sys.modules.get(_THEIRS, pg) is not pg:
        raise ConfigError(
            "mooncake.pg is imported already and has registered its backends; call install() before anything imports it"
        )
    try:
        package = importlib.import_module("mooncake")
    except ModuleNotFoundError as error:
        if error.name != "mooncake":
            raise
        package = ModuleType("mooncake", "No mooncake package is installed; moe-a2a provides mooncake.pg.")
        package.__spec__ = ModuleSpec("mooncake", None, is_package=True)
        package.__path__ = []
        sys.modules["mooncake"] = package
    sys.modules[_THEIRS] = pg
    package.pg = pg  # type: ignore[attr-defined]
