"""A page of words in pinned host memory, which the CPU, a GPU's kernels and other processes all read and write.

For what must reach a running kernel at once: the mask of active ranks, or the words that a proxy process polls. A store
of one aligned word is never seen in half. Kernels must read with system scope (ld.relaxed.sys or ld.acquire.sys): a
plain load may be kept in a register or a cache for as long as the kernel runs.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref

import numpy as np
import torch

from moe_a2a.errors import MoeA2AError
from moe_a2a.transport.device_view import bytes_at
from moe_a2a.transport.driver import Driver, DriverError

PAGE_BYTES = 4096

_log = logging.getLogger(__name__)


class FlagPage:
    """512 zeroed words.

    words: [512] int64, numpy, for the CPU. device_words: [512] int64 CUDA tensor over the same memory, for kernels;
    None in a process that has no GPU (a watcher). fd: the memory's descriptor, to be handed to other processes
    (handover.FdServer), which attach to it by giving it here.
    """

    def __init__(self, driver: Driver | None, fd: int | None = None) -> None:
        """fd: another process's page, which this object takes over. Raises MoeA2AError if it cannot be mapped."""
        if fd is None:
            fd = os.memfd_create("moe_a2a_flags", os.MFD_CLOEXEC)
            os.ftruncate(fd, PAGE_BYTES)
        self.fd = fd
        try:
            page = mmap.mmap(fd, PAGE_BYTES)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise MoeA2AError(f"cannot map a page of flags: {error}") from error
        self.words = np.frombuffer(page, dtype=np.int64)
        self.device_words: torch.Tensor | None = None
        if driver is not None:
            pinned = _Pinned(driver, page)
            self.device_words = bytes_at(pinned.device_address, PAGE_BYTES, driver.device, pinned).view(torch.int64)

    def close(self) -> None:
        """Let go of the memory. It is unpinned when the last tensor over `device_words` is gone."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        self.device_words = None
        self.words = np.zeros(0, dtype=np.int64)


class _Pinned:
    """A page as a GPU sees it; unpinned when nothing refers to it any more."""

    def __init__(self, driver: Driver, page: mmap.mmap) -> None:
        raw = ctypes.c_uint8.from_buffer(page)  # keeps the page mapped
        address = ctypes.addressof(raw)
        self.device_address = driver.register_host(address, PAGE_BYTES)
        weakref.finalize(self, _unpin, driver, address, raw).atexit = False


def _unpin(driver: Driver, address: int, _page: object) -> None:
    try:
        driver.wait_until_idle()  # no kernel may still be reading
        driver.unregister_host(address)
    except DriverError as error:
        _log.warning("a page of flags was not unpinned: %s", str(error))
