"""`make test-sglang`: tests/sglang against the sources of several SGLang releases, on a machine without a GPU.

Makes .venv-sglang once: CPU torch, what SGLang imports, and this package. SGLang itself lies unpacked in it, a folder
for each release, and one torch serves them all. SGLANG_VERSIONS="0.5.20" chooses releases, PYTEST_FLAGS the flags of
pytest. Exit code 0 if all tests of all releases pass.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import setup
from setup import ROOT, SetupError, pip, run, say

VERSIONS = "0.5.17 0.5.20 0.5.23"

REQUIREMENTS = Path(__file__).with_name("sglang-requirements.txt")
# Their own requirements would bring another torch.
WITHOUT_DEPENDENCIES = ["torchvision==0.28.0", "xgrammar==0.2.1", "compressed-tensors==0.18.0"]


def unpack(inside: str, version: str, target: Path) -> None:
    """Put the sources of one release into a folder of their own."""
    if (target / "sglang" / "version.py").is_file():
        return
    say(f"unpacking SGLang {version}")
    part = target.with_name(target.name + ".part")
    command = pip(inside, "--no-deps", "--no-compile", "--upgrade", "--target", str(part), f"sglang=={version}")
    if subprocess.call(command) != 0:
        raise SetupError(f"SGLang {version} cannot be installed, see above; its wheels need glibc 2.34")
    part.rename(target)


def ensure_environment(venv: Path) -> str:
    """Make .venv-sglang unless it is complete; returns its interpreter."""
    stamp = venv / "setup-stamp"
    setup.check_machine()
    python = setup.choose_python()
    key = setup.stamp_key(python) + Path(__file__).read_text() + REQUIREMENTS.read_text()
    inside = str(venv / "bin" / "python")
    if stamp.is_file() and stamp.read_text() == key and Path(inside).exists():
        return inside
    setup.install_system_libraries()
    inside = setup.ensure_venv(python, venv)
    if not setup.succeeds([inside, "-c", "import torch"]):
        say(f"installing {setup.FALLBACK_TORCH}")
        run(pip(inside, setup.FALLBACK_TORCH))
    constraints = venv / "constraints.txt"
    torch = setup.output([inside, "-c", "import importlib.metadata as m; print(m.version('torch'))"])
    constraints.write_text(f"torch=={torch}\n")
    say("installing what SGLang imports, and moe-a2a")
    run(pip(inside, "--no-deps", *WITHOUT_DEPENDENCIES))
    run(pip(inside, "-c", str(constraints), "-r", str(REQUIREMENTS), "-e", f"{ROOT}[cpu]"))
    stamp.write_text(key)
    return inside


def main() -> int:
    venv = ROOT / ".venv-sglang"
    versions = os.environ.get("SGLANG_VERSIONS", VERSIONS).replace(",", " ").split()
    flags = shlex.split(os.environ.get("PYTEST_FLAGS", "-q"))
    failed = []
    try:
        inside = ensure_environment(venv)
        for version in versions:
            sources = venv / f"sglang-{version}"
            unpack(inside, version, sources)
            say(f"SGLang {version}")
            environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(sources)]))
            if subprocess.call([inside, "-m", "pytest", *flags, "tests/sglang"], cwd=ROOT, env=environment) != 0:
                failed.append(version)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    say(f"SGLang {', '.join(failed)}: tests failed, see above" if failed else f"SGLang {', '.join(versions)}: passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
