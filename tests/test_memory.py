"""The shared regions of a host: mapped read-only by peers, sealed by the kernel, fetched with a token."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import time

import pytest
import torch
from ranks import run_ranks

from moe_a2a import MoeA2AError, RankLost
from moe_a2a.transport.handover import FdServer, fetch_fd
from moe_a2a.transport.memory import HostMemory, available_memory, forget

SIZE = 8192


@pytest.fixture
def memory():
    made = HostMemory(SIZE, count=2, index=0)
    yield made
    made.close()


@pytest.fixture
def server(memory):
    made = FdServer(memory.fd, expected=1, timeout_s=10)
    yield made
    made.close()


def test_a_fetched_region_can_be_read_but_not_be_mapped_writable_or_written(memory, server):
    fd, pid = fetch_fd(0, server.name, server.token, timeout_s=5)
    assert pid == os.getpid()
    try:
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as readable:
            memory.tensor(0, 4096, (4,), torch.int32).copy_(torch.tensor([1, 2, 3, 4]))
            assert readable[4096] == 1 and readable[4108] == 4  # the owner still writes to its own mapping
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE, prot=mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 2 * SIZE)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)  # would end a reader with a bus error
        reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(reopened, SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(reopened)
    finally:
        os.close(fd)


def _write_to_peer(ctx) -> None:
    own = HostMemory(SIZE, count=2, index=ctx.rank)
    server = FdServer(own.fd, 1, 10)
    ctx.store.set(f"place/{ctx.rank}", f"{server.name} {server.token}")
    name, token = ctx.store.get(f"place/{1 - ctx.rank}").decode().split()
    fd, pid = fetch_fd(1 - ctx.rank, name, token, 10)
    own.map_peer(1 - ctx.rank, fd)
    own.tensor(ctx.rank, 4096, (1,), torch.int64).fill_(100 + ctx.rank)
    ctx.barrier("written")
    assert int(own.tensor(1 - ctx.rank, 4096, (1,), torch.int64)) == 101 - ctx.rank
    ctx.barrier("read")
    if ctx.rank == 1:
        own.tensor(0, 4096, (1,), torch.int64).fill_(0)  # ends the process
        raise AssertionError("wrote to the region of rank 0")
    gone = select.poll()
    gone.register(os.pidfd_open(pid), select.POLLIN)
    assert gone.poll(10_000)
    assert int(own.tensor(0, 4096, (1,), torch.int64)) == 100


def test_a_peer_that_writes_to_a_region_it_has_mapped_dies_of_it():
    run_ranks(_write_to_peer, 2, dies=[1])


@pytest.mark.parametrize("token", ["00" * 16, "", "00", None], ids=["wrong", "none", "short", "almost right"])
def test_a_caller_without_the_token_gets_no_descriptor(server, token):
    if token is None:
        token = server.token[:-1] + ("0" if server.token[-1] != "0" else "1")
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(5)
        caller.connect("\0" + server.name)
        caller.sendall(bytes.fromhex(token))
        caller.shutdown(socket.SHUT_WR)
        data, fds, _, _ = socket.recv_fds(caller, 1, 4)
        assert (data, fds) == (b"", [])
    if len(token) == 32:
        with pytest.raises(MoeA2AError, match="rank 3 refused"):
            fetch_fd(3, server.name, token, 5)
    fd, _ = fetch_fd(0, server.name, server.token, 5)  # the right one is still served
    os.close(fd)


def test_a_server_stops_once_all_expected_callers_were_served(server):
    os.close(fetch_fd(0, server.name, server.token, 5)[0])
    with pytest.raises(MoeA2AError, match="rank 0"):
        os.close(fetch_fd(0, server.name, server.token, 0.5)[0])


def test_a_rank_that_is_not_on_this_host_is_named_with_the_way_out():
    with pytest.raises(RankLost) as caught:
        fetch_fd(5, "moe_a2a-nobody", "00" * 16, 0.5)
    assert caught.value.ranks == (5,)
    for word in ("rank 5", "host label", "MOE_A2A_HOST"):
        assert word in str(caught.value)


def test_a_region_of_another_size_is_not_mapped(memory):
    fd = os.memfd_create("other")
    try:
        os.ftruncate(fd, SIZE // 2)
        with pytest.raises(MoeA2AError, match=f"{SIZE // 2} bytes, expected {SIZE}"):
            memory.map_peer(1, fd)
    finally:
        os.close(fd)


def test_rows_of_all_regions_are_rows_of_one_table(memory):
    table = memory.table(128, torch.uint8)
    memory.tensor(0, 4096 + 3 * 128, (128,), torch.uint8).copy_(torch.arange(128, dtype=torch.uint8))
    assert torch.equal(table[memory.row(0, 4096, 128) + 3], torch.arange(128, dtype=torch.uint8))
    assert memory.row(1, 0, 128) == SIZE // 128
    assert memory.address(1, 5) - memory.address(0) == SIZE + 5


def test_a_window_is_the_region_itself_until_it_is_forgotten(memory):
    half = SIZE // 2
    first, second = memory.window(half, half), memory.window(half, half)
    ctypes.memset(first, 7, half)
    assert memory.bytes[:half] == bytes(half) and memory.bytes[half:SIZE] == b"\7" * half
    forget(first, half)
    ctypes.memset(first, 9, half)  # what is late does no harm, and does not crash
    assert memory.bytes[half:SIZE] == b"\7" * half
    ctypes.memset(second, 8, half)
    assert memory.bytes[half:SIZE] == b"\10" * half
    forget(second, half)


def test_addresses_of_a_forgotten_window_are_not_used_again(memory):
    past = set()
    for _ in range(20):
        window = memory.window(0, SIZE)
        assert window not in past
        past.add(window)
        forget(window, SIZE)


def test_a_fault_and_the_end_are_seen_by_those_who_map_the_region(memory):
    fd = os.dup(memory.fd)
    other = HostMemory(SIZE, count=2, index=1)
    try:
        other.map_peer(0, fd)
        assert other.fault(0) is None and not other.has_closed(0)
        memory.set_fault(0)
        assert other.fault(0) == 0
        memory.set_fault(6)
        assert other.fault(0) == 6
        memory.close()
        memory.close()
        assert other.has_closed(0) and not other.has_closed(1)
    finally:
        os.close(fd)
        other.close()


def test_the_memory_that_is_left_is_a_sensible_number():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= total


def test_regions_are_given_back_when_closed():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def maps() -> int:
        with open("/proc/self/maps") as f:
            return sum("memfd:moe_a2a" in line for line in f)

    before = descriptors(), maps()
    for _ in range(20):
        made = HostMemory(1 << 20, 2, 0)
        server = FdServer(made.fd, 1, 10)
        os.close(fetch_fd(0, server.name, server.token, 5)[0])
        server.close()
        made.close()
    assert (descriptors(), maps()) == before


def test_nothing_with_a_name_is_left_after_a_kill():
    shm = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    pid = os.fork()
    if pid == 0:
        HostMemory(1 << 20, 2, 0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    time.sleep(0.01)
    assert not {name for name in set(os.listdir("/dev/shm")) - shm if "moe" in name}
