"""Symmetric memory for GPU ranks: every rank's region mapped side by side into each of them, by CUDA's virtual memory.

A rank reserves one range of device addresses with a place for every rank, puts its own memory behind its own place and
its peers' memory behind theirs, one peer at a time. A peer that dies takes nothing along: a mapping holds the physical
memory, whoever allocated it, so the survivors go on reading and writing it without an error until they unmap it.

Map, unmap and close from one thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Literal

import torch

from moe_a2a.errors import ConfigError, MoeA2AError
from moe_a2a.transport.allocator import HandleKind, PeerHandle
from moe_a2a.transport.device_view import bytes_at, part
from moe_a2a.transport.driver import Allocation, Driver, DriverError
from moe_a2a.transport.gpu import Gpu, describe_link

_log = logging.getLogger(__name__)


class _Space:
    """The address range of a region, with the own memory behind its place.

    Everything is given back once nothing refers to it any more: the region does until it is closed, tensors do as long
    as they live.
    """

    def __init__(self, driver: Driver, nbytes: int, rank: int, world_size: int, kind: HandleKind) -> None:
        self.nbytes = nbytes
        self.peers: set[int] = set()
        with contextlib.ExitStack() as undo:
            self.allocation = driver.create(nbytes, kind)
            undo.callback(driver.release, self.allocation)
            alignment = driver.granularity(kind)
            self.base = driver.reserve(nbytes * world_size, alignment)
            undo.callback(driver.unreserve, self.base, nbytes * world_size)
            driver.map(self.address(rank), nbytes, self.allocation)
            undo.callback(driver.unmap, self.address(rank), nbytes)
            driver.zero(self.address(rank), nbytes)
            undo.pop_all()
        self.give_back = weakref.finalize(
            self, _give_back, driver, self.base, nbytes, rank, world_size, self.allocation, self.peers
        )
        self.give_back.atexit = False  # the driver gives everything back when a process ends

    def address(self, rank: int) -> int:
        return self.base + rank * self.nbytes


def _give_back(
    driver: Driver, base: int, nbytes: int, rank: int, world_size: int, allocation: Allocation, peers: set[int]
) -> None:
    """Unmap and free a space. Logs instead of raising, as `_unmap` does."""
    if not _unmap(driver, base, nbytes, {*peers, rank}):
        return
    try:
        driver.release(allocation)
        driver.unreserve(base, nbytes * world_size)
    except DriverError as error:
        _log.warning("symmetric memory of rank %d was not given back: %s", rank, str(error))


def _unmap(driver: Driver, base: int, nbytes: int, places: set[int]) -> bool:
    """Empty `places`, once no kernel runs. Logs instead of raising: if a kernel's fault has ended this process's use of
    the GPU, the driver refuses everything, frees everything when the process ends, and the fault is what is to be seen.
    """
    try:
        driver.wait_until_idle()
        while places:
            driver.unmap(base + min(places) * nbytes, nbytes)
            places.remove(min(places))
    except DriverError as error:
        _log.warning("the memory of ranks %s stays mapped until this process ends: %s", sorted(places), str(error))
    return not places


class SymmetricRegion:
    """A `Region` (see allocator.py) in CUDA virtual memory."""

    def __init__(self, driver: Driver, gpu: Gpu, space: _Space, rank: int, world_size: int, kind: HandleKind) -> None:
        self.rank, self.world_size, self.nbytes = rank, world_size, space.nbytes
        self.device = driver.device
        self._driver, self._gpu, self._kind = driver, gpu, kind
        self._base = space.base
        self._space: _Space | None = space
        self._bytes: dict[int, torch.Tensor] = {}
        self.table = torch.zeros(world_size, dtype=torch.int64, device=self.device)
        driver.wait_until_idle()  # entries are written past torch's streams, and must not come before these zeros
        self._enter(rank, self.address(rank))

    def _opened(self) -> _Space:
        if self._space is None:
            raise MoeA2AError(f"the symmetric memory of rank {self.rank} is closed")
        return self._space

    def _enter(self, rank: int, address: int) -> None:
        self._driver.write_word(self.table.data_ptr() + 8 * rank, address)

    def export(self) -> PeerHandle:
        exported = self._driver.export(self._opened().allocation, self._kind)
        if isinstance(exported, bytes):
            return PeerHandle(self.nbytes, self._gpu, fabric=exported)
        return PeerHandle(self.nbytes, self._gpu, fd=exported)

    def map_peer(self, rank: int, handle: PeerHandle) -> None:
        space = self._opened()
        if rank == self.rank or rank in space.peers or not 0 <= rank < self.world_size:
            raise MoeA2AError(
                f"rank {rank} cannot be mapped: ranks 0 to {self.world_size - 1} have a place, and {self.mapped()} are "
                "mapped already; unmap a rank before it is mapped again"
            )
        if handle.nbytes != self.nbytes:
            raise MoeA2AError(
                f"rank {rank}'s memory region has {handle.nbytes} bytes, rank {self.rank}'s {self.nbytes}; "
                "do all ranks run one version with one configuration, on GPUs of one kind?"
            )
        visible = handle.gpu.ordinal()
        if visible is not None and not self._driver.can_map(visible):
            raise self._cannot_map(rank, handle.gpu, "the driver allows no peer access between the two")
        try:
            if handle.fabric is not None:
                allocation = self._driver.import_fabric(handle.fabric)
            elif handle.fd is not None:
                allocation = self._driver.import_fd(handle.fd)
            else:
                raise MoeA2AError(f"the handle of rank {rank} holds neither a descriptor nor a fabric handle")
            try:
                self._driver.map(self.address(rank), self.nbytes, allocation)
            finally:
                self._driver.release(allocation)  # the mapping keeps the memory
        except DriverError as error:
            raise self._cannot_map(rank, handle.gpu, str(error)) from error
        space.peers.add(rank)
        self._enter(rank, self.address(rank))

    def _cannot_map(self, rank: int, peer: Gpu, why: str) -> ConfigError:
        return ConfigError(
            f"rank {self.rank} ({self._gpu}) cannot map the memory of rank {rank} ({peer}): {why}; "
            f"{describe_link(self._gpu, peer)}. Use GPUs that reach each other's memory (`nvidia-smi topo -m`, "
            "CUDA_VISIBLE_DEVICES); inside a container or virtual machine peer access may be switched off"
        )

    def unmap_peer(self, rank: int) -> None:
        space = self._opened()
        if rank not in space.peers:
            return
        self._enter(rank, 0)
        self._bytes.pop(rank, None)
        self._driver.wait_until_idle()
        self._driver.unmap(self.address(rank), self.nbytes)
        space.peers.remove(rank)

    def mapped(self) -> tuple[int, ...]:
        return tuple(sorted((self.rank, *self._opened().peers)))

    def address(self, rank: int, offset: int = 0) -> int:
        return self._base + rank * self.nbytes + offset

    def tensor(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        space = self._opened()
        if rank != self.rank and rank not in space.peers:
            raise MoeA2AError(f"rank {rank}'s memory is not mapped; {self.mapped()} are")
        data = self._bytes.get(rank)
        if data is None:
            data = self._bytes[rank] = bytes_at(self.address(rank), self.nbytes, self.device, space)
        return part(data, offset, shape, dtype)

    def close(self) -> None:
        if self._space is None:
            return
        space, self._space = self._space, None
        self._bytes.clear()
        _unmap(self._driver, space.base, space.nbytes, space.peers)


class SymmetricAllocator:
    """An `Allocator` (see allocator.py) through CUDA's virtual-memory API."""

    def __init__(
        self,
        device: torch.device,
        rank: int,
        world_size: int,
        handles: Literal["fd", "fabric", "auto"] = "fd",
        driver: Driver | None = None,
    ) -> None:
        """device: with an index. rank, world_size: this rank and the number of places of every region.

        handles: "fd" for ranks of one host, "fabric" for an NVLink domain of several hosts; "auto" takes fabric where
        the GPU and this process may use it, else fd, and logs which and why. All ranks must end with the same
        (`handles` holds it). driver: made for `device` if not given; `driver` holds it, for flags.FlagPage.

        Raises ConfigError if this machine has not what that needs.
        """
        self.driver = driver or Driver(device)
        why_not = None if handles == "fd" else self.driver.why_no_fabric()
        if handles == "fabric" and why_not:
            raise ConfigError(
                f"fabric handles cannot be used on {device}: {why_not}. Ranks of one host need none: use fd"
            )
        self.handles: HandleKind = "fabric" if handles != "fd" and not why_not else "fd"
        if handles == "auto":
            _log.info("rank %d: memory handles are of kind %s%s", rank, self.handles, f": {why_not}" if why_not else "")
        self.device, self.rank, self.world_size = device, rank, world_size
        self.gpu = Gpu.of(device)
        self._regions: list[SymmetricRegion] = []

    def allocate(self, nbytes: int, reason: str) -> SymmetricRegion:
        if nbytes < 1:
            raise ConfigError(f"a region of {nbytes} bytes: it must have at least 1")
        granularity = self.driver.granularity(self.handles)
        rounded = -(-nbytes // granularity) * granularity
        try:
            space = self._space(rounded)
        except DriverError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            torch.cuda.empty_cache()  # torch keeps memory that no tensor uses
            try:
                space = self._space(rounded)
            except DriverError as again:
                raise self._out_of_memory(rounded, reason) from again
        region = SymmetricRegion(self.driver, self.gpu, space, self.rank, self.world_size, self.handles)
        self._regions.append(region)
        return region

    def _space(self, nbytes: int) -> _Space:
        return _Space(self.driver, nbytes, self.rank, self.world_size, self.handles)

    def _out_of_memory(self, nbytes: int, reason: str) -> ConfigError:
        free, total = self.driver.memory()
        return ConfigError(
            f"communication buffers need {nbytes / 1e9:.3f} GB ({reason}), but {free / 1e9:.3f} of "
            f"{total / 1e9:.1f} GB are free on rank {self.rank}'s GPU ({self.gpu}); lower what makes them large, or "
            "leave more memory to them (SGLang: --mem-fraction-static)"
        )

    def close(self) -> None:
        """Close every region that is still open."""
        for region in self._regions:
            region.close()
        self._regions.clear()
        self.driver.close()
