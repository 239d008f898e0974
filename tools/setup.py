"""Set up .venv for `make run` and `make test`: CPU torch, the Transfer Engine's CPU wheel, system libraries.

Standard library only, and nothing that Python 3.7 cannot parse, so that a too old interpreter gets a message and not a
SyntaxError. A stamp in .venv, keyed on pyproject.toml, on this file, on the Python version and on the folder, makes a
second call return at once. Exit code 0 if .venv is ready, 1 with one clear line if not.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 10), (3, 13)
FALLBACK_TORCH = "torch==2.13.0"
EXTRAS = "cpu,plot,demo,test"

# What the engine's CPU wheel links to and does not bring, and the package that has it on Debian and Ubuntu.
SYSTEM_LIBRARIES = {
    "libibverbs.so.1": "libibverbs1",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
}
# The RDMA drivers of libibverbs. The engine does not link to them, and TCP works without.
PROVIDERS = "ibverbs-providers"
# Where the program lies in .venv for the tests of the membership store.
ETCD = Path("etcd") / "usr" / "bin" / "etcd"


class SetupError(Exception):
    """A set-up that cannot go on; the text is the one line to print."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    """Run a command with its output shown; SetupError with the command line if it fails."""
    if subprocess.call(command, env=env) != 0:
        raise SetupError("this command failed, see above: " + " ".join(shlex.quote(part) for part in command))


def succeeds(command: list[str]) -> bool:
    """Whether a command exits with 0; its output is dropped."""
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def output(command: list[str]) -> str:
    return subprocess.check_output(command).decode().strip()


def is_root() -> bool:
    return os.geteuid() == 0


def can_use_apt() -> bool:
    return is_root() and shutil.which("apt-get") is not None


def apt_command(packages: list[str]) -> str:
    """The command that a person would type."""
    return ("" if is_root() else "sudo ") + "apt-get install -y " + " ".join(packages)


def apt_install(packages: list[str]) -> None:
    """Install Debian packages. Needs root."""
    say("installing with apt-get: " + " ".join(packages))
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    options = ["-qq", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120"]
    # A fresh machine has no package lists. A source that fails does not matter if the packages are found.
    subprocess.call(["apt-get", "update", *options], env=environment)
    run(["apt-get", "install", "-y", "--no-install-recommends", *options, *packages], env=environment)


def check_machine() -> None:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise SetupError(f"CPU ranks need Linux on x86-64; this is {platform.system()} on {platform.machine()}")


def choose_python() -> str:
    """Path of the interpreter for .venv: this one, or else the newest supported python3.x on PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        candidate = shutil.which(f"python3.{minor}")
        if candidate and succeeds([candidate, "-c", f"import sys; sys.exit(sys.version_info[1] != {minor})"]):
            say(f"{sys.executable} is Python {platform.python_version()}; taking {candidate}")
            return candidate
    raise SetupError(
        f"{sys.executable} is Python {platform.python_version()}; 3.10 to 3.13 are supported. "
        "Install one of them and say which: make PYTHON=python3.12 ..."
    )


def python_version(python: str) -> str:
    return output([python, "-c", "import sys; print('.'.join(map(str, sys.version_info[:3])))"])


def loadable(library: str) -> bool:
    """Whether the dynamic linker finds a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def missing_libraries() -> list[str]:
    return [library for library in SYSTEM_LIBRARIES if not loadable(library)]


def providers_present() -> bool:
    return any(glob.glob(f"{folder}/libibverbs/*.so") for folder in ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib"))


def install_system_libraries() -> None:
    """Bring the engine's system libraries through apt when root; else say in one line what to install."""
    missing = missing_libraries()
    packages = [SYSTEM_LIBRARIES[library] for library in missing]
    if not providers_present():
        packages.append(PROVIDERS)
    if not packages:
        return
    if not missing and not can_use_apt():
        say(f"TCP works as it is; for RDMA, install the drivers: {apt_command(packages)}")
        return
    if not can_use_apt():
        raise SetupError(f"the Transfer Engine needs {', '.join(missing)}; install first: {apt_command(packages)}")
    try:
        apt_install(packages)
    except SetupError as error:
        if missing:
            raise
        say(f"{error}; only RDMA needs it, going on")
    if missing_libraries():
        raise SetupError(f"{', '.join(missing_libraries())} still not found after: {apt_command(packages)}")


