"""`moe-a2a doctor`: what this machine can do, what is missing, and the command that mends it.

One small function a check, `(machine) -> Check`. Works without torch and without the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_a2a.libraries import (
    ENGINE_WHEELS,
    MINIMUM_ENGINE,
    SYSTEM_LIBRARIES,
    how_to_get,
    install_engine,
    missing_library,
    replace_engine,
)
from moe_a2a.machine import Machine
from moe_a2a.sglang_plugin import versions

PYTHONS = SpecifierSet(">=3.10,<3.14")
TORCHES = SpecifierSet(">=2.11,<2.15")
INSTALL_TORCH = 'pip install "torch>=2.11,<2.15"'
NEEDED_LIBRARIES = ("libibverbs.so.1", "libnuma.so.1", "libcurl.so.4")

Status = Literal["ok", "missing", "warning", "info"]
STYLES = {"ok": "green", "missing": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Check:
    """One finding.

    status: "ok"; "missing" if CPU ranks cannot run this way; "warning" if something is wrong that CPU ranks can do
    without; "info" if it is only told. fix: the command that mends it, if there is one.
    """

    name: str
    status: Status
    detail: str
    fix: str | None = None


def check_machine(machine: Machine) -> Check:
    system, processor = machine.system()
    detail = f"{system} on {processor}, {machine.cores()} cores, {machine.memory() / 2**30:.1f} GiB of memory"
    if system == "Linux" and processor in ("x86_64", "AMD64"):
        return Check("machine", "ok", detail)
    # Flags between CPU ranks are plain 8-byte stores, which x86-64 keeps in order; other processors would need fences.
    return Check("machine", "missing", f"{detail}; CPU ranks need Linux on x86-64")


def check_python(machine: Machine) -> Check:
    version = ".".join(map(str, machine.python_version()))
    if version in PYTHONS:
        return Check("python", "ok", version)
    return Check("python", "missing", f"{version}; 3.10 to 3.13 are supported", "make PYTHON=python3.12 setup")


_TORCH_CODE = """
import json, torch
n = torch.cuda.device_count() if torch.cuda.is_available() else 0
peers = [[i != j and torch.cuda.can_device_access_peer(i, j) for j in range(n)] for i in range(n)]
names = [torch.cuda.get_device_name(i) for i in range(n)]
memory = [torch.cuda.get_device_properties(i).total_memory for i in range(n)]
print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip,
                      names=names, memory=memory, peers=peers)))
