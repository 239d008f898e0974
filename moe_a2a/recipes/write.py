"""A plan's files in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from moe_a2a.recipes.compose import render_compose
from moe_a2a.recipes.plan import Plan, RecipeError
from moe_a2a.recipes.shell import render_shell

#: --format -> what renders a plan: file name -> text.
FORMATS: Mapping[str, Callable[[Plan], dict[str, str]]] = {"shell": render_shell, "compose": render_compose}


def write(plan: Plan, form: str, out: Path) -> list[str]:
    """Write a plan's files to `out`, which must be new or empty, and return their names. Raises RecipeError."""
    return write_files(FORMATS[form](plan), out)


def write_files(files: Mapping[str, str], out: Path) -> list[str]:
    """Write files, those that begin with #! executable: all of them, or none. Raises RecipeError."""
    begun: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise RecipeError(f"--out {out}: there are files in it; give a folder that is new or empty")
        for name, text in files.items():
            file = out / name
            begun.append(file)
            file.write_text(text, encoding="utf-8")
            if text.startswith("#!"):
                file.chmod(0o755)
    except OSError as error:
        for file in begun:
            with contextlib.suppress(OSError):  # the one that could not be made
                file.unlink()
        raise RecipeError(f"--out {out}: {error.strerror}; give a folder that can be written") from error
    return list(files)
