"""A stand-in for cuda.bindings.driver, which `Driver` takes in its place."""

from __future__ import annotations

import ctypes
import enum
import os
from types import SimpleNamespace

GRANULE = 2 << 20


class Result(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_PEER_ACCESS_UNSUPPORTED = 217
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_PERMITTED = 800


class Names:
    """An enumeration whose members are their names."""

    def __getattr__(self, name: str) -> str:
        return name


class FakeApi:
    """cuda.bindings.driver without a GPU. failures: call -> the errors of its first calls, in order."""

    CUresult = Result
    CUdevice_attribute = CUmemAllocationHandleType = CUmemAllocationType = Names()
    CUstreamCaptureMode = CUmemLocationType = CUmemAccess_flags = CUmemAllocationGranularity_flags = Names()

    def __init__(self, version: int = 13000, peers: bool = True, missing: str = "none", **failures: list[str]) -> None:
        self.version, self.peers, self.missing, self.failures = version, peers, missing, failures
        self.calls: list[str] = []
        self.imported: list[bytes | int] = []
        self.capture_mode = "CU_STREAM_CAPTURE_MODE_GLOBAL"

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(location=SimpleNamespace(), allocFlags=SimpleNamespace())

    CUmemAccessDesc = CUmemAllocationProp

    def cuGetErrorString(self, status: Result) -> tuple[Result, bytes]:  # noqa: N802
        return Result.CUDA_SUCCESS, status.name.removeprefix("CUDA_ERROR_").lower().replace("_", " ").encode()

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            if self.failures.get(name):
                return (Result[self.failures[name].pop(0)],)
            value = getattr(self, f"_{name}", lambda *_: None)(*arguments)
            return (Result.CUDA_SUCCESS,) if value is None else (Result.CUDA_SUCCESS, value)

        if not name.startswith("cu"):
            raise AttributeError(name)
        return call

    def count(self, name: str) -> int:
        return self.calls.count(name)

    def _cuDriverGetVersion(self) -> int:  # noqa: N802
        return self.version

    def _cuDeviceGet(self, index: int) -> int:  # noqa: N802
        return index

    def _cuDeviceGetAttribute(self, name: str, _device: int) -> int:  # noqa: N802
        return int(self.missing not in name)

    def _cuDeviceCanAccessPeer(self, *_) -> int:  # noqa: N802
        return int(self.peers)

    def _cuMemGetAllocationGranularity(self, *_) -> int:  # noqa: N802
        return GRANULE

    def _cuMemCreate(self, *_) -> str:  # noqa: N802
        return "allocation"

    def _cuMemAddressReserve(self, *_) -> int:  # noqa: N802
        return 1 << 40

    def _cuMemExportToShareableHandle(self, _allocation, kind: str, _flags):  # noqa: N802
        if "FABRIC" in kind:
            return SimpleNamespace(data=bytes(range(64)))
        return os.memfd_create("exported")

    def _cuMemImportFromShareableHandle(self, handle: int, kind: str) -> str:  # noqa: N802
        if "FABRIC" in kind:
            self.imported.append(ctypes.string_at(handle, 64))
        else:
            os.fstat(handle)  # is open
            self.imported.append(handle)
        return "imported"

    def _cuStreamCreate(self, _flags) -> str:  # noqa: N802
        return "stream"

    def _cuThreadExchangeStreamCaptureMode(self, mode: str) -> str:  # noqa: N802
        self.capture_mode, before = mode, self.capture_mode
        return before

    def _cuMemcpyHtoDAsync(self, to: int, source: int, nbytes: int, _stream) -> None:  # noqa: N802
        ctypes.memmove(to, source, nbytes)  # the table is a CPU tensor here
