"""The Mooncake Transfer Engine, loaded, checked and wrapped: register memory, post writes, ask how they are.

The engine reports little by itself: an unknown protocol falls back to TCP without a word, a failed submit is batch id
0. This module turns that into errors that say what to do.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

from packaging.version import Version

from moe_a2a.errors import EngineError
from moe_a2a.libraries import ENGINE_WHEELS, MINIMUM_ENGINE, how_to_get, install_engine, missing_library, replace_engine
from moe_a2a.sockets import hang_up, sockets_to

#: Engines that find each other without a server.
P2P = "P2PHANDSHAKE"
_NOISE = (b"Logging before InitGoogleLogging", b"Local segment descriptor not found")
_LOOK_S = 5e-4
_RDMA_DEVICES = pathlib.Path("/sys/class/infiniband")


def installed_versions() -> dict[str, Version]:
    """Distribution -> version of the installed engine wheels; more than one is a fault."""
    found = {}
    for name in ENGINE_WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = Version(importlib.metadata.version(name))
    return found


def load() -> ModuleType:
    """Import the engine. Raises EngineError that names what is missing and how to install it."""
    found = installed_versions()
    if not found:
        raise EngineError(
            f"ranks on several hosts need the Mooncake Transfer Engine, which is not installed; {install_engine()} "
            "(on GPU machines the wheel for their CUDA: moe-a2a doctor says which)"
        )
    if len(found) > 1:
        raise EngineError(
            f"{' and '.join(found)} are both installed and overwrite each other's files; keep one: {replace_engine()} "
            "(on GPU machines the wheel for their CUDA: moe-a2a doctor says which)"
        )
    ((name, version),) = found.items()
    if version < Version(MINIMUM_ENGINE):
        raise EngineError(
            f"{name} {version} is too old (its TCP writes are not acknowledged); {MINIMUM_ENGINE} or later is needed: "
            f"{install_engine(ENGINE_WHEELS[name])}"
        )
    if os.environ.get("MC_TCP_PROTO") == "1":
        raise EngineError(
            "MC_TCP_PROTO=1 turns off acknowledged TCP writes, so that rows could be read before they are there; "
            "unset it"
        )
    # Read when the first engine is made. The first write to a peer connects to it, and waits for that.
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MC_HANDSHAKE_CONNECT_TIMEOUT", "1")
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:
        library = missing_library(str(error))
        fix = how_to_get(library, ENGINE_WHEELS[name]) if library else "moe-a2a doctor tells more"
        raise EngineError(f"{name} {version} is installed but cannot be loaded: {error}; {fix}") from error


def rdma_devices() -> list[str]:
    """Names of this machine's RDMA devices."""
    return sorted(p.name for p in _RDMA_DEVICES.iterdir()) if _RDMA_DEVICES.is_dir() else []


