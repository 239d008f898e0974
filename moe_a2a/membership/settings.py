"""What a host's watcher is started with, how it is started, and by what a rank knows it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass

from moe_a2a.errors import MoeA2AError

_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Settings:
    """What a watcher is started with. control_address: where it takes messages of other hosts' watchers; loopback
    unless told otherwise."""

    store: str
    group: str
    host: str
    control_address: str = "127.0.0.1"

    @property
    def socket_name(self) -> str:
        said = json.dumps([os.getuid(), self.store, self.group, self.host])
        return "\0moe_a2a-watcher-" + hashlib.sha256(said.encode()).hexdigest()[:24]


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """(process id, user id) of the other end, from the kernel. The id is 0 if it is in another pid namespace."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def start_watcher(settings: Settings) -> None:
    """Start a host's watcher, unless it runs. Returns at once: whoever connects waits for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_a2a.membership.watcher"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    process.communicate(json.dumps(asdict(settings)).encode())
    if process.returncode != 0:
        raise MoeA2AError(f"the watcher of host {settings.host} did not start (its error is above)")
