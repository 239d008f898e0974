"""`moe-a2a doctor` tells what is there, what is missing, and the command that mends it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from moe_a2a import cli, doctor
from moe_a2a.doctor import Check
from moe_a2a.libraries import ENGINE_WHEELS
from moe_a2a.machine import Machine, Outcome

CPU_TORCH: dict[str, object] = {
    "version": "2.13.0+cpu",
    "cuda": None,
    "hip": None,
    "names": [],
    "memory": [],
    "peers": [],
}
CPU_WHEEL, CUDA12_WHEEL, CUDA13_WHEEL = ENGINE_WHEELS


class FakeMachine(Machine):
    """A healthy machine with CPU torch and the engine's CPU wheel; tests change its fields."""

    def __init__(self) -> None:
        self.platform = ("Linux", "x86_64")
        self.python = (3, 12, 1)
        self.versions = {"torch": "2.13.0+cpu", CPU_WHEEL: "0.3.13.post1"}
        self.torch: dict[str, object] | None = dict(CPU_TORCH)
        self.engine_error: str | None = None
        self.engine_code = 1
        self.absent: set[str] = set()
        self.variables: dict[str, str] = {}
        self.folders: dict[str, list[str]] = {}
        self.lockable: int | None = None
        self.memfd = True
        self.topology = ""
        self.points: dict[str, str] = {}

    @property
    def environment(self) -> Mapping[str, str]:
        return self.variables

    def system(self) -> tuple[str, str]:
        return self.platform

    def python_version(self) -> tuple[int, int, int]:
        return self.python

    def lockable_memory(self) -> int | None:
        return self.lockable

    def version(self, distribution: str) -> str | None:
        return self.versions.get(distribution)

    def entry_points(self, group: str) -> dict[str, str]:
        return self.points

    def loads(self, library: str) -> bool:
        return library not in self.absent

    def entries(self, folder: str) -> list[str]:
        return self.folders.get(folder, [])

    def read(self, file: str) -> str:
        return "4: ACTIVE"

    def can_share_memory(self) -> bool:
        return self.memfd

    def run(self, *command: str, timeout_s: float = 120) -> Outcome:
        return Outcome(0, self.topology, "")

    def run_python(self, code: str) -> Outcome:
        if "mooncake" in code:
            return Outcome(0, "", "") if self.engine_error is None else Outcome(self.engine_code, "", self.engine_error)
        if self.torch is None:
            return Outcome(1, "", "ModuleNotFoundError: No module named 'torch'")
        return Outcome(0, "a line that torch printed\n" + json.dumps(self.torch) + "\n", "")


def examined(change: Callable[[FakeMachine], object]) -> dict[str, Check]:
    machine = FakeMachine()
    change(machine)
    return {check.name: check for check in doctor.examine(machine)}


def test_a_healthy_cpu_machine_needs_nothing() -> None:
    checks = doctor.examine(FakeMachine())
    assert doctor.ready(checks)
    assert [check for check in checks if check.status in ("missing", "warning")] == []
    assert [check for check in checks if check.fix] == []
    assert {check.name for check in checks} >= {"torch", "triton", "engine", "RDMA devices", "SGLang", "SGLang plug-in"}


def set_field(name: str, value: object) -> Callable[[FakeMachine], None]:
    return lambda machine: setattr(machine, name, value)


