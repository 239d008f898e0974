"""Stores for tests: a TCPStore in its process, and Debian's etcd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from moe_a2a.chaos.network import listener
from moe_a2a.membership.store import open_store, split_url
from moe_a2a.membership.store_process import start_store

# The one that `make test` puts into .venv, else one that is installed.
ETCD = shutil.which("etcd", path=f"{Path(sys.prefix) / 'etcd' / 'usr' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")


def serving(url: str) -> int:
    """The process that listens on a store's port."""
    return listener(split_url(url)[2])


def gone(pid: int, within_s: float) -> bool:
    """Whether a process ends within so many seconds."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def tcp(idle_s: float = 3.0) -> Iterator[str]:
    url = start_store(idle_s=idle_s)
    try:
        yield url
    finally:
        with contextlib.suppress(LookupError, ProcessLookupError):
            os.kill(serving(url), signal.SIGKILL)


class Etcd:
    """An etcd of one's own. url: for `open_store`."""

    def __init__(self, folder: Path, flags: Sequence[str] = (), tls: bool = False) -> None:
        if ETCD is None:
            pytest.skip("no etcd here: make setup brings it, or apt-get install etcd-server")
        ports = []
        for _ in range(2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                ports.append(probe.getsockname()[1])
        scheme = "https" if tls else "http"
        client, peer = f"{scheme}://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        self.url = f"etcd{'s' if tls else ''}://127.0.0.1:{ports[0]}"
        self.client_url = client
        self._command = [
            *(ETCD, "--data-dir", str(folder / "data"), "--name", "one"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}"),
            *flags,
        ]
        self._log = (folder / "etcd.log").open("ab")
        self._port = ports[0]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._log.close()


def wait_until_it_answers(url: str, group: str = "probe") -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            open_store(url, group).close()
            return
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
