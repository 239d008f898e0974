"""Symmetric memory between processes on GPUs: mapped, written, read, unmapped, mapped again; and what outlives a death.

Figures are printed: run with -s to see them.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time

import pytest
import torch
from ranks import run_ranks

from moe_a2a import ConfigError, MoeA2AError
from moe_a2a.bootstrap import StoreBootstrap
from moe_a2a.transport.driver import Driver
from moe_a2a.transport.exchange import Offer, map_offered
from moe_a2a.transport.flags import FlagPage
from moe_a2a.transport.handover import FdServer, fetch_fd
from moe_a2a.transport.symmetric import SymmetricAllocator

triton = pytest.importorskip("triton", reason="needs Triton, which torch's CUDA builds bring")
tl = pytest.importorskip("triton.language")

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU")]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
#: The GPU of each rank.
PLACES = [pytest.param((0, 0), id="one GPU"), pytest.param((0, 1), id="two GPUs", marks=two_gpus)]
MB = 1_000_000
TIMEOUT_S = 30.0


@triton.jit
def _put(table, rank, first, value, N: tl.constexpr):
    """Store value, value + 1, ... at word `first` of a rank's region, found by its entry in the table."""
    base = tl.load(table + rank).to(tl.pointer_type(tl.int64))
    i = tl.arange(0, N)
    tl.store(base + first + i, value + i)


@triton.jit
def _wait_for_word(word, out, limit):
    """Read a word until it is not 0, at most `limit` times. out: the word, and how often it was read before."""
    count = tl.program_id(0).to(tl.int64)  # 0
    seen = count
    while (seen == 0) & (count < limit):
        seen = tl.inline_asm_elementwise(
            "ld.relaxed.sys.global.u64 $0, [$1];", "=l,l", [word], dtype=tl.int64, is_pure=False, pack=1
        )
        count += 1
    tl.store(out, seen)
    tl.store(out + 1, count)


class Member:
    """A rank of a test, with its allocator on its GPU."""

    def __init__(self, ctx, gpu: int, rank: int | None = None, world: int | None = None) -> None:
        self.rank, self.world = ctx.rank if rank is None else rank, ctx.world if world is None else world
        self.device = torch.device("cuda", gpu)
        torch.cuda.set_device(self.device)
        self.allocator = SymmetricAllocator(self.device, self.rank, self.world)
        self.bootstrap = StoreBootstrap(ctx.store, ctx.rank, ctx.world)

    def everyone(self, value: object = True) -> list:
        return self.bootstrap.all_gather(value, TIMEOUT_S)

    def map_all(self, region) -> None:
        offer = Offer(region, self.world - 1, TIMEOUT_S)
        for rank, message in enumerate(self.everyone(offer.message)):
            if rank != self.rank:
                map_offered(region, rank, message, TIMEOUT_S)
        self.everyone()
        offer.close()

    def sync(self) -> None:
        torch.cuda.synchronize(self.device)
        self.everyone()


def _free(gpu: int) -> int:
    return torch.cuda.mem_get_info(gpu)[0]