@pytest.mark.parametrize(
    ("change", "name", "detail", "fix"),
    [
        (set_field("absent", {"libibverbs.so.1"}), "libibverbs", "libibverbs.so.1", "apt-get install -y libibverbs1"),
        (set_field("absent", {"libnuma.so.1", "libcurl.so.4"}), "libibverbs", "libnuma.so.1", "libnuma1 libcurl4"),
        (
            set_field("versions", {"torch": "2.13.0"}),
            "engine wheel",
            "none of",
            f'pip install "{CPU_WHEEL}>=0.3.13.post1"',
        ),
        (
            set_field("versions", {CPU_WHEEL: "0.3.12"}),
            "engine wheel",
            "0.3.13.post1 is the first",
            f'pip install "{CPU_WHEEL}>=0.3.13.post1"',
        ),
        (set_field("variables", {"MC_TCP_PROTO": "1"}), "environment", "MC_TCP_PROTO=1", "unset MC_TCP_PROTO"),
        (set_field("torch", None), "torch", "does not load: ModuleNotFoundError", "pip install"),
        (set_field("python", (3, 9, 2)), "python", "3.10 to 3.13", "PYTHON="),
        (set_field("platform", ("Linux", "aarch64")), "machine", "x86-64", None),
        (set_field("memfd", False), "memfd", "memfd_create", None),
    ],
)
def test_what_cpu_ranks_need_is_missed_and_comes_with_its_mend(
    change: Callable[[FakeMachine], None], name: str, detail: str, fix: str | None
) -> None:
    check = examined(change)[name]
    assert check.status == "missing"
    assert detail in check.detail
    assert (fix is None and check.fix is None) or (fix or "") in (check.fix or "")


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("ImportError: libibverbs.so.1: cannot open shared object file: No such file", "libibverbs1"),
        ("ImportError: libmlx5.so.1: cannot open shared object file: No such file", "ibverbs-providers"),
        (
            "ImportError: libcuda.so.1: cannot open shared object file: No such file",
            f'pip install "{CPU_WHEEL}>=0.3.13.post1"',
        ),
        ("ModuleNotFoundError: No module named 'mooncake'", f'pip install "{CPU_WHEEL}>=0.3.13.post1"'),
    ],
)
def test_an_engine_that_does_not_load_names_the_library_and_its_package(error: str, fix: str) -> None:
    check = examined(set_field("engine_error", error))["engine"]
    assert check.status == "missing"
    assert check.fix is not None
    assert fix in check.fix


def test_an_engine_that_kills_its_process_does_not_kill_doctor() -> None:
    def crash(machine: FakeMachine) -> None:
        machine.engine_error, machine.engine_code = "", -11

    check = examined(crash)["engine"]
    assert check.status == "missing"
    assert "signal 11" in check.detail


def test_the_engine_that_is_proposed_suits_the_installed_cuda() -> None:
    def cuda13(machine: FakeMachine) -> None:
        machine.torch = {
            **CPU_TORCH,
            "version": "2.11.0",
            "cuda": "13.0",
            "names": ["H"],
            "memory": [1],
            "peers": [[0]],
        }
        machine.versions = {"torch": "2.11.0"}

    assert examined(cuda13)["engine wheel"].fix == f'pip install "{CUDA13_WHEEL}>=0.3.13.post1"'


def test_two_engine_wheels_at_once_are_a_warning() -> None:
    check = examined(set_field("versions", {CPU_WHEEL: "0.3.13.post1", CUDA13_WHEEL: "0.3.14"}))["engine wheel"]
    assert check.status == "warning"
    assert check.fix is not None
    assert CUDA12_WHEEL in check.fix


def test_gpus_are_listed_with_their_links() -> None:
    def two_gpus(machine: FakeMachine) -> None:
        peers = [[False, True], [True, False]]
        machine.torch = {**CPU_TORCH, "cuda": "13.0", "names": ["H200", "H200"], "memory": [2**37] * 2, "peers": peers}
        machine.topology = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n"

    checks = examined(two_gpus)
    assert checks["GPUs"].detail.startswith("0: H200 (128 GiB), 1: H200 (128 GiB)")
    assert checks["GPU links"].status == "ok"
    assert "GPU0 X NV18; GPU1 NV18 X" in checks["GPU links"].detail


def test_a_driver_whose_gpus_torch_does_not_see_is_a_warning() -> None:
    check = examined(set_field("folders", {"/proc/driver/nvidia/gpus": ["0000:01:00.0"]}))["GPUs"]
    assert check.status == "warning"
    assert check.fix is not None


