"""The router that recipes start: its own parser takes the command, and it passes a request on as the plan says.

sglang-router runs here as a user starts it, by the rendered script, in front of two small HTTP servers that stand for
prefill and decode servers; the rendered check waits for all three and asks. No model runs.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang_router", reason="sglang-router is not installed: make test-sglang")

import make
import operators
from recipe_plans import plan_of
from sglang_router.launch_router import parse_router_args

from moe_a2a.recipes.plan import Plan
from moe_a2a.recipes.shell import check_script, script

POLICIES = "--prefill-policy random --decode-policy power_of_two --port 9000 --router [2001:db8::9]"
PLANS = [
    *[shlex.join(shlex.split(command)[1:]) for command in make.COMMANDS.values()],
    f"pd --sglang 0.5.20 --model Qwen/Qwen3-32B --prefill [2001:db8::1] --prefill b:2-3 --decode c {POLICIES}",
]


@pytest.mark.parametrize("command", PLANS)
def test_its_parser_takes_the_command(command: str) -> None:
    plan = plan_of(*shlex.split(command))
    assert plan.router.command[:3] == ("python3", "-m", "sglang_router.launch_router")
    args = parse_router_args(list(plan.router.command[3:]))
    args._validate_router_args()
    assert args.pd_disaggregation and args.port == plan.router.port
    assert args.prefill_urls == [(server.url, server.ports["bootstrap"]) for server in plan.of("prefill")]
    assert args.decode_urls == [server.url for server in plan.of("decode")]


class Server(ThreadingHTTPServer):
    """On an IPv4 or an IPv6 address."""

    def __init__(self, host: str, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), handler)


class Stand(BaseHTTPRequestHandler):
    """A server of either role: healthy, and it answers whatever it is asked."""

    seen: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.answer({"status": "ok"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(json.loads(body))
        self.answer({"text": " Paris", "meta_info": {"id": "1"}})

    def answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.bind((address, 0))
        return int(one.getsockname()[1])


@pytest.fixture(params=["127.0.0.1", "::1", "localhost"])
def host(request: pytest.FixtureRequest) -> str:
    """An address of each kind, and a name: the router itself takes addresses only."""
    if ":" in request.param:
        try:
            free_port(request.param)
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
    return str(request.param)


@pytest.fixture
def stands(host: str) -> Iterator[dict[str, ThreadingHTTPServer]]:
    servers = {}
    for role in ("prefill", "decode"):
        servers[role] = Server(host, type(role, (Stand,), {"seen": []}))
        threading.Thread(target=servers[role].serve_forever, daemon=True).start()
    yield servers
    for server in servers.values():
        server.shutdown()


def start(plan: Plan, folder: Path) -> subprocess.Popen[bytes]:
    """The router, by its script, with this Python as python3."""
    (folder / "bin").mkdir()
    python = folder / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')  # not a link: its venv is beside it
    python.chmod(0o755)
    file = folder / "router.sh"
    file.write_text(script(plan.router))
    (folder / "sitecustomize.py").write_text(operators.PROGRAM)  # the router imports SGLang where it is installed
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(paths)}
    with (folder / "router.log").open("wb") as log:
        return subprocess.Popen(["bash", file], cwd=folder, env=environment, stdout=log, stderr=log)


def test_a_request_reaches_both_servers(host: str, stands: dict[str, ThreadingHTTPServer], tmp_path: Path) -> None:
    place = f"[{host}]" if ":" in host else host
    ports = (
        f"--host {place} --port {free_port(host)} --prefill-port {stands['prefill'].server_port} --bootstrap-port 8998"
    )
    words = f"pd-single --sglang 0.5.20 --model Qwen/Qwen3-32B {ports} --decode-port {stands['decode'].server_port}"
    plan = plan_of(*shlex.split(words))
    (tmp_path / "check.sh").write_text(check_script(plan.checks))
    router = start(plan, tmp_path)
    try:
        done = subprocess.run(["bash", tmp_path / "check.sh", "90"], capture_output=True, text=True, timeout=150)
    finally:
        router.kill()  # on SIGTERM it gives requests three minutes
        router.wait()
    log = (tmp_path / "router.log").read_text(errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert "a request goes the whole way" in done.stdout
    (prefill,), (decode,) = (stands[role].RequestHandlerClass.seen for role in ("prefill", "decode"))  # type: ignore[attr-defined]
    assert prefill["text"] == decode["text"] == "The capital of France is"
    for body in (prefill, decode):
        assert (body["bootstrap_host"], body["bootstrap_port"]) == (place, 8998)
    assert prefill["bootstrap_room"] == decode["bootstrap_room"]