def _write_read_unmap_and_map_again(ctx, gpus: tuple[int, ...]) -> None:
    member = Member(ctx, gpus[ctx.rank])
    rank, world = member.rank, member.world
    region = member.allocator.allocate(5 * MB, "test")
    assert region.nbytes == 6 << 20 and region.mapped() == (rank,)
    words = region.nbytes // 8
    own = region.tensor(rank, 0, (words,), torch.int64)
    assert own.device == member.device and not own.any()
    assert region.table.tolist() == [region.address(r) if r == rank else 0 for r in range(world)]
    member.map_all(region)
    assert region.mapped() == tuple(range(world))
    assert region.table.tolist() == [region.address(r) for r in range(world)]
    # Every rank writes into every rank's region, by a tensor and by a kernel that only knows the table.
    for peer in range(world):
        place = region.tensor(peer, 4096 * rank, (256,), torch.int64)
        assert place.device == member.device and place.data_ptr() == region.address(peer, 4096 * rank)
        place.copy_(torch.arange(256, device=member.device) + 1000 * rank)
        _put[(1,)](region.table, peer, 512 * (world + rank), 5000 * (rank + 1), N=256)
    last = region.tensor((rank + 1) % world, region.nbytes - 2, (1,), torch.bfloat16)
    last.fill_(rank + 1.0)
    member.sync()
    for source in range(world):
        expected = torch.arange(256, device=member.device)
        for peer in range(world):  # the own region and, by reading, the others'
            assert torch.equal(region.tensor(peer, 4096 * source, (256,), torch.int64), expected + 1000 * source)
            put = region.tensor(peer, 4096 * (world + source), (256,), torch.int64)
            assert torch.equal(put, expected + 5000 * (source + 1))
    assert float(region.tensor(rank, region.nbytes - 2, (1,), torch.bfloat16)) == (rank - 1) % world + 1.0
    member.sync()
    # One peer goes, and comes back to the same address; a captured graph may hold that.
    peer = (rank + 1) % world
    graph = torch.cuda.CUDAGraph()
    mark = region.tensor(peer, 4096 * 100 + 8 * rank, (1,), torch.int64)
    mark.fill_(1)
    with torch.cuda.graph(graph):
        mark.add_(41)
    del mark
    before = region.address(peer)
    region.unmap_peer(peer)
    region.unmap_peer(peer)
    assert region.mapped() == tuple(r for r in range(world) if r != peer)
    assert region.table.tolist() == [0 if r == peer else region.address(r) for r in range(world)]
    with pytest.raises(MoeA2AError, match=f"rank {peer}'s memory is not mapped"):
        region.tensor(peer, 0, (1,), torch.int64)
    member.sync()
    offer = Offer(region, 1, TIMEOUT_S)
    messages = member.everyone(offer.message)
    with pytest.raises(MoeA2AError, match=f"rank {peer}'s memory region has 2097152 bytes, rank {rank}'s 6291456"):
        map_offered(region, peer, {**messages[peer], "nbytes": 2 << 20}, TIMEOUT_S)
    member.sync()
    offer.close()
    offer = Offer(region, 1, TIMEOUT_S)
    messages = member.everyone(offer.message)
    map_offered(region, peer, messages[peer], TIMEOUT_S)
    assert region.address(peer) == before and int(region.table[peer]) == before
    graph.replay()
    member.sync()
    assert int(region.tensor(peer, 4096 * 100 + 8 * rank, (1,), torch.int64)) == 42
    again = region.export()
    with pytest.raises(MoeA2AError, match=f"rank {peer} cannot be mapped"):
        region.map_peer(peer, again)
    again.close()
    member.sync()
    offer.close()
    member.allocator.close()
    with pytest.raises(MoeA2AError, match="closed"):
        region.tensor(rank, 0, (1,), torch.int64)


@pytest.mark.parametrize("gpus", [*PLACES, pytest.param((0, 1, 0, 1), id="four ranks on two GPUs", marks=two_gpus)])
def test_ranks_write_read_unmap_and_map_each_other_again(gpus):
    run_ranks(_write_read_unmap_and_map_again, len(gpus), gpus)


def _hidden(ctx) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(ctx.rank)
    assert torch.cuda.device_count() == 1
    member = Member(ctx, 0)
    region = member.allocator.allocate(MB, "test")
    member.map_all(region)
    region.tensor(1 - ctx.rank, 0, (8,), torch.int32).fill_(70 + ctx.rank)
    member.sync()
    assert region.tensor(ctx.rank, 0, (8,), torch.int32).tolist() == [71 - ctx.rank] * 8
    member.sync()


@two_gpus
def test_a_rank_maps_the_memory_of_a_gpu_that_it_does_not_see():
    run_ranks(_hidden, 2)