def check_protocol(module: ModuleType, protocol: str, device_filter: str) -> None:
    """Raise EngineError unless the engine and this machine offer `protocol` (asked now, because the engine would fall
    back to TCP)."""
    offered = ["tcp", "rdma"] + (["efa"] if getattr(module, "SUPPORT_EFA", False) else [])
    if protocol not in offered:
        raise EngineError(
            f"protocol={protocol!r} is not offered for CPU ranks by the installed engine; allowed: {', '.join(offered)}"
        )
    if protocol == "tcp":
        return
    devices = rdma_devices()
    if not devices:
        raise EngineError(f"protocol={protocol!r} needs an RDMA device and this machine has none; use protocol='tcp'")
    wanted = [d for d in device_filter.split(",") if d]
    unknown = [d for d in wanted if d not in devices]
    if unknown:
        raise EngineError(f"device_filter names {', '.join(unknown)}; this machine has {', '.join(devices)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Keep two lines of the engine's start from the user: they report an error where there is none. Anything else is
    passed on."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            log.seek(0)
            lines = [line for line in log if not any(noise in line for noise in _NOISE)]
            if lines:
                os.write(2, b"".join(lines))


class Engine:
    """One Transfer Engine of this process. `name` is where peers reach it ("host:port")."""

    _shared: ClassVar[dict[tuple[str, str, str, str], Engine]] = {}
    _lock = threading.Lock()

    def __init__(self, address: str, protocol: str, device_filter: str, metadata_server: str) -> None:
        module = load()
        check_protocol(module, protocol, device_filter)
        name = address
        if metadata_server != P2P:
            # A server knows an engine by its name, which must then be this process's own: two on a host would share it.
            name = f"{address}:{_free_port()}"
        with _quiet_start():
            self._engine: Any = module.TransferEngine()
            code = self._engine.initialize(name, metadata_server, protocol, device_filter)
        if code != 0:
            raise EngineError(
                f"the Transfer Engine did not start (code {code}): host_address={address!r}, "
                f"metadata_server={metadata_server!r}, "
                f"protocol={protocol!r}; check that the address is this machine's and that the metadata server answers"
            )
        if protocol == "rdma":
            self._check_rdma()
        self.protocol = protocol
        self.name = name if metadata_server != P2P else f"{address}:{self._engine.get_rpc_port()}"

    @classmethod
    def get(cls, address: str, protocol: str, device_filter: str, metadata_server: str) -> Engine:
        """The engine of this process with these settings; an engine has threads and ports, so that objects share
        one."""
        key = (address, protocol, device_filter, metadata_server)
        with cls._lock:
            if key not in cls._shared:
                cls._shared[key] = cls(*key)
            return cls._shared[key]

    @classmethod
    def around(cls, engine: Any, address: str, protocol: str) -> Engine:
        """One that somebody else has made and initialised with "P2PHANDSHAKE", and that outlives this. (One that is not
        initialised ends the process when it is asked for its port.) address: of this machine."""
        made = cls.__new__(cls)
        made._engine, made.protocol, made.name = engine, protocol, f"{address}:{engine.get_rpc_port()}"
        return made

    def _check_rdma(self) -> None:
        topology = json.loads(self._engine.get_local_topology() or "{}")
        if not any(names for lists in topology.values() for names in lists):
            raise EngineError(
                "the Transfer Engine found no usable RDMA device and would use TCP; use protocol='tcp' or mend the "
                "device"
            )

    def register(self, address: int, nbytes: int) -> None:
        """Let peers write to this memory. Raises EngineError."""
        code = self._engine.register_memory(address, nbytes)
        if code != 0:
            raise EngineError(
                f"the Transfer Engine could not register {nbytes} bytes (code {code}); for RDMA raise `ulimit -l`"
            )

    def unregister(self, address: int) -> None:
        self._engine.unregister_memory(address)

    def reach(self, peer: str, source: int, target: int, nbytes: int, limit_s: float) -> None:
        """Make a first write to a peer: it connects to it. Raises EngineError if that takes longer than the limit.

        The engine itself would wait up to a minute for the answer of a process that was stopped, and keep all other
        writes of this process waiting.
        """
        port, deadline = int(peer.rpartition(":")[2]), time.monotonic() + limit_s
        before = sockets_to(port)
        patience = threading.Timer(limit_s, lambda: hang_up(sockets_to(port) - before))
        patience.start()
        try:
            batch = self.submit_write(peer, source, target, nbytes)
        finally:
            patience.cancel()
        while not self.is_done(batch, peer):
            if time.monotonic() > deadline:
                raise EngineError(f"{peer} does not answer within {limit_s:g} s")
            time.sleep(_LOOK_S)

    def submit_write(self, peer: str, source: int, target: int, nbytes: int) -> int:
        """Post one write of registered memory to a peer's registered memory. Returns a batch id; never waits for the
        peer's application. Raises EngineError if the peer cannot be reached."""
        batch: int = self._engine.transfer_submit_write(peer, source, target, nbytes)
        if batch == 0:
            raise EngineError(f"{peer} cannot be reached by {self.protocol}; is the process alive and the port open?")
        return batch

    def is_done(self, batch: int, peer: str) -> bool:
        """Has the write been applied at the peer? Never waits. Raises EngineError if it failed; do not ask again
        after True or an error."""
        code = self._engine.transfer_check_status(batch)
        if code < 0:
            raise EngineError(f"a write to {peer} by {self.protocol} {'timed out' if code == -2 else 'failed'}")
        return bool(code == 1)
