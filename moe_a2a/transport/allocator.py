"""What memory for GPU ranks is, whoever makes it: regions that peers map one at a time, and tensors over them.

`symmetric.SymmetricAllocator` makes it through CUDA's virtual-memory API. Whoever uses a region needs this module only,
so that another owner of the memory (a proxy process) can stand behind it later.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from moe_a2a.transport.gpu import Gpu

#: How memory is named to a peer. "fd": a file descriptor, between processes of one machine, passed over a Unix socket.
#: "fabric": 64 bytes that any process of the NVLink domain may import, other machines included.
HandleKind = Literal["fd", "fabric"]


@dataclass(frozen=True)
class PeerHandle:
    """What a peer needs to map a region. Exactly one of fd and fabric is set.

    nbytes: the region's size; gpu: where it lies; fd: a descriptor of this process, owned by this object; fabric: 64
    bytes that may be sent as they are.
    """

    nbytes: int
    gpu: Gpu
    fd: int | None = None
    fabric: bytes | None = None

    @property
    def kind(self) -> HandleKind:
        return "fd" if self.fd is not None else "fabric"

    def close(self) -> None:
        """Close the descriptor, if it is one. To be called once; what was mapped with it stays mapped."""
        if self.fd is not None:
            os.close(self.fd)


class Region(Protocol):
    """`nbytes` of zeroed memory on this rank's GPU, with a place beside it for the region of every other rank.

    rank, world_size: this rank and the number of places. nbytes: what was asked for, rounded up; all ranks of a group
    must ask for the same. table: [world_size] int64 on `device`, the address of every rank's region as kernels of this
    rank see it, 0 for a rank that is not mapped. A rank's address never changes, even if it is unmapped and mapped
    again, so that a captured graph may hold it.
    """

    rank: int
    world_size: int
    nbytes: int
    device: torch.device
    table: torch.Tensor

    def export(self) -> PeerHandle:
        """A new handle of the own region. The caller closes it once the peers have theirs."""

    def map_peer(self, rank: int, handle: PeerHandle) -> None:
        """Map a peer's region for reading and writing, then enter it in `table`. Closes nothing; waits for no kernel.

        Raises ConfigError if the two GPUs cannot map each other's memory, MoeA2AError if the rank is mapped already,
        the sizes differ or the driver refuses.
        """

    def unmap_peer(self, rank: int) -> None:
        """Take a peer out of `table` and unmap its region, dead or alive. No effect if it is not mapped.

        Waits until all work queued on the device has ended, because a kernel that touches memory that is no longer
        mapped ends its process's use of the GPU; so not while a graph is being captured. Tensors over that peer's
        region must not be used afterwards.
        """

    def mapped(self) -> tuple[int, ...]:
        """The ranks whose regions are mapped, this one included, ascending."""

    def address(self, rank: int, offset: int = 0) -> int:
        """Device address of a byte of a rank's region, also of one that is not mapped."""

    def tensor(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over a place in a mapped region, without a copy. Its device is this rank's, whoever owns the memory.

        offset: bytes from the region's start, a multiple of the element size. A tensor over the own region keeps it
        alive, even past `close`. Raises MoeA2AError if the rank is not mapped, ValueError for a place outside.
        """

    def close(self) -> None:
        """Unmap the peers (waiting as `unmap_peer` does) and let go of the own memory. To be called once or more.

        The memory is free once no tensor over it and no peer's mapping of it is left.
        """


class Allocator(Protocol):
    """Makes regions on one GPU for one rank."""

    def allocate(self, nbytes: int, reason: str) -> Region:
        """A zeroed region of at least `nbytes`. reason: the arguments that made it this large, for the error.

        Raises ConfigError, saying how much is free, if there is not enough memory.
        """

    def close(self) -> None:
        """Close every region that is still open."""
