"""What of GPU ranks can be tried without a GPU: refusals, and how waiting kernels hear of ranks that are gone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from moe_a2a import AllToAll, Config, ConfigError, Options, RankLost
from moe_a2a.bench.command import bench
from moe_a2a.gpu.layout import Layout
from moe_a2a.gpu.peers import Peers
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.wait import Watch

CONFIG = Config(8, 128, 2, 4)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def build(device: object, options: Options | None = None) -> AllToAll:
    store = dist.HashStore()
    return AllToAll(CONFIG, store=store, rank=0, world_size=1, device=device, options=options)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["xpu", "gpu", 3.5])
def test_a_device_that_is_neither_cpu_nor_cuda_is_refused(device: object) -> None:
    with pytest.raises(ConfigError, match=r"device=.*; allowed: 'cpu', 'cuda', 'cuda:0'"):
        build(device)


@no_gpu
def test_cuda_without_a_gpu_is_refused_and_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"without CUDA|torch sees no GPU|cuda-bindings"):
        build("cuda:1")


def test_an_object_says_on_which_device_it_is() -> None:
    with build("cpu") as a2a:
        assert a2a.device == torch.device("cpu")
        a2a.check()


def test_cpu_ranks_refuse_what_makes_buffers_of_gpu_ranks_smaller() -> None:
    with pytest.raises(ConfigError, match="leave it out on CPU ranks"):
        build("cpu", Options(fp8_only=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mode", "graph"], "--mode is for --device cuda"),
        (["--baseline", "nccl"], "--baseline nccl goes with another --device"),
        (["--device", "cuda", "--baseline", "gloo"], "--baseline gloo goes with another --device"),
        pytest.param(["--device", "cuda", "--ranks", "2"], "torch sees no GPU", marks=no_gpu),
    ],
)
def test_the_bench_refuses_options_that_do_not_go_together(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.replace("│", " ").split())


class Trio:
    """Ranks 0, 1 and 2 of a host as rank 0 sees them; the pages of the others are written by the test."""

    def __init__(self) -> None:
        self.memory = HostMemory(4096, 3, 0)
        self.others = {rank: HostMemory(4096, 3, rank) for rank in (1, 2)}
        for rank, other in self.others.items():
            self.memory.map_peer(rank, other.fd)
        self.watch = Watch(self.memory, (0, 1, 2), 0)
        self.alive = np.array([0b111, 0], dtype=np.int64)
        self.peers = Peers(self.memory, self.watch, 0, self.alive)

    def close(self) -> None:
        self.peers.close()
        self.watch.close()
        for memory in (*self.others.values(), self.memory):
            memory.close()


@pytest.fixture
def trio() -> Iterator[Trio]:
    made = Trio()
    yield made
    made.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(5e-3)


def test_the_bit_of_a_rank_that_dies_goes_at_once(trio: Trio) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    trio.watch.add_process(2, process.pid)
    time.sleep(0.1)
    trio.peers.check()
    assert trio.alive[0] == 0b111
    process.kill()
    process.wait()
    until(lambda: trio.alive[0] == 0b011)
    with pytest.raises(RankLost, match=r"rank 2 died \(the process is gone\)") as caught:
        trio.peers.check()
    assert caught.value.ranks == (2,)


def test_a_rank_that_closed_or_is_reported_missing_loses_its_bit(trio: Trio) -> None:
    trio.others[1].set_fault(2)
    until(lambda: trio.alive[0] == 0b011)
    trio.others[1].close()
    until(lambda: trio.alive[0] == 0b001)
    with pytest.raises(RankLost, match=r"rank 0: rank 2 is missing, as rank 1 reports$") as caught:
        trio.peers.check()
    assert caught.value.ranks == (2,)  # rank 1 closed because of it


def test_ranks_that_closed_of_their_own_accord_are_blamed(trio: Trio) -> None:
    trio.others[1].close()
    trio.others[2].set_fault(1)
    trio.others[2].close()
    until(lambda: trio.alive[0] == 0b001)
    with pytest.raises(RankLost, match=r"rank 0: rank 1 closed its AllToAll$") as caught:
        trio.peers.check()
    assert caught.value.ranks == (1,)


def test_what_this_rank_misses_reaches_the_others_and_ends_its_own_waits(trio: Trio) -> None:
    trio.peers.report([1])
    assert trio.alive[0] == 0b101
    assert trio.memory.fault(0) == 1


def test_the_host_hears_from_kernels_whom_they_miss_without_being_asked(trio: Trio) -> None:
    trio.alive[Layout.TOLD] = 0b010
    until(lambda: trio.alive[0] == 0b101)
    until(lambda: trio.memory.fault(0) == 1)
    with pytest.raises(RankLost, match="rank 1 was missing from a step") as caught:
        trio.peers.check()
    assert caught.value.ranks == (1,)


def test_ranks_are_left_out_and_taken_back_but_not_the_lost(trio: Trio) -> None:
    trio.peers.tolerate_missing()
    trio.peers.leave_out(0b010)
    assert trio.alive[0] == 0b101
    assert trio.peers.lost == {}
    trio.peers.check()
    trio.others[2].close()
    until(lambda: trio.alive[0] == 0b001)
    trio.peers.take_back(0b110)
    assert trio.alive[0] == 0b011


def test_where_ranks_may_be_missing_the_host_ends_waits_for_them_and_tells_nobody(trio: Trio) -> None:
    trio.peers.tolerate_missing()
    trio.others[2].set_fault(1)
    trio.alive[Layout.TOLD] = 0b100
    until(lambda: trio.alive[0] == 0b011)
    trio.alive[Layout.TOLD] = 0
    trio.peers.take_back(0b100)
    time.sleep(0.1)
    assert trio.alive[0] == 0b111
    assert trio.memory.fault(0) is None and trio.peers.lost == {}
