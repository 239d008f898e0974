"""The regions of a host's ranks, mapped side by side into each of them: own region writable, the others read-only.

Memory is anonymous (memfd): it has no name, so nothing is left behind after kill -9, and it does not count against a
container's /dev/shm. The descriptor is sealed before it is handed over: the kernel itself refuses a second writable
mapping, so a peer can read what was published for it and write nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import mmap
import os
import platform

import numpy as np
import torch

from moe_a2a.errors import ConfigError, MoeA2AError

_F_SEAL_FUTURE_WRITE = 0x10
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

# 64-bit words at the start of a region.
_FAULT_WORD = 0  # 1 + the rank that the owner found missing
_CLOSED_WORD = 1  # 1 once the owner closed its object

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def check_platform() -> None:
    """Raise ConfigError where CPU ranks cannot work: the order of stores that flags rely on is x86-64's."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise ConfigError(
            f"CPU ranks need an x86-64 processor (they rely on its order of stores); this is {platform.machine()}"
        )


def available_memory() -> int:
    """Bytes that can still be had on this machine: free memory, or what the control group leaves of it."""
    with open("/proc/meminfo", encoding="ascii") as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
            open("/sys/fs/cgroup/memory.stat", encoding="ascii") as stat,
        ):
            reclaimable = next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
            free = min(free, int(limit.read()) - int(used.read()) + reclaimable)
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return free


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    return _mapped(mapped, nbytes)


def _mapped(address: int | None, nbytes: int) -> int:
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise MoeA2AError(
            f"cannot map {nbytes} bytes of shared memory: {os.strerror(code)} ({errno.errorcode.get(code, code)})"
        )
    return int(address)


def forget(address: int, nbytes: int) -> None:
    """Let a mapping go, and keep its addresses from being used again: who still writes there writes into memory that
    nobody reads."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
    _map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)


class HostMemory:
    """`count` regions of `nbytes` each, of which this process owns the one at `index`."""

    def __init__(self, nbytes: int, count: int, index: int) -> None:
        self.nbytes, self.count, self.index = nbytes, count, index
        self.fd = os.memfd_create("moe_a2a", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, nbytes)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        # A region that is not mapped yet reads as zeros, which no record is.
        self._base = _map(None, nbytes * count, mmap.PROT_READ, private, -1)
        self._map_region(index, self.fd, mmap.PROT_READ | mmap.PROT_WRITE)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self._raw = (ctypes.c_uint8 * (nbytes * count)).from_address(self._base)
        self.bytes = memoryview(self._raw).cast("B")
        self._tensor = torch.frombuffer(self._raw, dtype=torch.uint8)
        self._words: dict[int, np.ndarray[tuple[int], np.dtype[np.uint64]]] = {}
        self._closed = False

    def _map_region(self, index: int, fd: int, protection: int) -> None:
        _map(self.address(index), self.nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)

    def map_peer(self, index: int, fd: int) -> None:
        """Map a peer's region read-only, after checking that its size is the one that was agreed on. Closes nothing."""
        size = os.fstat(fd).st_size
        if size != self.nbytes:
            raise MoeA2AError(
                f"a peer's memory region has {size} bytes, expected {self.nbytes}; do all ranks run one version?"
            )
        self._map_region(index, fd, mmap.PROT_READ)

    def window(self, offset: int, nbytes: int) -> int:
        """Address of one more writable mapping of a part of the own region, both in whole pages. It outlives this
        object, until `forget`."""
        # The seal lets nobody map it again; but a mapping that is there may be doubled (mremap of 0 bytes).
        own = self.address(self.index, offset)
        return _mapped(_libc.mremap(own, 0, nbytes, _MREMAP_MAYMOVE), nbytes)

    def address(self, index: int, offset: int = 0) -> int:
        """Virtual address in this process."""
        return self._base + index * self.nbytes + offset

    def position(self, index: int, offset: int) -> int:
        """Offset in `bytes` of a place in a region."""
        return index * self.nbytes + offset

    def tensor(self, index: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over a place in a region. Writing to it is allowed in the own region only."""
        first = self.position(index, offset)
        return self._tensor[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def table(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """All regions as rows of `columns` elements. Its row numbers name any row of any rank of the host."""
        return self._tensor.view(dtype).view(-1, columns)

    def row(self, index: int, offset: int, row_bytes: int) -> int:
        """The number in `table` of the row at a place in a region."""
        return self.position(index, offset) // row_bytes

    def _word(self, index: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        words = self._words.get(index)
        if words is None:
            words = np.frombuffer(self.bytes, dtype=np.uint64, count=2, offset=self.position(index, 0))
            self._words[index] = words
        return words

    def set_fault(self, missing: int) -> None:
        """Tell the ranks of this host that `missing` was found missing, so that they blame it and not this rank."""
        self._word(self.index)[_FAULT_WORD] = missing + 1

    def fault(self, index: int) -> int | None:
        """The rank that the owner of a region found missing, if any."""
        word = int(self._word(index)[_FAULT_WORD])
        return word - 1 if word else None

    def has_closed(self, index: int) -> bool:
        return bool(self._word(index)[_CLOSED_WORD])

    def close(self) -> None:
        """Mark the region as closed and unmap everything. No tensor over it may be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self._word(self.index)[_CLOSED_WORD] = 1
        self._words.clear()
        _libc.munmap(self._base, self.nbytes * self.count)
        os.close(self.fd)
