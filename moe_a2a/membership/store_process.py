"""The process that serves a TCPStore: in a session of its own, so that the death of a rank, of rank 0 too, takes
nothing along. It ends when its last user is gone."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

from moe_a2a.errors import ConfigError, MoeA2AError
from moe_a2a.membership.daemon import detach, log_file, settle

#: Seconds without a user after which it ends, and those that it waits for the first.
IDLE_S = 10.0
FIRST_S = 60.0
_LOOK_S = 0.5
_ESTABLISHED = " 01 "
_BACKLOG = 1024


def start_store(listen: str = "127.0.0.1:0", idle_s: float = IDLE_S, timeout_s: float = 30.0) -> str:
    """Start a store in a process of its own and return its address, "tcp://HOST:PORT".

    listen: address and port, 0 for a free one; other machines reach only what is not loopback, and a TCPStore asks
    nobody for a password. idle_s: it ends so many seconds after its last user has gone. Raises ConfigError if it cannot
    listen there.
    """
    split_listen(listen)
    command = [sys.executable, "-m", "moe_a2a.cli", "store", "--listen", listen, "--idle", str(idle_s), "--detach"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:  # the process that was started ends once the one that stays has said where it listens
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise MoeA2AError(f"the store did not start within {timeout_s:g} s") from error
    if process.returncode != 0:
        raise ConfigError(f"the store did not start: {err.decode(errors='replace').strip()[-500:]}")
    return out.decode().split()[0]


def split_listen(listen: str) -> tuple[str, int]:
    """Raises ConfigError."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"listen={listen!r}; give ADDRESS:PORT, such as 127.0.0.1:0 (0: a free port)")
    return host.strip("[]"), int(port)


def serve(listen: str, idle_s: float, in_background: bool) -> None:
    """Serve until the last user is gone for `idle_s` (never, if that is 0), or until SIGTERM or SIGINT.

    Prints the address. in_background: leave the caller's session first and let the calling process end. Raises
    ConfigError if it cannot listen there.
    """
    host, port = split_listen(listen)
    try:
        listener = _listen(host, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {listen}: {error.strerror or error}") from error
    bound = listener.getsockname()[1]
    stop_r, stop_w = os.pipe()
    say = detach() if in_background else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(stop_w, b"x"))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as dist

    # The listener's descriptor goes to torch; connections are counted in the kernel's table, by port.
    store = dist.TCPStore(
        host,
        bound,
        is_master=True,
        timeout=timedelta(seconds=30),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    shown = f"[{host}]" if ":" in host else host
    if say is None:
        print(f"tcp://{shown}:{bound}", flush=True)
    else:
        settle(say, f"tcp://{shown}:{bound}\n", log_file(f"store-{bound}"))
    _until_unused(bound, idle_s, stop_r)
    del store


def _until_unused(port: int, idle_s: float, stop: int) -> None:
    last_used, allowed = time.monotonic(), max(FIRST_S, idle_s)
    while True:
        ready, _, _ = select.select([stop], [], [], _LOOK_S)
        if ready:
            return
        if users(port):
            last_used, allowed = time.monotonic(), idle_s
        elif idle_s and time.monotonic() - last_used > allowed:
            return


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit these: that of a host that vanished ends, and does not count as a user for ever.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    listener.bind((host, port))
    listener.listen(_BACKLOG)
    return listener


def users(port: int) -> int:
    """TCP connections that other processes of this machine's network namespace, and other machines, have to a local
    port, from the kernel's table. This process's own do not count, whenever they were made: torch's store connects to
    itself, and a user may have come before that."""
    served, ours = 0, 0
    own = _own_sockets()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table, encoding="ascii") as lines:
            next(lines)
            for line in lines:
                if _ESTABLISHED not in line:  # most are of connections that have ended
                    continue
                _, local, remote, *_, inode = line.split()[:10]
                if _port(local) == port:
                    served += 1
                elif _port(remote) == port and inode in own:
                    ours += 1
    return served - ours


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _own_sockets() -> set[str]:
    """Inodes of this process's sockets."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kind, _, inode = os.readlink(f"/proc/self/fd/{fd}").partition(":")
            if kind == "socket":
                inodes.add(inode.strip("[]"))
    return inodes


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
