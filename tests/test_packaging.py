"""The wheel: kernels/ and sglang_plugin/ install inside moe_a2a, and nothing else reaches the top level."""

from __future__ import annotations

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folder here -> package it installs as.
FOLDERS = {"moe_a2a": "moe_a2a", "kernels": "moe_a2a/kernels", "sglang_plugin": "moe_a2a/sglang_plugin"}


def run(*command: object, cwd: Path, pythonpath: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath:
        environment["PYTHONPATH"] = str(pythonpath)
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def copy_of_the_tree(target: Path) -> Path:
    """The files that a clone has, as far as a build reads them. A build writes beside its sources."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target)
    for name in ("moe_a2a", "kernels", "sglang_plugin", "tests", "examples", "bench"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build(source: Path, kind: str, into: Path) -> Path:
    """Build a "wheel" or "sdist" with the installed setuptools, so that no network is needed."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    into.mkdir(exist_ok=True)
    run(sys.executable, "-c", code, into, cwd=source)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_of_the_tree(folder / "tree"), "wheel", folder / "dist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, wheel]
    run(*pip, cwd=target)
    return target


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources() -> set[str]:
    """What the wheel should hold: every Python file of the three folders, py.typed, and data of recipes."""
    found = {"moe_a2a/py.typed", "moe_a2a/recipes/models.json"}
    found |= {f"moe_a2a/recipes/slurm_files/{file.name}" for file in (ROOT / "moe_a2a/recipes/slurm_files").iterdir()}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            relative = file.relative_to(ROOT / folder)
            if not (folder == "moe_a2a" and relative.parts[0] in FOLDERS):  # the links of a checkout
                found.add(f"{package}/{relative.as_posix()}")
    return found


def test_the_wheel_holds_every_source_file_once(wheel: Path) -> None:
    assert {name for name in names(wheel) if ".dist-info/" not in name} == sources()
    assert {"moe_a2a/kernels/__init__.py", "moe_a2a/sglang_plugin/__init__.py", "moe_a2a/py.typed"} <= names(wheel)


def test_moe_a2a_is_the_only_top_level_package(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names(wheel)} == {"moe_a2a", "moe_a2a-0.1.0.dist-info"}


def test_a_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build(copy_of_the_tree(tmp_path / "tree"), "sdist", tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names(build(unpacked, "wheel", tmp_path / "again")) == names(wheel)


def test_the_extras_pick_the_engine_and_nothing_forces_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read("moe_a2a-0.1.0.dist-info/METADATA"))
    requirements = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist", [])]
    engines = {
        line.split(";extra==")[1].strip("\"'"): line.split(">=")[0] for line in requirements if "mooncake" in line
    }
    assert engines == {
        "cpu": "mooncake-transfer-engine-non-cuda",
        "cuda12": "mooncake-transfer-engine",
        "cuda13": "mooncake-transfer-engine-cuda13",
    }
    bindings = {line.split(";extra==")[1].strip("\"'"): line.split(";")[0] for line in requirements if "cuda-b" in line}
    assert bindings == {"cuda12": "cuda-bindings<13,>=12.8", "cuda13": "cuda-bindings<14,>=13"}
    needed = [line for line in requirements if "extra==" not in line]
    assert [line for line in needed if line.startswith(("torch", "triton"))] == ["torch<2.15,>=2.11"]


@pytest.mark.parametrize("name", ["kernels", "sglang_plugin"])
@pytest.mark.parametrize("place", ["elsewhere", "repository root"])
def test_an_installed_wheel_has_the_mapped_packages(installed: Path, tmp_path: Path, name: str, place: str) -> None:
    code = f"import moe_a2a.{name} as module; print(module.__name__, module.__file__)"
    if place == "repository root":
        # Python takes the checkout's own moe_a2a there; its links lead to the folders beside it.
        output = run(sys.executable, "-c", code, cwd=copy_of_the_tree(tmp_path / "tree"), pythonpath=installed)
        assert output == f"moe_a2a.{name} {tmp_path}/tree/moe_a2a/{name}/__init__.py"
    else:
        output = run(sys.executable, "-c", code, cwd=tmp_path, pythonpath=installed)
        assert output == f"moe_a2a.{name} {installed}/moe_a2a/{name}/__init__.py"


def test_the_console_script_is_installed(installed: Path) -> None:
    script = installed / "bin" / "moe-a2a"
    assert "doctor" in run(sys.executable, script, "--help", cwd=installed, pythonpath=installed)


def test_an_editable_install_has_the_mapped_packages(tmp_path: Path) -> None:
    """Installed into a virtual environment that sees this one's packages but not this one's own moe_a2a."""
    tree = copy_of_the_tree(tmp_path / "tree")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    run(sys.executable, "-c", code, wheels, cwd=tree)
    (editable,) = wheels.iterdir()
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(site)
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    dependencies = Path(torch.origin).parent.parent
    show = "import moe_a2a, moe_a2a.kernels as k, moe_a2a.sglang_plugin as s; print(moe_a2a.__file__, k, s, sep='\\n')"
    for place in (tmp_path, tree):
        output = run(python, "-c", f"import sys; sys.path.append({str(dependencies)!r}); {show}", cwd=place)
        package, kernels, plugin = output.splitlines()
        assert package == f"{tree}/moe_a2a/__init__.py"
        assert "module 'moe_a2a.kernels'" in kernels
        assert "module 'moe_a2a.sglang_plugin'" in plugin
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('kernels'))", cwd=tmp_path)
    assert found == "None"
