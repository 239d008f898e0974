"""Hosts as network namespaces of this machine: each with an address of its own, joined by a bridge, and cut off from it
at will. Needs root and the `ip` program (iproute2)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from moe_a2a.errors import MoeA2AError

_NEWNET = 0x40000000
_FOLDER = "/var/run/netns"
_STORE = 254
_libc = ctypes.CDLL(None, use_errno=True)


def enter(name: str) -> None:
    """Move this thread, and those that it starts, into a namespace."""
    _set(f"{_FOLDER}/{name}")


def _set(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _NEWNET) != 0:
            raise MoeA2AError(f"cannot enter {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """For the length of the block, this thread is in a namespace ("": where it is)."""
    if not name:
        yield
        return
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(name)
        try:
            yield
        finally:
            _libc.setns(here, _NEWNET)
    finally:
        os.close(here)


def why_not() -> str:
    """Why this machine or user cannot have such hosts; "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the ip program (iproute2), which is not installed"
    try:
        Network(1).close()
    except MoeA2AError as error:
        return str(error)
    return ""


class Network:
    """Host i is at `address(i)`, in namespace `name(i)`; the store is on a machine of its own, number `store`.

    Raises MoeA2AError if the kernel has no namespaces, veth or bridge for this process.
    """

    def __init__(self, hosts: int) -> None:
        self._prefix = f"moea2a{os.getpid()}"
        self._hub = f"{self._prefix}-hub"
        self.store = hosts
        self._numbers = range(hosts + 1)
        self._made: list[str] = []
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        self._add(self._hub)
        self._in(self._hub, "link add br0 type bridge", "link set br0 up")
        for number in self._numbers:
            name = self.name(number)
            self._add(name)
            self._in(
                name,
                "link set lo up",
                f"link add eth0 type veth peer name port{number} netns {self._hub}",
                f"address add {self.address(number)}/24 dev eth0",
                "link set eth0 up",
            )
            self._in(self._hub, f"link set port{number} master br0 up")

    def name(self, number: int) -> str:
        return f"{self._prefix}-{number}"

    def address(self, number: int) -> str:
        return f"10.231.0.{_STORE if number == self.store else number + 1}"

    def cut(self, number: int, silent: bool) -> None:
        """Cut a host off. silent: what it sends is dropped; else it sees that its link is down."""
        self._link(number, silent, "down")

    def heal(self, number: int, silent: bool) -> None:
        self._link(number, silent, "up")

    def part(self, numbers: tuple[int, ...], apart: bool) -> None:
        """These hosts no longer reach each other, and reach all others; or they do again."""
        how = "on" if apart else "off"
        self._in(self._hub, *(f"link set port{number} type bridge_slave isolated {how}" for number in numbers))

    def _link(self, number: int, silent: bool, state: str) -> None:
        if silent:
            self._in(self._hub, f"link set port{number} {state}")
        else:
            self._in(self.name(number), f"link set eth0 {state}")

    def _add(self, name: str) -> None:
        _ip(["netns", "add", name])
        self._made.append(name)

    def _in(self, name: str, *commands: str) -> None:
        _ip(["-n", name, "-batch", "-"], "\n".join(commands))

    def close(self) -> None:
        for name in self._made:
            with contextlib.suppress(MoeA2AError):
                _ip(["netns", "delete", name])
        self._made = []


def _ip(arguments: list[str], given: str = "") -> None:
    done = subprocess.run(["ip", *arguments], input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MoeA2AError(f"ip {' '.join(arguments)}: {done.stderr.strip()[:300]}")


def listener(port: int) -> int:
    """The process of this machine that listens on a port of this thread's network. Raises LookupError."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/thread-self/net/{table}", encoding="ascii") as lines:
            for fields in (line.split() for line in lines):
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                return int(process.name)
    raise LookupError(f"nobody listens on port {port}")
