"""CUDA's virtual-memory calls for one GPU: what they need, and their failures as exceptions.

Nothing else in the package calls cuda-bindings. Addresses and sizes are plain integers, sizes in bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from typing import Any, NewType

import torch

from moe_a2a.errors import ConfigError, MoeA2AError
from moe_a2a.transport.allocator import HandleKind

#: A physical allocation (CUmemGenericAllocationHandle).
Allocation = NewType("Allocation", object)

# The first driver of CUDA 12, which every build of torch that this package runs with is newer than, and the first with
# fabric handles. In CUDA's own numbering: 1000 * major + 10 * minor.
_MINIMUM_DRIVER = 12000
_FABRIC_DRIVER = 12030
_STREAM_NON_BLOCKING = 1
_REGISTER_PORTABLE_AND_MAPPED = 1 | 2
_FABRIC_BYTES = 64


class DriverError(MoeA2AError):
    """A call of the CUDA driver failed. code: its name, such as "CUDA_ERROR_OUT_OF_MEMORY"."""

    def __init__(self, call: str, code: str, text: str) -> None:
        super().__init__(f"{call} failed: {text} ({code})")
        self.code = code


def load_api() -> Any:
    """The module cuda.bindings.driver. Raises ConfigError, saying what to install, where GPU ranks cannot work."""
    supported = (
        "GPU ranks need NVIDIA GPUs and a CUDA build of torch, because their memory is made through CUDA's "
        "virtual-memory API; CPU ranks run on any x86-64 machine"
    )
    if torch.version.hip:
        raise ConfigError(
            f"this torch is built for AMD GPUs (ROCm {torch.version.hip}), which are not supported. {supported}"
        )
    if torch.version.cuda is None:
        raise ConfigError(f"this torch ({torch.__version__}) is a build without CUDA. {supported}")
    extra = f"cuda{torch.version.cuda.split('.')[0]}"
    try:
        api = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ConfigError(
            f'GPU ranks need the package cuda-bindings, which does not load ({error}): pip install "moe-a2a[{extra}]"'
        ) from error
    if not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU: there is none, CUDA_VISIBLE_DEVICES hides it, or the driver is older than "
            f"torch's CUDA {torch.version.cuda} needs (nvidia-smi shows both)"
        )
    return api


@contextlib.contextmanager
def beside_captures(api: Any) -> Iterator[None]:
    """Inside, this thread may make any call although other threads capture graphs: what it does is no part of these.
    api: from `load_api`. Source: CUDA Driver API, cuThreadExchangeStreamCaptureMode."""
    before = _call(api, "cuThreadExchangeStreamCaptureMode", api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        yield
    finally:
        _call(api, "cuThreadExchangeStreamCaptureMode", before)


def _call(api: Any, name: str, *arguments: Any) -> Any:
    try:
        status, *results = getattr(api, name)(*arguments)
    except RuntimeError as error:  # the driver has no such function
        raise DriverError(name, "not in this driver", str(error)) from error
    if status != api.CUresult.CUDA_SUCCESS:
        _, text = api.cuGetErrorString(status)
        raise DriverError(name, status.name, text.decode() if isinstance(text, bytes) else str(text))
    return results[0] if len(results) == 1 else None


class Driver:
    """The driver's calls on one GPU. device: with an index. api: stands in for cuda.bindings.driver."""

    def __init__(self, device: torch.device, api: Any = None) -> None:
        """Raises ConfigError if the GPU or its driver lacks what symmetric memory needs."""
        self.device = device
        self.index = index = device.index
        self._api = load_api() if api is None else api
        self._stream: Any = None
        version = self._call("cuDriverGetVersion")
        if version < _MINIMUM_DRIVER:
            raise ConfigError(
                f"the NVIDIA driver supports CUDA {_dotted(version)}, GPU ranks need {_dotted(_MINIMUM_DRIVER)}: "
                "install driver 525 or newer"
            )
        self._version = version
        for name, what in (
            ("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "virtual-memory management"),
            ("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED", "memory handles as file descriptors"),
        ):
            if not self.attribute(name):
                raise ConfigError(
                    f"GPU {index} has no {what} here, which symmetric memory is made of (virtual GPUs and "
                    "WSL lack it); run on the GPU itself"
                )

    def _call(self, name: str, *arguments: Any) -> Any:
        return _call(self._api, name, *arguments)

    def attribute(self, name: str) -> int:
        """A device attribute, without its prefix CU_DEVICE_ATTRIBUTE_."""
        attribute = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", attribute, self._device(self.index)))

    def _device(self, index: int) -> Any:
        return self._call("cuDeviceGet", index)

    def can_map(self, peer: int) -> bool:
        """Whether this GPU may map the memory of another one that this process sees."""
        return peer == self.index or bool(
            self._call("cuDeviceCanAccessPeer", self._device(self.index), self._device(peer))
        )

    def why_no_fabric(self) -> str | None:
        """Why fabric handles cannot be used here; None if they can. Tries one: the attribute alone does not tell."""
        if self._version < _FABRIC_DRIVER:
            return f"the driver supports CUDA {_dotted(self._version)}, they came with {_dotted(_FABRIC_DRIVER)}"
        if not self.attribute("HANDLE_TYPE_FABRIC_SUPPORTED"):
            return "the GPU does not offer them"
        try:
            allocation = self.create(self.granularity("fabric"), "fabric")
        except DriverError as error:
            return f"{error}; they need an IMEX channel (/dev/nvidia-caps-imex-channels) that this process may open"
        try:
            self.export(allocation, "fabric")
        except DriverError as error:
            return str(error)
        finally:
            self.release(allocation)
        return None

    def _kind(self, kind: HandleKind) -> Any:
        types = self._api.CUmemAllocationHandleType
        if kind == "fd":
            return types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return types.CU_MEM_HANDLE_TYPE_FABRIC

    def _location(self, of: Any) -> None:
        of.location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        of.location.id = self.index

    def _properties(self, kind: HandleKind) -> Any:
        properties = self._api.CUmemAllocationProp()
        properties.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self._kind(kind)
        self._location(properties)
        if self.attribute("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"):  # so that a NIC may read and write it as well
            properties.allocFlags.gpuDirectRDMACapable = 1
        return properties

    def granularity(self, kind: HandleKind) -> int:
        """Sizes and addresses of allocations are multiples of this (2 MiB on today's GPUs)."""
        flag = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._call("cuMemGetAllocationGranularity", self._properties(kind), flag))

    def create(self, nbytes: int, kind: HandleKind) -> Allocation:
        """Physical memory on this GPU, contents undefined."""
        return Allocation(self._call("cuMemCreate", nbytes, self._properties(kind), 0))

    def release(self, allocation: Allocation) -> None:
        """Give up this reference; the memory stays while a mapping, a handle or another process refers to it."""
        self._call("cuMemRelease", allocation)

    def export(self, allocation: Allocation, kind: HandleKind) -> int | bytes:
        """A new file descriptor, or the 64 bytes of a fabric handle."""
        exported = self._call("cuMemExportToShareableHandle", allocation, self._kind(kind), 0)
        return int(exported) if kind == "fd" else bytes(exported.data)

    def import_fd(self, fd: int) -> Allocation:
        """A peer's memory from its descriptor, which stays open."""
        return Allocation(self._call("cuMemImportFromShareableHandle", fd, self._kind("fd")))

    def import_fabric(self, handle: bytes) -> Allocation:
        """A peer's memory from the 64 bytes of its fabric handle."""
        if len(handle) != _FABRIC_BYTES:
            raise MoeA2AError(f"a fabric handle has {_FABRIC_BYTES} bytes, this one {len(handle)}")
        # The call takes an address and reads what lies there.
        data = ctypes.create_string_buffer(handle, _FABRIC_BYTES)
        return Allocation(self._call("cuMemImportFromShareableHandle", ctypes.addressof(data), self._kind("fabric")))

    def reserve(self, nbytes: int, alignment: int) -> int:
        """A range of device addresses with nothing behind it."""
        return int(self._call("cuMemAddressReserve", nbytes, alignment, 0, 0))

    def unreserve(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def map(self, address: int, nbytes: int, allocation: Allocation) -> None:
        """Put memory behind a reserved range and let this GPU read and write it. On failure nothing is mapped."""
        self._call("cuMemMap", address, nbytes, 0, allocation, 0)
        access = self._api.CUmemAccessDesc()
        self._location(access)
        access.flags = self._api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            self._call("cuMemSetAccess", address, nbytes, [access], 1)
        except DriverError:
            self.unmap(address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the memory away from exactly the range that one `map` filled."""
        self._call("cuMemUnmap", address, nbytes)

    def zero(self, address: int, nbytes: int) -> None:
        """Set bytes to zero and wait until they are. Waits for no other stream."""
        with torch.cuda.device(self.index):
            self._call("cuMemsetD8Async", address, 0, nbytes, self._own_stream())
            self._call("cuStreamSynchronize", self._stream)

    def write_word(self, address: int, value: int) -> None:
        """Store a 64-bit word in device memory and wait until it is there. Waits for no other stream."""
        word = ctypes.c_int64(value)
        with torch.cuda.device(self.index):
            self._call("cuMemcpyHtoDAsync", address, ctypes.addressof(word), 8, self._own_stream())
            self._call("cuStreamSynchronize", self._stream)

    def _own_stream(self) -> Any:
        if self._stream is None:
            self._stream = self._call("cuStreamCreate", _STREAM_NON_BLOCKING)
        return self._stream

    def memory(self) -> tuple[int, int]:
        """Bytes of this GPU that are free, and that it has."""
        return torch.cuda.mem_get_info(self.device)

    def wait_until_idle(self) -> None:
        """Wait for all work that this process has queued on this GPU."""
        with torch.cuda.device(self.index):
            self._call("cuCtxSynchronize")

    def register_host(self, address: int, nbytes: int) -> int:
        """Pin host memory and let GPUs read and write it. Returns its device address."""
        with torch.cuda.device(self.index):
            self._call("cuMemHostRegister", address, nbytes, _REGISTER_PORTABLE_AND_MAPPED)
            return int(self._call("cuMemHostGetDevicePointer", address, 0))

    def unregister_host(self, address: int) -> None:
        with torch.cuda.device(self.index):
            self._call("cuMemHostUnregister", address)

    def close(self) -> None:
        """Free what the object itself holds."""
        if self._stream is not None:
            with torch.cuda.device(self.index):
                self._call("cuStreamDestroy", self._stream)
            self._stream = None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
