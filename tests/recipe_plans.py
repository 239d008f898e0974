"""Plans as `moe-a2a recipe` makes them, without files; and config.json files of the models that it knows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

from click.testing import CliRunner

from moe_a2a.cli import main
from moe_a2a.recipes import commands, models
from moe_a2a.recipes.plan import Plan


def plan_of(*words: str) -> Plan:
    """The plan of `moe-a2a recipe WORDS`. Raises AssertionError with what the command says."""
    plans: list[Plan] = []

    def keep(plan: Plan, form: str, out: Path) -> list[str]:
        plans.append(plan)
        return []

    with mock.patch.object(commands, "write", keep):
        done = CliRunner().invoke(main, ["recipe", *words, "--out", "unused"])
    assert done.exit_code == 0, done.output
    return plans[0]


def refusal(*words: str) -> str:
    """What `moe-a2a recipe WORDS` refuses with, having written nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        done = CliRunner().invoke(main, ["recipe", *words, "--out", str(out)])
        assert done.exit_code != 0, done.output
        assert not out.exists()
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output.removeprefix("Error: ").strip()


def config_folder(folder: Path, model: str) -> Path:
    """A folder with a model's config.json, as SGLang reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(models.load(model).config))
    return folder
