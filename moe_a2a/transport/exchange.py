"""How a region reaches the peers that map it: a message for the bootstrap, and a descriptor over a Unix socket.

A rank makes an `Offer`, publishes its `message`, and every peer calls `map_offered` with it. A rank that comes later
gets an offer of its own; nobody else takes part.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from moe_a2a.errors import MoeA2AError
from moe_a2a.transport.allocator import PeerHandle, Region
from moe_a2a.transport.gpu import Gpu
from moe_a2a.transport.handover import FdServer, fetch_fd


class Offer:
    """A region, offered to `callers` peers for `timeout_s` seconds. message: JSON, to be sent to them."""

    def __init__(self, region: Region, callers: int, timeout_s: float) -> None:
        self._handle = region.export()
        self._server: FdServer | None = None
        self._closed = False
        self.message: dict[str, Any] = {
            "kind": self._handle.kind,
            "nbytes": self._handle.nbytes,
            "gpu": self._handle.gpu.as_json(),
        }
        if self._handle.fd is not None:
            self._server = FdServer(self._handle.fd, callers, timeout_s)
            self.message |= {"socket": self._server.name, "token": self._server.token}
        elif self._handle.fabric is not None:
            self.message["fabric"] = self._handle.fabric.hex()

    def close(self) -> None:
        """End the offer. Those who have mapped the region keep it."""
        if self._closed:
            return
        self._closed = True
        if self._server is not None:
            self._server.close()
        self._handle.close()


def map_offered(region: Region, rank: int, message: Mapping[str, Any], timeout_s: float) -> int | None:
    """Map the region that `rank` offered in `message`. Returns its process id, or None if it is not on this machine.

    Raises RankLost if the rank does not answer, and what `Region.map_peer` raises.
    """
    nbytes, gpu = int(message["nbytes"]), Gpu.from_json(message["gpu"])
    if message["kind"] == "fabric":
        region.map_peer(rank, PeerHandle(nbytes, gpu, fabric=bytes.fromhex(message["fabric"])))
        return None
    if message["kind"] != "fd":
        raise MoeA2AError(f"rank {rank} offers memory as {message['kind']!r}; do all ranks run one version?")
    fd, pid = fetch_fd(rank, message["socket"], message["token"], timeout_s)
    try:
        region.map_peer(rank, PeerHandle(nbytes, gpu, fd=fd))
    finally:
        os.close(fd)
    return pid