def _kill_nine(ctx, gpus: tuple[int, int]) -> dict[str, float] | None:
    """Process 1 dies as rank 1; rank 0 goes on with its memory, lets go of it, and maps process 2's in its place."""
    rank, nbytes = min(ctx.rank, 1), 512 << 20
    device = torch.device("cuda", gpus[rank])
    if ctx.rank == 2:
        ctx.store.wait(["unmapped"])
    torch.cuda.set_device(device)
    region = SymmetricAllocator(device, rank, 2).allocate(nbytes, "test")
    if rank == 1:
        region.tensor(1, 0, (nbytes,), torch.uint8).fill_(50 + ctx.rank)
        torch.cuda.synchronize()
        offer = Offer(region, 1, TIMEOUT_S)
        ctx.store.set(f"offer/{ctx.rank}", json.dumps(offer.message))
        ctx.store.wait([f"written/{ctx.rank}"])
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        assert bool((region.tensor(1, 0, (nbytes,), torch.uint8) == 9).all())
        return None

    def take(process: int) -> tuple[torch.Tensor, int]:
        pid = map_offered(region, 1, json.loads(ctx.store.get(f"offer/{process}")), TIMEOUT_S)
        assert pid is not None
        theirs = region.tensor(1, 0, (nbytes,), torch.uint8)
        assert bool((theirs == 50 + process).all())
        return theirs, pid

    theirs, pid = take(1)
    watch = os.pidfd_open(pid)
    ctx.store.set("written/1", "1")
    # From before the death to well after it, without a pause: write all of it, read all of it.
    started, died, rounds = time.monotonic(), None, 0
    while died is None or time.monotonic() - died < 1.5:
        theirs.fill_(1 + rounds % 200)
        assert bool((theirs == 1 + rounds % 200).all())
        rounds += 1
        if died is None and select.select([watch], [], [], 0)[0]:
            died = time.monotonic()
        assert time.monotonic() - started < 20
    os.close(watch)
    held = _free(gpus[1])
    del theirs
    region.unmap_peer(1)
    freed = _free(gpus[1]) - held
    assert freed >= nbytes, f"{freed} bytes of the dead rank came back, {nbytes} expected"
    own = region.tensor(0, 0, (nbytes,), torch.uint8)
    own.fill_(3)
    assert bool((own == 3).all())  # the context is whole
    ctx.store.set("unmapped", "1")
    theirs, _ = take(2)
    theirs.fill_(9)
    torch.cuda.synchronize()
    ctx.store.set("written/2", "1")
    return {"rounds over the dead rank's memory": rounds, "MB freed by unmapping it": freed / 1e6}


@pytest.mark.parametrize("gpus", PLACES)
def test_a_killed_rank_s_memory_serves_the_survivor_until_it_unmaps_it_and_a_successor_takes_the_place(gpus):
    print("kill -9:", run_ranks(_kill_nine, 3, gpus, dies=[1])[0])


def _bandwidth(ctx, gpus: tuple[int, int]) -> dict[str, float] | None:
    member = Member(ctx, gpus[ctx.rank])
    nbytes = 256 << 20
    region = member.allocator.allocate(nbytes, "test")
    member.map_all(region)
    result = None
    if ctx.rank == 0:
        local = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=member.device)
        remote = region.tensor(1, 0, (nbytes,), torch.uint8)
        result = {
            "write GB/s": _copy_speed(remote, local),
            "read GB/s": _copy_speed(local, remote),
        }
        assert torch.equal(local, remote)
    member.sync()
    return result


def _copy_speed(to: torch.Tensor, source: torch.Tensor) -> float:
    """Median over 20 copies."""
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        to.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return source.numel() / sorted(times[3:])[10] / 1e9


@two_gpus
def test_a_copy_over_the_mapping_runs_at_the_speed_of_the_link():
    speeds = run_ranks(_bandwidth, 2, (0, 1))[0]
    print("copy_ of 256 MiB over the mapping:", speeds)
    assert min(speeds.values()) > 250  # NVLink of Hopper: 391 by the copy engines; PCIe gives at most 55


def _come_and_go(ctx, gpus: tuple[int, int]) -> None:
    member = Member(ctx, gpus[ctx.rank])

    def round_of_life() -> None:
        region = member.allocator.allocate(64 << 20, "test")
        member.map_all(region)
        region.tensor(1 - ctx.rank, 0, (region.nbytes,), torch.uint8).fill_(1)
        region.unmap_peer(1 - ctx.rank)
        offer = Offer(region, 1, TIMEOUT_S)
        map_offered(region, 1 - ctx.rank, member.everyone(offer.message)[1 - ctx.rank], TIMEOUT_S)
        member.sync()
        offer.close()
        region.close()
        region.close()
        member.everyone()

    def held() -> tuple[int, int]:
        gc.collect()
        torch.cuda.empty_cache()
        member.sync()
        state = _free(gpus[ctx.rank]), len(os.listdir("/proc/self/fd"))
        member.everyone()
        return state

    for _ in range(2):
        round_of_life()
    before = held()
    for _ in range(15):
        round_of_life()
    assert held() == before, "(free bytes, open descriptors)"


