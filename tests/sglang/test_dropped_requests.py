"""Why streams are cut at high concurrency, and that what recipes set avoids it (docs/troubleshooting.md).

sglang-router as it is, in front of two HTTP servers without a model; the requests are made with aiohttp, as SGLang's
benchmark client makes them: a session for each.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import operators
import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")
pytest.importorskip("sglang_router", reason="sglang-router is not installed: make test-sglang")

import aiohttp

from moe_a2a.recipes.servers import REQUEST_SECONDS

pytestmark = pytest.mark.timeout(600)  # the small router tries to import SGLang, which takes its time
STAND_IN = Path(__file__).parent.parent / "serving_stand_in.py"
ROUTER = operators.PROGRAM + "import runpy; runpy.run_module('sglang_router.launch_router', run_name='__main__')"
CUT = "TransferEncodingError"
LONG = ["--request-timeout-secs", str(REQUEST_SECONDS)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def routed(log: Path, files: int, *options: str) -> Iterator[str]:
    """A router with so many open files between a prefill and a decode server; its URL."""
    ports = [free_port() for _ in range(3)]
    servers = [
        [sys.executable, str(STAND_IN), "--port", str(port), "--mode", mode]
        for port, mode in zip(ports, ("prefill", "decode"), strict=False)
    ]
    prefill, decode, url = (f"http://127.0.0.1:{port}" for port in ports)
    router = [sys.executable, "-c", ROUTER, "--pd-disaggregation", "--host", "127.0.0.1", "--port", str(ports[2])]
    router += ["--prefill", prefill, "8998", "--decode", decode, *options]
    with contextlib.ExitStack() as running, log.open("wb") as output:
        for command in servers:
            running.enter_context(terminated(subprocess.Popen(command, stdout=subprocess.DEVNULL)))
        limit = (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        process = subprocess.Popen(
            router,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
        )
        running.enter_context(terminated(process))
        deadline = time.monotonic() + 120
        while asyncio.run(outcomes(url, requests=1, concurrency=1, tokens=2)) != {"ok": 1}:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url


@contextlib.contextmanager
def terminated(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def outcomes(url: str, requests: int, concurrency: int, tokens: int) -> dict[str, int]:
    """How streamed requests ended: "ok", CUT, a status, or another error."""
    body = {"text": "a a", "stream": True, "sampling_params": {"max_new_tokens": tokens}}
    turn = asyncio.Semaphore(concurrency)

    async def one() -> str:
        async with turn, aiohttp.ClientSession() as session:
            try:
                async with session.post(f"{url}/generate", json=body) as answer:
                    content = await answer.read()
            except aiohttp.ClientError as error:
                return CUT if CUT in str(error) else type(error).__name__
            return "ok" if answer.status == 200 and b"[DONE]" in content else str(answer.status)

    return dict(collections.Counter(await asyncio.gather(*(one() for _ in range(requests)))))


def test_the_small_router_cuts_streams_when_it_is_out_of_open_files(tmp_path: Path) -> None:
    with routed(tmp_path / "log", 128, "--mini-lb") as url:
        found = asyncio.run(outcomes(url, requests=100, concurrency=100, tokens=300))
    assert found[CUT] > 10, found
    assert "Too many open files" in (tmp_path / "log").read_text()
    with routed(tmp_path / "log", 1024, "--mini-lb") as url:
        assert asyncio.run(outcomes(url, requests=100, concurrency=100, tokens=300)) == {"ok": 100}


def test_the_router_cuts_streams_that_last_longer_than_its_timeout(tmp_path: Path) -> None:
    with routed(tmp_path / "log", 1024, "--request-timeout-secs", "1") as url:
        assert asyncio.run(outcomes(url, requests=20, concurrency=20, tokens=3000)) == {CUT: 20}
    with routed(tmp_path / "log", 1024, *LONG) as url:
        assert asyncio.run(outcomes(url, requests=20, concurrency=20, tokens=3000)) == {"ok": 20}