def ensure_venv_module(python: str) -> None:
    """Debian and Ubuntu ship ensurepip apart from Python."""
    probe = [python, "-c", "import ensurepip, venv"]
    if succeeds(probe):
        return
    package = "python" + ".".join(python_version(python).split(".")[:2]) + "-venv"
    if can_use_apt():
        apt_install([package])
    if not succeeds(probe):
        raise SetupError(f"{python} cannot make a virtual environment; install first: {apt_command([package])}")


def ensure_venv(python: str, venv: Path) -> str:
    """Make .venv unless it works and has this Python; returns its interpreter."""
    inside = str(venv / "bin" / "python")
    if not succeeds([inside, "-m", "pip", "--version"]) or python_version(inside) != python_version(python):
        ensure_venv_module(python)
        say(f"making {venv.name} with Python {python_version(python)}")
        run([python, "-m", "venv", "--clear", str(venv)])
    return inside


def pip(inside: str, *arguments: str) -> list[str]:
    """A pip install command; quiet unless a person watches."""
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    return [inside, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *quiet, *arguments]


def torch_requirement() -> str:
    match = re.search(r'"(torch[<>=!~][^"]*)"', (ROOT / "pyproject.toml").read_text())
    if match is None:
        raise SetupError("pyproject.toml lists no torch")
    return match.group(1)


def ensure_torch(inside: str) -> None:
    """Install the CPU build of torch, unless a torch is there.

    A plain `pip install torch` brings several GB of CUDA. uv knows where the CPU builds are; where those cannot be
    reached, pip takes what the configured package index has.
    """
    if succeeds([inside, "-c", "import torch"]):
        return
    say("installing the CPU build of torch")
    if subprocess.call(pip(inside, "uv")) == 0:
        uv = str(Path(inside).parent / "uv")
        command = [uv, "pip", "install", "-q", "--python", inside, "--torch-backend=cpu", torch_requirement()]
        # Its output is dropped: where the CPU builds cannot be reached its error is expected, and the next line tells.
        if succeeds(["env", "UV_LINK_MODE=copy", "UV_HTTP_RETRIES=1", *command]):
            return
    say(f"the index of CPU builds cannot be reached; taking {FALLBACK_TORCH} from the configured package index")
    run(pip(inside, FALLBACK_TORCH))


def install_package(inside: str) -> None:
    """Install moe-a2a, editable, with the engine's CPU wheel and the tools; the installed torch stays as it is."""
    say("installing moe-a2a, the Transfer Engine's CPU wheel and the tools")
    torch = output([inside, "-c", "import importlib.metadata as m; print(m.version('torch'))"])
    constraints = Path(inside).parent.parent / "constraints.txt"
    constraints.write_text(f"torch=={torch}\n")
    run(pip(inside, "-c", str(constraints), "-e", f"{ROOT}[{EXTRAS}]"))
    if not succeeds([inside, "-c", "import mooncake.engine"]):
        raise SetupError("the Transfer Engine is installed but does not load; .venv/bin/moe-a2a doctor says why")


def bring_etcd(venv: Path) -> None:
    """Put etcd's program into .venv for the tests, unless there is one. It is unpacked from Debian's package and not
    installed: the package would start a service. Without it those tests are skipped, and say so."""
    if shutil.which("etcd") or (venv / ETCD).exists() or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return
    with tempfile.TemporaryDirectory() as folder:
        download = ["sh", "-c", f"cd {shlex.quote(folder)} && apt-get download -qq etcd-server"]
        if not succeeds(download) and is_root():
            subprocess.call(["apt-get", "update", "-qq"], stdout=subprocess.DEVNULL)
            succeeds(download)
        found = glob.glob(f"{folder}/*.deb")
        if not found or not succeeds(["dpkg-deb", "-x", found[0], str(venv / ETCD.parts[0])]):
            say("Debian's etcd-server cannot be had; tests of etcd will be skipped")


def stamp_key(python: str) -> str:
    digest = hashlib.sha256()
    for file in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(file.read_bytes())
    digest.update(f"{python_version(python)}\n{ROOT}".encode())
    return digest.hexdigest()


def main() -> int:
    venv = ROOT / ".venv"
    stamp = venv / "setup-stamp"
    try:
        check_machine()
        python = choose_python()
        key = stamp_key(python)
        if stamp.is_file() and stamp.read_text() == key and (venv / "bin" / "python").exists():
            return 0
        install_system_libraries()
        inside = ensure_venv(python, venv)
        ensure_torch(inside)
        install_package(inside)
        bring_etcd(venv)
        stamp.write_text(key)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    say("ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