def test_rdma_needs_drivers_and_lockable_memory() -> None:
    def device(machine: FakeMachine) -> None:
        machine.folders = {"/sys/class/infiniband": ["mlx5_0"]}

    assert examined(device)["RDMA devices"] == Check("RDMA devices", "ok", "mlx5_0 (4: ACTIVE)")

    def no_drivers(machine: FakeMachine) -> None:
        device(machine)
        machine.absent = {"libmlx5.so.1"}

    assert examined(no_drivers)["RDMA devices"].fix == "apt-get install -y ibverbs-providers"

    def locked(machine: FakeMachine) -> None:
        device(machine)
        machine.lockable = 64 * 2**10

    assert examined(locked)["RDMA devices"].fix == "ulimit -l unlimited"


@pytest.mark.parametrize(
    ("version", "status"), [("0.5.16", "warning"), ("0.5.17", "ok"), ("0.5.23", "ok"), (None, "info")]
)
def test_sglang_is_judged_by_its_version(version: str | None, status: str) -> None:
    def install(machine: FakeMachine) -> None:
        if version:
            machine.versions["sglang"] = version

    assert examined(install)["SGLang"].status == status


def test_a_password_of_the_metadata_server_is_not_printed() -> None:
    check = examined(set_field("variables", {"MC_REDIS_PASSWORD": "hunter2", "MC_USE_IPV6": "1"}))["environment"]
    assert check.detail == "MC_REDIS_PASSWORD=***, MC_USE_IPV6=1"


def test_the_plug_in_is_not_part_of_this_version_unless_its_entry_point_is_there() -> None:
    assert examined(set_field("points", {"other": "another-plug-in"}))["SGLang plug-in"].status == "info"
    assert examined(set_field("points", {"mooncake": "moe-a2a"}))["SGLang plug-in"].status == "ok"


@pytest.mark.parametrize(("absent", "code"), [(set[str](), 0), ({"libibverbs.so.1"}, 1)])
def test_json_and_exit_code(monkeypatch: pytest.MonkeyPatch, absent: set[str], code: int) -> None:
    machine = FakeMachine()
    machine.absent = absent
    monkeypatch.setattr("moe_a2a.machine.Machine", lambda: machine)
    result = CliRunner().invoke(cli.main, ["doctor", "--json"])
    assert result.exit_code == code
    report = json.loads(result.stdout)
    assert report["ok"] is (code == 0)
    assert all(set(check) == {"name", "status", "detail", "fix"} for check in report["checks"])


def test_the_table_gives_each_command_once_on_a_line_of_its_own() -> None:
    machine = FakeMachine()
    machine.absent = {"libibverbs.so.1", "libnuma.so.1"}
    machine.engine_error = "ImportError: libibverbs.so.1: cannot open shared object file: No such file or directory"
    console = Console(file=io.StringIO(), width=60)
    doctor.show(doctor.examine(machine), console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if line.startswith("To mend")] == [
        "To mend engine, libibverbs: apt-get install -y libibverbs1 libnuma1"
    ]
    assert lines[-1] == "CPU ranks are not ready here: engine, libibverbs"


def test_doctor_runs_where_torch_and_the_engine_cannot_be_imported(tmp_path: Path) -> None:
    for name in ("torch", "mooncake"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('this {name} is broken')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "moe_a2a.cli", "doctor", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert "this torch is broken" in found["torch"]["detail"]
    assert "this mooncake is broken" in found["engine"]["detail"]


def test_a_command_that_cannot_be_loaded_sends_to_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli._LAZY, "bench", ("moe_a2a.no_such_module", "bench", "A line of help."))
    assert "A line of help." in CliRunner().invoke(cli.main, ["--help"]).output
    result = CliRunner().invoke(cli.main, ["bench"])
    assert result.exit_code == 1
    assert "moe-a2a doctor" in result.output
