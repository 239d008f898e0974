"""tools/setup.py: what `make run` and `make test` do before anything else. Nothing here installs anything."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from moe_a2a.doctor import NEEDED_LIBRARIES
from moe_a2a.libraries import SYSTEM_LIBRARIES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, working on a tree of its own."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "tools" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.fixture
def calls(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command succeeds without being run; installing packages makes the libraries appear."""
    seen: list[list[str]] = []

    def call(command: list[str], **_: object) -> int:
        seen.append(command)
        if command[:2] == ["apt-get", "install"]:
            monkeypatch.setattr(script, "loadable", lambda library: True)
        return 0

    monkeypatch.setattr(script.subprocess, "call", call)
    monkeypatch.setattr(script, "output", lambda command: "2.13.0+cpu")
    monkeypatch.setattr(script, "succeeds", lambda command: "import torch" not in command)
    monkeypatch.setattr(script, "providers_present", lambda: True)
    monkeypatch.setattr(script, "loadable", lambda library: True)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    return seen


def test_as_root_apt_brings_the_missing_libraries(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.os, "geteuid", lambda: 0)
    monkeypatch.setattr(script, "loadable", lambda library: library != "libibverbs.so.1")
    monkeypatch.setattr(script, "providers_present", lambda: False)
    script.install_system_libraries()
    assert [call[:2] for call in calls] == [["apt-get", "update"], ["apt-get", "install"]]
    assert calls[1][-2:] == ["libibverbs1", "ibverbs-providers"]


def test_without_root_one_line_says_what_to_install(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(script, "loadable", lambda library: library != "libibverbs.so.1")
    monkeypatch.setattr(script, "providers_present", lambda: False)
    assert script.main() == 1
    assert calls == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("sudo apt-get install -y libibverbs1 ibverbs-providers")
    assert "libibverbs.so.1" in line


def test_without_root_absent_rdma_drivers_do_not_stop_it(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(script, "providers_present", lambda: False)
    assert script.main() == 0
    assert "sudo apt-get install -y ibverbs-providers" in capsys.readouterr().out


def test_a_library_that_apt_did_not_bring_is_named(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.os, "geteuid", lambda: 0)
    monkeypatch.setattr(script, "missing_libraries", lambda: ["libnuma.so.1"])
    assert script.main() == 1
    assert "libnuma.so.1 still not found" in capsys.readouterr().err


def test_a_second_call_does_nothing_until_pyproject_changes(
    script: ModuleType, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main() == 0
    assert calls
    calls.clear()
    capsys.readouterr()
    assert script.main() == 0
    assert calls == []
    assert capsys.readouterr().out == ""
    with (script.ROOT / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert script.main() == 0
    assert calls


def test_a_set_up_that_failed_is_tried_again(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install = script.install_package

    def fail(inside: str) -> None:
        raise script.SetupError("no network")

    monkeypatch.setattr(script, "install_package", fail)
    assert script.main() == 1
    assert capsys.readouterr().err == "setup: no network\n"
    monkeypatch.setattr(script, "install_package", install)
    assert script.main() == 0


def test_torch_is_asked_for_as_a_cpu_build_first(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probes: list[list[str]] = []

    def succeeds(command: list[str]) -> bool:
        probes.append(command)
        return "--torch-backend=cpu" in command

    monkeypatch.setattr(script, "succeeds", succeeds)
    script.ensure_torch("/venv/bin/python")
    assert probes[-1][-2:] == ["--torch-backend=cpu", "torch>=2.11,<2.15"]
    assert [call[-1] for call in calls] == ["uv"]

    monkeypatch.setattr(script, "succeeds", lambda command: False)
    script.ensure_torch("/venv/bin/python")
    assert calls[-1][-1] == "torch==2.13.0"
    assert "cannot be reached; taking torch==2.13.0" in capsys.readouterr().out


def test_an_installed_torch_stays(script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "succeeds", lambda command: True)
    assert script.main() == 0
    (install,) = [call for call in calls if "pip" in call]
    constraints = Path(install[install.index("-c") + 1])
    assert constraints.read_text() == "torch==2.13.0+cpu\n"
    assert install[-1] == f"{script.ROOT}[cpu,plot,demo,test]"


def test_an_engine_that_does_not_load_is_told(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "succeeds", lambda command: "import mooncake.engine" not in command)
    assert script.main() == 1
    assert "moe-a2a doctor" in capsys.readouterr().err


def test_a_missing_venv_module_names_its_package(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(script, "succeeds", lambda command: False)
    monkeypatch.setattr(script, "output", lambda command: "3.12.3")
    with pytest.raises(script.SetupError, match=r"sudo apt-get install -y python3\.12-venv"):
        script.ensure_venv_module("/usr/bin/python3")
    assert calls == []


def test_an_unsupported_python_looks_for_a_supported_one(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.sys, "version_info", (3, 14, 0))
    monkeypatch.setattr(script.shutil, "which", lambda name: "/opt/python3.12" if name == "python3.12" else None)
    monkeypatch.setattr(script, "succeeds", lambda command: True)
    assert script.choose_python() == "/opt/python3.12"
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(script.SetupError, match=r"3\.10 to 3\.13 are supported"):
        script.choose_python()


def test_another_processor_is_refused(
    script: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.platform, "machine", lambda: "aarch64")
    assert script.main() == 1
    assert calls == []
    assert "need Linux on x86-64" in capsys.readouterr().err


def test_the_script_and_doctor_know_the_same_libraries(script: ModuleType) -> None:
    assert {library: SYSTEM_LIBRARIES[library] for library in NEEDED_LIBRARIES} == script.SYSTEM_LIBRARIES


def test_make_help_lists_the_targets() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listed.splitlines()} >= {"run", "test", "setup", "format", "bench", "clean"}


def test_make_names_an_interpreter_that_is_not_there() -> None:
    result = subprocess.run(
        ["make", "setup", "PYTHON=no-such-python"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "no-such-python is not on PATH" in result.stderr


def test_etcd_is_unpacked_into_the_environment_and_not_installed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def succeeds(command: list[str]) -> bool:
        seen.append(command)
        if command[0] == "sh":
            (Path(shlex.split(command[2])[1]) / "etcd-server_1_amd64.deb").touch()
        return True

    monkeypatch.setattr(script, "succeeds", succeeds)
    monkeypatch.setattr(script.shutil, "which", lambda name: None if name == "etcd" else f"/usr/bin/{name}")
    script.bring_etcd(tmp_path)
    assert seen[0][2].endswith("apt-get download -qq etcd-server")
    assert seen[1][:2] == ["dpkg-deb", "-x"] and seen[1][3] == str(tmp_path / "etcd")
    (tmp_path / script.ETCD).parent.mkdir(parents=True)
    (tmp_path / script.ETCD).touch()
    seen.clear()
    script.bring_etcd(tmp_path)
    assert seen == []


def test_without_etcd_the_set_up_goes_on(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "succeeds", lambda command: False)
    monkeypatch.setattr(script.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(script.shutil, "which", lambda name: None if name == "etcd" else f"/usr/bin/{name}")
    script.bring_etcd(tmp_path)
    assert "tests of etcd will be skipped" in capsys.readouterr().out