"""


def _gpu_checks(machine: Machine, found: dict[str, object]) -> list[Check]:
    names, memory, peers = found["names"], found["memory"], found["peers"]
    assert isinstance(names, list) and isinstance(memory, list) and isinstance(peers, list)
    if not names:
        if not machine.entries("/proc/driver/nvidia/gpus"):
            return [Check("GPUs", "info", "none; CPU ranks need none")]
        detail = "the driver is there, but this torch sees none: a CPU build, or one for a newer driver"
        return [Check("GPUs", "warning", detail, f"pip uninstall -y torch && {INSTALL_TORCH}")]
    listed = ", ".join(
        f"{i}: {name} ({size / 2**30:.0f} GiB)" for i, (name, size) in enumerate(zip(names, memory, strict=True))
    )
    checks = [Check("GPUs", "ok", f"{listed}; GPU ranks of one host, masked layout")]
    if len(names) > 1:
        apart = [f"{i}-{j}" for i in range(len(names)) for j in range(i) if not (peers[i][j] and peers[j][i])]
        links = "; ".join(_link_rows(machine.run("nvidia-smi", "topo", "-m", timeout_s=30).output))
        detail = f"no peer access between {', '.join(apart)}" if apart else "each GPU can access each other's memory"
        checks.append(Check("GPU links", "warning" if apart else "ok", f"{detail}; {links}" if links else detail))
    return checks


def _link_rows(topology: str) -> list[str]:
    """The GPU columns of `nvidia-smi topo -m`: ["GPU0 X NV18", "GPU1 NV18 X"]."""
    rows = [line.split() for line in topology.splitlines() if line.startswith("GPU")]
    return [" ".join(row[: len(rows) + 1]) for row in rows if len(row) > len(rows)]


def check_torch(machine: Machine) -> tuple[list[Check], str]:
    """The checks of torch and of the GPUs it sees, and the extra of moe-a2a that suits it."""
    outcome = machine.run_python(_TORCH_CODE)
    if outcome.code != 0:
        installed = machine.version("torch")
        problem = f"{installed} does not load: {outcome.reason}" if installed else "not installed"
        return [Check("torch", "missing", problem, INSTALL_TORCH)], "cpu"
    found = json.loads(outcome.output.strip().splitlines()[-1])
    build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPU build"
    detail = f"{found['version']}, {build}"
    if Version(Version(found["version"]).public) in TORCHES:
        torch = Check("torch", "ok", detail)
    else:
        torch = Check("torch", "warning", f"{detail}; tested from 2.11 to 2.14", INSTALL_TORCH)
    extra = {"12": "cuda12", "13": "cuda13"}.get((found["cuda"] or "").split(".")[0], "cpu")
    return [torch, *_gpu_checks(machine, found)], extra


def check_triton(machine: Machine) -> Check:
    version = machine.version("triton")
    if version:
        return Check("triton", "ok", version)
    return Check("triton", "info", "not installed; CPU ranks need none, and torch's CUDA builds bring it")


def check_engine_wheel(machine: Machine, extra: str = "cpu") -> Check:
    """Which wheel of the Transfer Engine is installed. extra: the one that suits torch."""
    found = {name: version for name in ENGINE_WHEELS if (version := machine.version(name))}
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        detail = f"none of {', '.join(ENGINE_WHEELS)}; ranks on several hosts need one"
        return Check("engine wheel", "missing", detail, install_engine(extra))
    if len(found) > 1:
        detail = f"{listed}: they overwrite each other's files; keep one"
        return Check("engine wheel", "warning", detail, replace_engine(extra))
    name, version = next(iter(found.items()))
    if Version(version) < Version(MINIMUM_ENGINE):
        detail = f"{listed} is too old: {MINIMUM_ENGINE} is the first that acknowledges TCP writes"
        return Check("engine wheel", "missing", detail, f'pip install "{name}>={MINIMUM_ENGINE}"')
    return Check("engine wheel", "ok", listed)


# With torch first, as in the library: a CUDA wheel may find CUDA's runtime through it.
_ENGINE_CODE = """
try:
    import torch
except Exception:
    pass
import mooncake.engine
"""


def _missing_libraries(machine: Machine) -> list[str]:
    return [library for library in NEEDED_LIBRARIES if not machine.loads(library)]


def _install_libraries(libraries: Sequence[str]) -> str:
    return "apt-get install -y " + " ".join(SYSTEM_LIBRARIES[library] for library in libraries)


def check_engine(machine: Machine, extra: str = "cpu") -> Check:
    outcome = machine.run_python(_ENGINE_CODE)
    if outcome.code == 0:
        return Check("engine", "ok", "loads")
    library = missing_library(outcome.errors)
    if library in NEEDED_LIBRARIES:  # the loader names the first only; one command is to bring all
        fix = _install_libraries(_missing_libraries(machine) or [library])
        return Check("engine", "missing", f"does not load: {library} is missing", fix)
    if library:
        return Check("engine", "missing", f"does not load: {library} is missing", how_to_get(library, extra))
    if "No module named 'mooncake'" in outcome.errors:
        return Check("engine", "missing", "not installed", install_engine(extra))
    return Check("engine", "missing", f"does not load: {outcome.reason}", replace_engine(extra))


def check_system_libraries(machine: Machine) -> Check:
    missing = _missing_libraries(machine)
    if not missing:
        return Check("libibverbs", "ok", ", ".join(NEEDED_LIBRARIES))
    detail = f"{', '.join(missing)} not found; the engine links to these, even for TCP"
    return Check("libibverbs", "missing", detail, _install_libraries(missing))


def check_rdma(machine: Machine) -> Check:
    folder = "/sys/class/infiniband"
    devices = machine.entries(folder)
    if not devices:
        return Check("RDMA devices", "info", "none; hosts talk TCP")
    states = {device: machine.read(f"{folder}/{device}/ports/1/state") or "state unknown" for device in devices}
    detail = ", ".join(f"{device} ({state})" for device, state in states.items())
    if not machine.loads("libmlx5.so.1"):
        return Check("RDMA devices", "warning", f"{detail}; no drivers", "apt-get install -y ibverbs-providers")
    limit = machine.lockable_memory()
    if limit is not None:
        detail += f"; only {limit / 2**20:.0f} MiB may be locked, and RDMA locks the communication buffers"
        return Check("RDMA devices", "warning", detail, "ulimit -l unlimited")
    return Check("RDMA devices", "ok", detail)


def check_environment(machine: Machine) -> Check:
    """The engine's own environment variables."""
    own = {name: value for name, value in machine.environment.items() if name.startswith("MC_")}
    if own.get("MC_TCP_PROTO") == "1":
        detail = "MC_TCP_PROTO=1 turns off acknowledged TCP writes; refused, rows could be read before they are there"
        return Check("environment", "missing", detail, "unset MC_TCP_PROTO")
    listed = ", ".join(f"{name}={'***' if 'PASSWORD' in name else value}" for name, value in sorted(own.items()))
    if "MC_FORCE_TCP" in own:
        return Check("environment", "warning", f"{listed}: protocol='rdma' would go over TCP", "unset MC_FORCE_TCP")
    return Check("environment", "info", listed or "no MC_* variable is set")


