"""What a host's watcher is started with, and by what a rank knows it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from dataclasses import dataclass

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