@pytest.mark.parametrize("gpus", PLACES)
def test_nothing_is_left_after_regions_come_and_go(gpus):
    run_ranks(_come_and_go, 2, gpus)


def _owner_leaves(ctx, gpus: tuple[int, int]) -> None:
    member = Member(ctx, gpus[ctx.rank])
    region = member.allocator.allocate(512 << 20, "test")
    region.tensor(ctx.rank, 0, (region.nbytes,), torch.uint8).fill_(60 + ctx.rank)
    member.sync()
    member.map_all(region)
    free = _free(gpus[1])
    member.everyone()
    if ctx.rank == 1:
        member.allocator.close()
        assert _free(gpus[1]) < free + (256 << 20)  # the peer's mapping still holds it
    member.everyone()
    if ctx.rank == 0:
        theirs = region.tensor(1, 0, (region.nbytes,), torch.uint8)
        assert bool((theirs == 61).all())
        theirs.fill_(1)
        torch.cuda.synchronize()
        held = _free(gpus[1])
        region.unmap_peer(1)
        assert _free(gpus[1]) - held >= region.nbytes
    member.sync()


@pytest.mark.parametrize("gpus", PLACES)
def test_memory_that_its_owner_closed_is_freed_when_the_last_peer_unmaps_it(gpus):
    run_ranks(_owner_leaves, 2, gpus)


def _hold_on(ctx) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    allocator = SymmetricAllocator(device, 0, 4)
    torch.zeros(1, device=device)
    free = _free(0)
    for way in ("closed", "dropped"):
        region = allocator.allocate(256 << 20, "test") if way == "closed" else _unlisted(allocator)
        rows = region.tensor(0, 4096, (1000, 7168), torch.bfloat16)
        if way == "closed":
            region.close()
        del region
        rows.fill_(2.0)
        assert float(rows.sum(dtype=torch.float64)) == 2.0 * rows.numel()  # its memory is still there
        assert _free(0) <= free - (256 << 20)
        del rows
        gc.collect()
        torch.cuda.empty_cache()
        assert abs(_free(0) - free) < 64 << 20, way


def _unlisted(allocator: SymmetricAllocator):
    region = allocator.allocate(256 << 20, "test")
    allocator._regions.clear()
    return region


def test_a_tensor_keeps_the_own_memory_past_the_region_and_frees_it_when_it_goes():
    run_ranks(_hold_on, 1)


def _while_a_kernel_runs(ctx, gpus: tuple[int, int]) -> dict[str, float] | None:
    member = Member(ctx, gpus[ctx.rank])
    region = member.allocator.allocate(16 << 20, "test")
    member.map_all(region)
    offers = [Offer(region, 1, TIMEOUT_S) for _ in range(2)]
    messages = member.everyone([offer.message for offer in offers])
    result: dict[str, float] = {}
    if ctx.rank == 0:
        driver, address = member.allocator.driver, region.address(1)
        region.unmap_peer(1)
        map_offered(region, 1, messages[1][0], TIMEOUT_S)
        driver.unmap(address, region.nbytes)  # behind the region's back: without waiting
        busy = torch.cuda.Stream()
        running = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(busy):
            torch.cuda._sleep(2_000_000_000)
            running.record()

        def timed(name: str, do) -> None:
            start = time.perf_counter()
            do()
            result[f"{name} ms"] = (time.perf_counter() - start) * 1e3
            result[f"{name}, kernel still ran"] = not running.query()

        region._space.peers.discard(1)
        timed("map", lambda: map_offered(region, 1, messages[1][1], TIMEOUT_S))
        timed("driver's unmap alone", lambda: driver.unmap(address, region.nbytes))
        region._space.peers.discard(1)
        start = time.perf_counter()
        torch.cuda.synchronize()
        result["kernel's rest ms"] = (time.perf_counter() - start) * 1e3
        assert result["map, kernel still ran"], result
    member.sync()
    for offer in offers:
        offer.close()
    return result