def check_memfd(machine: Machine) -> Check:
    if machine.can_share_memory():
        return Check("memfd", "ok", "ranks of one host can share memory")
    return Check("memfd", "missing", "memfd_create is refused here: an old kernel, or a container's seccomp profile")


def check_pidfd(machine: Machine) -> Check:
    if machine.can_watch_processes():
        return Check("pidfd", "ok", "the death of a rank is seen at once")
    return Check("pidfd", "warning", "pidfd_open is refused here: the death of a rank is seen by time-out only")


def check_sglang(machine: Machine) -> Check:
    version = machine.version("sglang")
    if version is None:
        return Check("SGLang", "info", "not installed")
    if versions.supported(version):
        return Check("SGLang", "ok", version)
    oldest, newest = versions.OLDEST, versions.NEWEST
    fix = f'pip install "sglang>={oldest},<={newest}"'
    return Check("SGLang", "warning", f"{version}; known are {oldest} to {newest}", fix)


def check_plugin(machine: Machine) -> Check:
    names = [name for name, source in machine.entry_points("sglang.srt.plugins").items() if source == "moe-a2a"]
    if names:
        return Check("SGLang plug-in", "ok", f"entry point {', '.join(names)}")
    return Check("SGLang plug-in", "info", "SGLang does not see this copy: it was not installed by pip")


def examine(machine: Machine) -> list[Check]:
    """All checks, in the order of the table."""
    torch, extra = check_torch(machine)
    rest: Sequence[Callable[[Machine], Check]] = (
        check_system_libraries,
        check_rdma,
        check_environment,
        check_memfd,
        check_pidfd,
        check_sglang,
        check_plugin,
    )
    engine = [check_engine_wheel(machine, extra), check_engine(machine, extra)]
    first = [check_machine(machine), check_python(machine), *torch, check_triton(machine), *engine]
    return first + [check(machine) for check in rest]


def ready(checks: Sequence[Check]) -> bool:
    """Whether CPU ranks can run."""
    return all(check.status != "missing" for check in checks)


def as_json(checks: Sequence[Check]) -> str:
    """{"checks": [{"name", "status", "detail", "fix"}], "ok": bool}."""
    return json.dumps({"checks": [asdict(check) for check in checks], "ok": ready(checks)}, indent=2)


def show(checks: Sequence[Check], console: Console) -> None:
    """Print the table, then the commands: apart and unwrapped, so that they can be copied."""
    table = Table()
    for title in ("check", "status", "found"):
        table.add_column(title, no_wrap=title != "found", overflow="fold")
    for check in checks:
        table.add_row(Text(check.name), Text(check.status, STYLES[check.status]), Text(check.detail))
    console.print(table)
    for fix in dict.fromkeys(check.fix for check in checks if check.fix):
        names = ", ".join(check.name for check in checks if check.fix == fix)
        console.print(Text(f"To mend {names}: {fix}"), soft_wrap=True)
    missing = [check.name for check in checks if check.status == "missing"]
    verdict = f"CPU ranks are not ready here: {', '.join(missing)}" if missing else "CPU ranks are ready here."
    console.print(Text(verdict, "bold red" if missing else "bold green"), soft_wrap=True)
