"""Starting and ending SGLang servers for bench/sglang_server.py: nothing may outlive it, and nothing may hang it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
_MARK = "MOE_A2A_BENCH_SERVER"
_ACTIVE = {"moe-a2a": "serves --moe-a2a-backend mooncake", "oracle": "the oracle dispatcher is in place"}
_TIMINGS = {
    "scheduler": r"Engine startup timings.*scheduler_e2e=([0-9.]+)",
    "graphs": r"Capture target decode CUDA graph end. elapsed=([0-9.]+) s",
    "plug_in": r"moe-a2a .*in flight, set up in ([0-9.]+) s",
    "decode_buffers": r"moe-a2a: buffers for decode .* made in ([0-9.]+) s",
    "prefill_buffers": r"moe-a2a: buffers for prefill .* made in ([0-9.]+) s",
}


class ServerFailed(Exception):
    """A server that did not start, died, or refused a request."""


def make_site(folder: Path) -> Path:
    """A folder for PYTHONPATH with this package and the oracle, installed as far as entry points go.

    Not the repository itself: its folder `kernels` would hide the package of that name that transformers looks for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in {"moe_a2a": ROOT / "moe_a2a", "sglang_oracle.py": ROOT / "bench" / "sglang_oracle.py"}.items():
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(target)
    for name, entry in {
        "moe_a2a": "moe_a2a.sglang_plugin:register",
        "moe_a2a_oracle": "sglang_oracle:register",
    }.items():
        info = folder / f"{name}-0.1.0.dist-info"
        info.mkdir(exist_ok=True)
        dashed = name.replace("_", "-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dashed}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{dashed} = {entry}\n")
    return folder


class Server:
    """One SGLang server, or router, in a session of its own, its output in a file. A context manager: leaving it ends
    it."""

    running: ClassVar[set[Server]] = set()

    def __init__(
        self, flags: list[str], env: dict[str, str], log: Path, port: int, module: str = "sglang.launch_server"
    ) -> None:
        self.log, self.port = log, port
        self._mark = f"{os.getpid()}-{log.stem}-{time.time_ns()}"
        command = [sys.executable, "-u", "-m", module, *flags, "--port", str(port)]
        environment = {**os.environ, **env, _MARK: self._mark}
        with log.open("wb") as file:
            file.write((" ".join(command) + "\n").encode())
            file.flush()
            self.begin = time.monotonic()
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def __enter__(self) -> Server:
        Server.running.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait(self, timeout: float) -> float:
        """Wait for the server to answer; returns the seconds since its start. Raises ServerFailed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            # Not /health, which generates a token. SGLang answers nothing before its schedulers are ready.
            with contextlib.suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/get_model_info", timeout=5).close()
                return time.monotonic() - self.begin
            time.sleep(0.5)
        raise ServerFailed(f"not ready after {time.monotonic() - self.begin:.0f} s")

    def check(self) -> None:
        """Raises ServerFailed if the server has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerFailed(f"ended with {code}")

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        """One request; returns its JSON. Raises ServerFailed."""
        try:
            return json.loads(self.ask(path, body, timeout))
        except json.JSONDecodeError as error:
            raise ServerFailed(f"{path}: {error}") from error

    def ask(self, path: str, body: dict[str, Any], timeout: float) -> bytes:
        """One request; returns what came. Raises ServerFailed."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=max(1.0, timeout)) as reply:
                answer: bytes = reply.read()
                return answer
        except (urllib.error.URLError, OSError) as error:
            text = error.read().decode(errors="replace")[:2000] if isinstance(error, urllib.error.HTTPError) else ""
            raise ServerFailed(f"{path}: {error} {text}") from error

    def says(self, variant: str) -> bool:
        """Whether the log has the line that a variant's plug-in writes when it is in place."""
        wanted = _ACTIVE.get(variant)
        text = self.log.read_text(errors="replace")
        if wanted is None:
            return not any(line in text for line in _ACTIVE.values())
        return wanted in text

    def timings(self) -> dict[str, float]:
        """What SGLang says of its start-up, and this package of its part of it, in seconds; the slowest of each."""
        text = self.log.read_text(errors="replace")
        found: dict[str, float] = {}
        for name, pattern in _TIMINGS.items():
            seconds = [float(value) for value in re.findall(pattern, text)]
            if seconds:
                found[name] = max(seconds)
        return found

    def tail(self, size: int = 6000) -> str:
        data = self.log.read_bytes()
        return data[-size:].decode(errors="replace")

    def end(self) -> None:
        """End every process of the server, at once, and wait until they are gone. Threads that wait for an answer get
        an error."""
        Server.running.discard(self)
        for _ in range(40):
            left = self._processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            if not left:
                return
            time.sleep(0.25)

    @classmethod
    def end_all(cls) -> None:
        for server in list(cls.running):
            server.end()

    def _processes(self) -> list[int]:
        """Processes that have this server's mark in their environment: its children of any session."""
        wanted = f"{_MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if wanted in (entry / "environ").read_bytes() and b"\nState:\tZ" not in (entry / "status").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found
