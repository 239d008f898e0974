"""This process's own connections, seen from outside of the libraries that made them and may wait on them for long."""

from __future__ import annotations

import contextlib
import os
import socket
import stat


def sockets_to(port: int) -> set[int]:
    """This process's descriptors of connections to a port."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fd = int(name)
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as connection:
                    peer = connection.getpeername()
                    if isinstance(peer, tuple) and peer[1] == port:
                        found.add(fd)
    return found


def hang_up(fds: set[int]) -> None:
    """End connections under whoever waits for them."""
    for fd in fds:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
