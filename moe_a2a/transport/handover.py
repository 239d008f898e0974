"""Passing memory descriptors between the ranks of a host over an abstract Unix socket.

The socket has no name in any file system. A caller must run under the same user and show the token that was exchanged
during bootstrap; it gets one read-only descriptor and the connection ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import struct
import threading
import time

from moe_a2a.errors import MoeA2AError, RankLost

_TOKEN_BYTES = 16
_CREDENTIALS = struct.Struct("3i")


class FdServer:
    """Hands `fd` to `expected` callers (None: to all that come), then stops. `name` and `token` go to the peers through
    the bootstrap."""

    def __init__(self, fd: int, expected: int | None, timeout_s: float) -> None:
        self.name = f"moe_a2a-{secrets.token_hex(8)}"
        self.token = secrets.token_hex(_TOKEN_BYTES)
        self._fd, self._left = fd, math.inf if expected is None else expected
        self._deadline = math.inf if expected is None else time.monotonic() + timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.name)
        self._socket.listen(64 if expected is None else max(1, expected))
        self._thread = threading.Thread(target=self._serve, name="moe_a2a-fd", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while self._left and (left := self._deadline - time.monotonic()) > 0:
            self._socket.settimeout(None if left == math.inf else left)
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(2.0)
                if _peer_credentials(connection)[1] != os.getuid():
                    continue
                if not secrets.compare_digest(_receive_exactly(connection, _TOKEN_BYTES), bytes.fromhex(self.token)):
                    continue
                socket.send_fds(connection, [b"1"], [self._fd])
                self._left -= 1

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(timeout=2.0)


def fetch_fd(rank: int, name: str, token: str, timeout_s: float) -> tuple[int, int]:
    """Fetch `rank`'s descriptor. Returns (descriptor, process id of that rank as seen here).

    Raises RankLost if the rank does not answer, MoeA2AError if it refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect("\0" + name)
            pid, uid = _peer_credentials(connection)
            if uid != os.getuid():
                raise MoeA2AError(
                    f"rank {rank} runs as user {uid}, this rank as {os.getuid()}; ranks of a host need one user"
                )
            connection.sendall(bytes.fromhex(token))
            data, fds, _, _ = socket.recv_fds(connection, 1, 1)
        except OSError as error:
            message = (
                f"rank {rank} is said to be on this host, but its memory could not be fetched: {error}. If the ranks "
                f"are in different "
                "network namespaces (containers), give them different host labels (Options.host or MOE_A2A_HOST)"
            )
            raise RankLost(message, [rank]) from error
    if not data or not fds:
        raise MoeA2AError(f"rank {rank} refused to hand over its memory; do all ranks run as one user?")
    return fds[0], pid


def _peer_credentials(connection: socket.socket) -> tuple[int, int]:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := connection.recv(count - len(data))):
        data += part
    return data