@pytest.mark.parametrize("gpus", PLACES)
def test_a_peer_can_be_mapped_while_a_kernel_runs(gpus):
    print("beside a running kernel:", run_ranks(_while_a_kernel_runs, 2, gpus)[0])


def _too_large(ctx) -> None:
    device = torch.device("cuda", 0)
    allocator = SymmetricAllocator(device, 0, 2)
    total = torch.cuda.mem_get_info(0)[1]
    before = _free(0)
    with pytest.raises(ConfigError) as caught:
        allocator.allocate(total * 2, "max_tokens_per_rank=999999")
    for word in ("max_tokens_per_rank=999999", "are free", "rank 0's GPU", f"{total / 1e9:.1f} GB"):
        assert word in str(caught.value)
    assert _free(0) == before
    # What torch's cache holds, but no tensor uses, does not stand in the way.
    unused = torch.empty(int(_free(0) * 0.6), dtype=torch.uint8, device=device)
    del unused
    region = allocator.allocate(int(total * 0.6), "test")
    assert not region.tensor(0, 0, (1 << 30,), torch.uint8).any()
    allocator.close()


def test_too_little_memory_is_told_with_the_argument_that_asked_for_it():
    run_ranks(_too_large, 1)


def _fabric(ctx) -> str:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    why_not = Driver(device).why_no_fabric()
    if why_not:
        with pytest.raises(ConfigError, match="fabric handles cannot be used on cuda:0"):
            SymmetricAllocator(device, 0, 2, handles="fabric")
        assert SymmetricAllocator(device, 0, 2, handles="auto").handles == "fd"
        return f"not offered: {why_not}"
    member = Member(ctx, ctx.rank % GPUS)
    member.allocator = SymmetricAllocator(member.device, ctx.rank, ctx.world, handles="auto")
    assert member.allocator.handles == "fabric"
    region = member.allocator.allocate(MB, "test")
    member.map_all(region)
    region.tensor(1 - ctx.rank, 0, (8,), torch.int32).fill_(70 + ctx.rank)
    member.sync()
    assert region.tensor(ctx.rank, 0, (8,), torch.int32).tolist() == [71 - ctx.rank] * 8
    member.sync()
    return "work"


def test_fabric_handles_work_where_they_are_offered_and_are_refused_with_a_reason_elsewhere():
    print("fabric handles:", run_ranks(_fabric, 2)[0])


def _flags(ctx) -> float | None:
    if ctx.rank == 1:  # a watcher: no GPU
        fd, _ = fetch_fd(0, *ctx.store.get("page").decode().split(), TIMEOUT_S)
        page = FlagPage(None, fd)
        assert page.device_words is None
        ctx.store.wait(["kernel runs"])
        time.sleep(0.2)
        page.words[3] = 0x123456789ABCDEF
        deadline = time.monotonic() + 10
        while page.words[5] != 7:
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        page.close()
        return None
    torch.cuda.set_device(0)
    driver = Driver(torch.device("cuda", 0))
    page = FlagPage(driver)
    server = FdServer(page.fd, 1, TIMEOUT_S)
    ctx.store.set("page", f"{server.name} {server.token}")
    assert page.words.shape == (512,) and not page.words.any()
    flags = page.device_words
    assert flags is not None and flags.device == torch.device("cuda", 0) and flags.shape == (512,)
    out = torch.zeros(2, dtype=torch.int64, device="cuda:0")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for limit in (16, 32_000):  # the first compiles
        start.record()
        _wait_for_word[(1,)](flags[9:], out, limit)
        end.record()
        end.synchronize()
    assert out.tolist() == [0, 32_000]
    read_us = start.elapsed_time(end) * 1e3 / 32_000
    _wait_for_word[(1,)](flags[3:], out, 16_000_000)
    ctx.store.set("kernel runs", "1")
    torch.cuda.synchronize()
    seen, reads = out.tolist()
    assert seen == 0x123456789ABCDEF and reads > 1000  # written by the other process while the kernel ran
    flags[5] = 7
    torch.cuda.synchronize()
    assert page.words[5] == 7
    server.close()
    page.close()
    assert int(flags[5]) == 7  # a tensor keeps it pinned
    return read_us


def test_another_process_ends_a_kernel_s_wait_through_a_page_of_flags():
    print("one read of a pinned word by a kernel:", run_ranks(_flags, 2)[0], "us")
