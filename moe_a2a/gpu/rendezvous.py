"""Construction of GPU ranks: they meet as CPU ranks do, and map each other's memory on the GPUs of one host."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from moe_a2a.bootstrap import Bootstrap
from moe_a2a.config import Config, Options
from moe_a2a.errors import ConfigError
from moe_a2a.gpu.layout import Layout
from moe_a2a.gpu.peers import Peers
from moe_a2a.hosts import HostMap
from moe_a2a.rendezvous import Rounds, introduce
from moe_a2a.transport.driver import load_api
from moe_a2a.transport.exchange import Offer, map_offered
from moe_a2a.transport.flags import FlagPage
from moe_a2a.transport.handover import FdServer, fetch_fd
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.region import PAGE
from moe_a2a.transport.symmetric import SymmetricAllocator, SymmetricRegion
from moe_a2a.transport.wait import Watch


@dataclass
class GpuMeeting:
    """What construction leaves behind. regions: one for each channel. alive: the words in host memory, as a CUDA
    tensor."""

    hosts: HostMap
    layout: Layout
    regions: list[SymmetricRegion]
    alive: torch.Tensor
    peers: Peers
    resources: ExitStack


@dataclass
class _Opened:
    """What a rank offers to the others: its regions, and a page of host memory for news."""

    regions: list[SymmetricRegion]
    offers: list[Offer]
    memory: HostMemory
    server: FdServer
    page: FlagPage
    idle: Callable[[], None]


def find_device(device: torch.device) -> torch.device:
    """The device with its index. Raises ConfigError, saying what to do, where GPU ranks cannot run."""
    load_api()
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise ConfigError(f"device='cuda:{index}', but torch sees {count} GPUs (CUDA_VISIBLE_DEVICES hides others)")
    try:
        import triton
    except ImportError as error:
        raise ConfigError(f"GPU ranks need Triton ({error}), which torch's CUDA builds bring") from error
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, and kernels would run on the CPU; unset it for GPU ranks")
    return torch.device("cuda", index)


def _check_device(device: torch.device, options: Options) -> torch.device:
    """`find_device`, and whether the GPU has what the options ask for. Raises ConfigError."""
    found = find_device(device)
    processors = torch.cuda.get_device_properties(found).multi_processor_count
    if options.num_sms is not None and options.num_sms > processors:
        raise ConfigError(f"num_sms={options.num_sms}, but {found} has {processors} SMs; give 2 to {processors}")
    return found


def meet(config: Config, options: Options, bootstrap: Bootstrap, device: torch.device) -> GpuMeeting:
    """Build the group. Collective. Raises ConfigError, MoeA2AError or RankLost, on all ranks alike."""
    with ExitStack() as stack:
        meeting = _meet(config, options, bootstrap, device, stack)
        meeting.resources = stack.pop_all()
        return meeting


def _meet(config: Config, options: Options, bootstrap: Bootstrap, device: torch.device, stack: ExitStack) -> GpuMeeting:
    rounds = Rounds(bootstrap, options.timeout_s)
    rank, world = bootstrap.rank, bootstrap.world_size
    hellos = introduce(rounds, config, options, world, "cuda", lambda: _check_device(device, options))
    device = find_device(device)
    hosts = HostMap.from_labels([hello["host"] for hello in hellos])
    if len(hosts.ranks_of) > 1:
        raise ConfigError(
            f"these GPU ranks are on {len(hosts.ranks_of)} hosts ({hosts.ranks_of}), and GPU ranks across hosts come "
            "later: use the GPUs of one host, or CPU ranks"
        )

    def open_memory() -> _Opened:
        layout = Layout.of(config, world, options.fp8_only, options.recv_capacity)
        allocator = SymmetricAllocator(device, rank, world)
        stack.callback(allocator.close)
        reason = (
            f"2 parities of rows of {config.row_bytes} bytes for {layout.W} tokens (max_tokens_per_rank="
            f"{config.max_tokens_per_rank}, recv_capacity={options.recv_capacity}) of each of {world} ranks, for each "
            f"of {len(config.channels)} channels"
        )
        regions = [allocator.allocate(layout.region_bytes, reason) for _ in config.channels]
        offers = []
        for region in regions:
            offers.append(Offer(region, world - 1, options.timeout_s))
            stack.callback(offers[-1].close)
        page = FlagPage(allocator.driver)
        stack.callback(page.close)
        memory = HostMemory(PAGE, world, rank)
        stack.callback(memory.close)
        server = FdServer(memory.fd, world - 1, options.timeout_s)
        stack.callback(server.close)
        return _Opened(regions, offers, memory, server, page, allocator.driver.wait_until_idle)

    opened, places = rounds.run(open_memory, _published)

    def connect() -> Peers:
        watch = Watch(opened.memory, tuple(range(world)), rank)
        stack.callback(watch.close)
        for peer in range(world):
            if peer != rank:
                _map(opened, peer, places[peer], watch, options.timeout_s)
        opened.page.words[Layout.ALIVE] = (1 << world) - 1
        peers = Peers(opened.memory, watch, rank, opened.page.words[: Layout.HOST_WORDS])
        stack.callback(peers.close)
        # Closing runs from here upwards: kernels end, and only then are the others told that this rank has closed.
        stack.callback(opened.idle)
        return peers

    peers, _ = rounds.run(connect, lambda _: True)
    opened.server.close()
    for offer in opened.offers:
        offer.close()
    assert opened.page.device_words is not None
    layout = Layout.of(config, world, options.fp8_only, options.recv_capacity)
    return GpuMeeting(hosts, layout, opened.regions, opened.page.device_words[: Layout.HOST_WORDS], peers, stack)


def _published(opened: _Opened) -> dict[str, Any]:
    return {
        "regions": [offer.message for offer in opened.offers],
        "socket": opened.server.name,
        "token": opened.server.token,
    }


def _map(opened: _Opened, peer: int, place: dict[str, Any], watch: Watch, timeout_s: float) -> None:
    messages: Sequence[dict[str, Any]] = place["regions"]
    for region, message in zip(opened.regions, messages, strict=True):
        map_offered(region, peer, message, timeout_s)
    fd, pid = fetch_fd(peer, place["socket"], place["token"], timeout_s)
    try:
        opened.memory.map_peer(peer, fd)
    finally:
        os.close(fd)
    watch.add_process(peer, pid)
