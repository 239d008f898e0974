"""Processes that stay when the one that started them dies: the store and the watchers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from moe_a2a.errors import ConfigError

LOG_DIR = "MOE_A2A_LOG_DIR"
SECRET = "MOE_A2A_SECRET"
_LEAST_SECRET = 16


def log_file(name: str) -> str:
    """Where a process of this name writes what it has to say: a file in $MOE_A2A_LOG_DIR, else nowhere."""
    folder = os.environ.get(LOG_DIR)
    return str(Path(folder) / f"moe-a2a-{name}.log") if folder else os.devnull


def detach() -> int:
    """Leave the caller's session and family. Returns only in a process of its own, which init adopts at once: it is
    nobody's child, so that a launcher that kills a rank and all its children does not find it.

    The calling process ends when this one calls `settle` with the returned descriptor, or ends.
    """
    say_r, say_w = os.pipe()
    if os.fork():
        os.close(say_w)
        heard = b""
        while part := os.read(say_r, 4096):
            heard += part
        os.write(1, heard)
        os._exit(0 if heard else 1)
    os.close(say_r)
    os.setsid()
    return say_w


def settle(say: int, said: str, log: str) -> None:
    """Let the caller of `detach` go, with `said` as its output; from now on, output goes to `log`."""
    os.write(say, said.encode())
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd, number in ((null, 0), (out, 1), (out, 2)):
        os.dup2(fd, number)
    for fd in {null, out, say} - {0, 1, 2}:
        os.close(fd)
    if log == os.devnull:
        logging.disable(logging.CRITICAL)
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


def shared_secret() -> bytes:
    """The group's secret from $MOE_A2A_SECRET; empty for none. Raises ConfigError if it is too short to be one."""
    secret = os.environ.get(SECRET, "").encode()
    if secret and len(secret) < _LEAST_SECRET:
        raise ConfigError(
            f"{SECRET} has {len(secret)} bytes; give {_LEAST_SECRET} or more (`openssl rand -hex 32`), or none"
        )
    return secret
