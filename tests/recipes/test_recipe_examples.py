"""examples/recipes is what its program writes today."""

from __future__ import annotations

import filecmp
from pathlib import Path

import make
import pytest


@pytest.mark.parametrize("name", make.ALL)
def test_an_example_is_what_the_command_writes(name: str, tmp_path: Path) -> None:
    make.render(name, tmp_path / name)
    found = filecmp.dircmp(make.HERE / name, tmp_path / name, ignore=[])
    message = f"examples/recipes/{name} is stale: python examples/recipes/make.py"
    assert not (found.left_only or found.right_only), message
    different = filecmp.cmpfiles(make.HERE / name, tmp_path / name, found.common_files, shallow=False)[1:]
    assert different == ([], []), message


def test_there_are_no_other_folders() -> None:
    folders = {folder.name for folder in make.HERE.iterdir() if folder.is_dir() and not folder.name.startswith("__")}
    assert folders == set(make.ALL)


def test_scripts_can_be_executed() -> None:
    for file in (*make.HERE.glob("*/*.sh"), *make.HERE.glob("*/*.slurm")):
        assert file.stat().st_mode & 0o111, file
