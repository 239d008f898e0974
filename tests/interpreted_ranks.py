"""GPU ranks without a GPU: the real `GpuBackend`, its construction included, with its kernels in Triton's interpreter.

Real: `AllToAll`, `GpuBackend`, the meeting of the ranks, how regions are exchanged over Unix sockets and mapped side by
side, the thread that watches the other ranks, `MaskedRank`, and every kernel. Each rank is a process, and all of them
run at once, so that kernels wait for kernels of other processes as they do on GPUs.

Faked, in a rank's process:
- the CUDA driver: memory is memfd, and mapping it is mmap (`HostDriver`);
- device and pinned host memory: plain tensors on the CPU, which are the "device" of these ranks;
- streams: there is one, a launch has ended when it returns, and nothing is ever captured in a graph;
- the GPU: it has one multiprocessor, which runs the programs of a launch one after another.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from fake_driver import GRANULE, FakeApi

from moe_a2a import Config, Options, all_to_all
from moe_a2a.bootstrap import Bootstrap
from moe_a2a.gpu import backend, rendezvous
from moe_a2a.transport import driver, flags, symmetric

_DEVICE = torch.device("cpu")
_MAP_FIXED = 0x10  # mmap has no name for it


def become_gpu_rank() -> None:
    """From now on AllToAll(device="cpu") builds the backend of GPU ranks in this process, which must be of no other
    use."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    assert triton.knobs.runtime.interpret, "Triton was imported to compile in this process"

    def build(config: Config, options: Options, bootstrap: Bootstrap) -> backend.GpuBackend:
        return backend.GpuBackend(config, options, bootstrap, torch.device("cuda"))

    all_to_all.CpuBackend = build  # type: ignore[assignment,misc]
    backend.find_device = rendezvous.find_device = lambda _: _DEVICE  # type: ignore[attr-defined]
    driver.load_api = HostDriver
    symmetric.bytes_at = flags.bytes_at = _bytes_at  # type: ignore[attr-defined]
    gpu = SimpleNamespace(
        multi_processor_count=1,
        name="interpreter",
        uuid=str(os.getpid()),
        pci_domain_id=0,
        pci_bus_id=0,
        pci_device_id=0,
    )
    torch.cuda.get_device_properties = lambda _: gpu  # type: ignore[assignment,return-value]
    torch.cuda.device_count = lambda: 0
    torch.cuda.current_device = lambda: _DEVICE.index  # type: ignore[assignment,return-value]
    torch.cuda.device = lambda _: nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.synchronize = lambda _=None: None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment,method-assign]


class HostDriver(FakeApi):
    """The CUDA driver's memory calls, with memory of the host. An allocation is the descriptor of a memfd."""

    def __init__(self) -> None:
        super().__init__()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def _mmap(self, address: int | None, nbytes: int, protection: int, how: int, fd: int) -> int:
        found = self._libc.mmap(address, nbytes, protection, how, fd, 0)
        assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return int(found)

    def _nothing(self, address: int | None, nbytes: int) -> int:
        """A range of addresses, or this one, with nothing behind it."""
        how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_FIXED if address is not None else 0)
        return self._mmap(address, nbytes, 0, how, -1)

    def _cuMemCreate(self, nbytes: int, *_: object) -> int:  # noqa: N802
        fd = os.memfd_create("gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        return fd

    def _cuMemRelease(self, fd: int) -> None:  # noqa: N802
        os.close(fd)

    def _cuMemExportToShareableHandle(self, fd: int, *_: object) -> int:  # noqa: N802
        return os.dup(fd)

    def _cuMemImportFromShareableHandle(self, fd: int, _kind: str) -> int:  # noqa: N802
        return os.dup(fd)

    def _cuMemAddressReserve(self, nbytes: int, alignment: int, *_: object) -> int:  # noqa: N802
        assert nbytes % GRANULE == 0 and alignment == GRANULE
        return self._nothing(None, nbytes)

    def _cuMemAddressFree(self, address: int, nbytes: int) -> None:  # noqa: N802
        assert self._libc.munmap(address, nbytes) == 0

    def _cuMemMap(self, address: int, nbytes: int, _offset: int, fd: int, _flags: int) -> None:  # noqa: N802
        self._mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)

    def _cuMemUnmap(self, address: int, nbytes: int) -> None:  # noqa: N802
        self._nothing(address, nbytes)

    def _cuMemsetD8Async(self, address: int, value: int, nbytes: int, _stream: str) -> None:  # noqa: N802
        ctypes.memset(address, value, nbytes)

    def _cuMemHostGetDevicePointer(self, address: int, _flags: int) -> int:  # noqa: N802
        return address


class _Place:
    """Tells numpy where bytes lie, and keeps their owner alive."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self._owner = owner
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": (nbytes,), "typestr": "|u1"}


def _bytes_at(address: int, nbytes: int, device: torch.device, owner: object) -> torch.Tensor:
    """As `device_view.bytes_at`, for memory of the host."""
    made = torch.from_numpy(np.asarray(_Place(address, nbytes, owner)))
    assert made.data_ptr() == address and device == _DEVICE
    return made
