"""What GPU ranks are told when their memory cannot be made or mapped.

The CUDA driver is a stand-in that fails as asked; tests/gpu/test_symmetric.py has the real one.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from fake_driver import GRANULE, FakeApi

from moe_a2a import ConfigError, MoeA2AError
from moe_a2a.transport import driver as driver_module
from moe_a2a.transport import gpu as gpu_module
from moe_a2a.transport.allocator import PeerHandle
from moe_a2a.transport.device_view import part
from moe_a2a.transport.driver import Driver, DriverError, beside_captures, load_api
from moe_a2a.transport.exchange import Offer, map_offered
from moe_a2a.transport.flags import FlagPage
from moe_a2a.transport.gpu import Gpu, describe_link
from moe_a2a.transport.symmetric import SymmetricAllocator

OWN = Gpu("NVIDIA H200", "aaaa-0", "0000:0f:00.0", "this machine")
PEER = Gpu("NVIDIA H200", "bbbb-1", "0000:87:00.0", "this machine")
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
NOT_PERMITTED = "CUDA_ERROR_NOT_PERMITTED"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with two GPUs, in words."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_500_000_000, 150_000_000_000))
    monkeypatch.setattr(Gpu, "of", classmethod(lambda *_: OWN))
    monkeypatch.setattr(Gpu, "ordinal", lambda self: {OWN.uuid: 0, PEER.uuid: 1}.get(self.uuid))
    monkeypatch.setattr(gpu_module, "_nvidia_smi", lambda *arguments: TOPOLOGY if "topo" in arguments else LISTING)
    yield
    gc.collect()  # regions that a caught exception still holds go while the driver is replaced


LISTING = "0, GPU-aaaa-0\n1, GPU-bbbb-1\n2, GPU-cccc-2\n"
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tSYS\tNV18\tPXB\t0-31\t0\t\tN/A
GPU1\tSYS\t X \tPIX\tSYS\t32-63\t1\t\tN/A
GPU2\tNV18\tPIX\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPXB\tSYS\tSYS\t X \t\t\t

Legend:

  X    = Self
"""


def allocator(api: FakeApi, **options) -> SymmetricAllocator:
    """Rank 0 of 4, with tensors on the CPU."""
    device = torch.device("cuda", 0)
    driver = Driver(device, api)
    driver.device = torch.device("cpu")
    return SymmetricAllocator(device, 0, 4, driver=driver, **options)


def handle(nbytes: int = GRANULE, gpu: Gpu = PEER) -> PeerHandle:
    return PeerHandle(nbytes, gpu, fd=0)


def test_an_amd_gpu_is_refused_with_what_is_supported(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    with pytest.raises(ConfigError, match=r"AMD GPUs \(ROCm 6.4.1\), which are not supported") as caught:
        load_api()
    assert "NVIDIA GPUs and a CUDA build of torch" in str(caught.value) and "CPU ranks" in str(caught.value)


def test_a_torch_without_cuda_a_missing_package_and_a_missing_gpu_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="a build without CUDA"):
        load_api()
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ConfigError, match=r'cuda-bindings.*pip install "moe-a2a\[cuda12\]"'):
        load_api()
    monkeypatch.setattr(driver_module.importlib, "import_module", lambda _: FakeApi())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        load_api()


def test_an_old_driver_and_a_gpu_without_virtual_memory_are_refused():
    with pytest.raises(ConfigError, match=r"supports CUDA 11.8, GPU ranks need 12.0: install driver 525"):
        allocator(FakeApi(version=11080))
    with pytest.raises(ConfigError, match="GPU 0 has no virtual-memory management"):
        allocator(FakeApi(missing="VIRTUAL_MEMORY"))
    with pytest.raises(ConfigError, match="no memory handles as file descriptors"):
        allocator(FakeApi(missing="POSIX_FILE"))


def test_a_thread_s_capture_mode_is_relaxed_for_a_while_and_put_back_after_a_failure_too():
    api = FakeApi()
    api.capture_mode = "what it was"

    def fail() -> None:
        with beside_captures(api):
            raise ValueError(api.capture_mode)

    with pytest.raises(ValueError, match="CU_STREAM_CAPTURE_MODE_RELAXED"):
        fail()
    assert api.capture_mode == "what it was"


def test_gpus_that_cannot_map_each_other_are_named_with_the_link_between_them():
    api = FakeApi(peers=False)
    region = allocator(api).allocate(1, "test")
    with pytest.raises(ConfigError) as caught:
        region.map_peer(3, handle())
    assert str(caught.value).startswith(
        "rank 0 (NVIDIA H200 at 0000:0f:00.0) cannot map the memory of rank 3 (NVIDIA H200 at 0000:87:00.0): "
        "the driver allows no peer access between the two; no NVLink joins them, only PCIe and the link between CPU "
        "sockets (SYS)."
    )
    assert api.count("cuMemMap") == 1 and not api.imported and region.mapped() == (0,)


def test_two_ranks_on_one_gpu_need_no_peer_access():
    region = allocator(FakeApi(peers=False)).allocate(1, "test")
    region.map_peer(1, handle(gpu=OWN))
    assert region.mapped() == (0, 1)


@pytest.mark.parametrize("call", ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"])
def test_a_mapping_that_the_driver_refuses_names_the_pair_and_leaves_nothing_behind(call):
    api = FakeApi()
    region = allocator(api).allocate(1, "test")
    unmapped, released = api.count("cuMemUnmap"), api.count("cuMemRelease")
    api.failures[call] = ["CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"]
    hidden = Gpu("NVIDIA H200", "cccc-2", "0000:90:00.0", OWN.machine)  # not seen by this process, so tried
    with pytest.raises(ConfigError, match=rf"rank 2 \({hidden}\): {call} failed: peer access unsupported") as caught:
        region.map_peer(2, handle(gpu=hidden))
    assert "they are joined by NVLink (NV18)" in str(caught.value)
    assert region.table.tolist() == [region.address(0), 0, 0, 0]
    assert api.count("cuMemUnmap") - unmapped == (call == "cuMemSetAccess")
    assert api.count("cuMemRelease") - released == (call != "cuMemImportFromShareableHandle")
    region.map_peer(2, handle(gpu=hidden))  # it may be tried again
    assert region.table.tolist() == [region.address(0), 0, region.address(2), 0]


@pytest.mark.parametrize("rank", [0, 1, 4, -1])
def test_a_rank_without_a_free_place_is_not_mapped(rank):
    region = allocator(FakeApi()).allocate(1, "test")
    region.map_peer(1, handle())
    with pytest.raises(MoeA2AError, match=rf"rank {rank} cannot be mapped: ranks 0 to 3 have a place, and \(0, 1\)"):
        region.map_peer(rank, handle())


def test_a_peer_with_a_region_of_another_size_is_not_mapped():
    region = allocator(FakeApi()).allocate(GRANULE + 1, "test")
    assert region.nbytes == 2 * GRANULE
    with pytest.raises(MoeA2AError, match=f"rank 1's memory region has {GRANULE} bytes, rank 0's {2 * GRANULE}"):
        region.map_peer(1, handle(GRANULE))


def test_a_peer_is_taken_out_of_the_table_and_waited_for_before_it_is_unmapped():
    api = FakeApi()
    region = allocator(api).allocate(1, "test")
    region.map_peer(2, handle())
    api.calls.clear()
    region.unmap_peer(2)
    region.unmap_peer(2)
    region.unmap_peer(3)
    assert api.calls == ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuCtxSynchronize", "cuMemUnmap"]
    assert region.table.tolist() == [region.address(0), 0, 0, 0]
    with pytest.raises(MoeA2AError, match=r"rank 2's memory is not mapped; \(0,\) are"):
        region.tensor(2, 0, (1,), torch.uint8)


def test_too_little_memory_names_the_argument_after_torch_s_cache_was_emptied(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    api = FakeApi(cuMemCreate=[OUT_OF_MEMORY])
    allocator(api).allocate(1, "test")
    assert emptied == [True]
    api = FakeApi(cuMemCreate=[OUT_OF_MEMORY, OUT_OF_MEMORY])
    with pytest.raises(ConfigError, match=r"4.001 GB \(max_tokens_per_rank=4096\), but 1.500 of 150.0 GB are free"):
        allocator(api).allocate(4_000_000_000, "max_tokens_per_rank=4096")
    with pytest.raises(DriverError, match="not permitted"):  # another failure is not taken for this one
        allocator(FakeApi(cuMemCreate=[NOT_PERMITTED])).allocate(1, "test")


@pytest.mark.parametrize("call", ["cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"])
def test_a_region_that_fails_half_way_gives_back_what_it_had(call):
    api = FakeApi(**{call: [NOT_PERMITTED]})
    with pytest.raises(DriverError, match=call):
        allocator(api).allocate(1, "test")
    reserved, mapped = call != "cuMemAddressReserve", call in ("cuMemSetAccess", "cuMemsetD8Async")
    assert api.count("cuMemRelease") == 1
    assert api.count("cuMemAddressFree") == reserved and api.count("cuMemUnmap") == mapped


def test_a_closed_region_gives_everything_back_and_says_that_it_is_closed():
    api = FakeApi()
    region = allocator(api).allocate(1, "test")
    for rank in (1, 3):
        region.map_peer(rank, handle())
    api.calls.clear()
    region.close()
    region.close()
    assert api.count("cuMemUnmap") == 3 and api.count("cuMemRelease") == api.count("cuMemAddressFree") == 1
    for use in (region.export, region.mapped, lambda: region.unmap_peer(1)):
        with pytest.raises(MoeA2AError, match="of rank 0 is closed"):
            use()


def test_closing_after_a_kernel_s_fault_logs_and_does_not_hide_the_fault(caplog):
    api = FakeApi()
    region = allocator(api).allocate(1, "test")
    region.map_peer(1, handle())
    api.failures["cuCtxSynchronize"] = ["CUDA_ERROR_ILLEGAL_ADDRESS"] * 2
    region.close()
    assert api.count("cuMemUnmap") == 0
    assert "ranks [1] stays mapped until this process ends" in caplog.text and "illegal address" in caplog.text


def test_fabric_handles_are_refused_with_a_reason_or_left_out_by_a_logged_choice(caplog):
    caplog.set_level(logging.INFO)
    for api, why in (
        (FakeApi(version=12020), "the driver supports CUDA 12.2, they came with 12.3"),
        (FakeApi(missing="FABRIC"), "the GPU does not offer them"),
        (FakeApi(cuMemCreate=[NOT_PERMITTED] * 2), "IMEX channel"),
        (FakeApi(cuMemExportToShareableHandle=[NOT_PERMITTED] * 2), "cuMemExportToShareableHandle failed"),
    ):
        with pytest.raises(ConfigError, match=f"fabric handles cannot be used on cuda:0: .*{why}"):
            allocator(api, handles="fabric")
        caplog.clear()
        assert allocator(api, handles="auto").handles == "fd"
        assert "of kind fd: " in caplog.text and why in caplog.text
    assert allocator(FakeApi(), handles="auto").handles == "fabric"


def test_a_fabric_handle_travels_in_the_message_and_needs_no_socket():
    api = FakeApi()
    region = allocator(api, handles="fabric").allocate(1, "test")
    offer = Offer(region, 3, 1.0)
    assert "socket" not in offer.message
    assert map_offered(region, 1, offer.message, 1.0) is None
    assert api.imported == [bytes(range(64))]
    offer.close()
    with pytest.raises(MoeA2AError, match="64 bytes, this one 3"):
        map_offered(region, 2, {**offer.message, "fabric": "010203"}, 1.0)
    with pytest.raises(MoeA2AError, match="rank 2 offers memory as 'win32'; do all ranks run one version"):
        map_offered(region, 2, {**offer.message, "kind": "win32"}, 1.0)


def test_a_descriptor_travels_over_the_socket_and_none_stays_open():
    region = allocator(FakeApi()).allocate(1, "test")
    before = len(os.listdir("/proc/self/fd"))
    offer = Offer(region, 2, 5.0)
    for rank in (1, 2):
        assert map_offered(region, rank, offer.message, 5.0) == os.getpid()
    with pytest.raises(MoeA2AError, match="rank 3"):  # the offer was for two
        map_offered(region, 3, offer.message, 0.5)
    offer.close()
    offer.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert region.mapped() == (0, 1, 2)


@pytest.mark.parametrize(
    "peer, text",
    [
        (PEER, "no NVLink joins them, only PCIe and the link between CPU sockets (SYS)"),
        (Gpu("B", "cccc-2", "", OWN.machine), "they are joined by NVLink (NV18)"),
        (Gpu("B", "dddd-3", "", OWN.machine), "is not known"),
        (Gpu("B", "bbbb-1", "", "another machine"), "in different machines"),
    ],
)
def test_the_link_between_two_gpus_in_words(peer, text):
    assert text in describe_link(OWN, peer)


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 30), None])
def test_a_link_is_unknown_where_nvidia_smi_is_of_no_help(error):
    def run(*_: str) -> str:
        if error:
            raise error
        return "No devices were found"

    assert "is not known" in describe_link(OWN, PEER, run)


def test_places_outside_a_region_or_between_elements_are_refused():
    data = torch.zeros(64, dtype=torch.uint8)
    assert part(data, 8, (2, 3), torch.int64).shape == (2, 3) and part(data, 64, (0, 5), torch.int32).shape == (0, 5)
    for offset, count in ((0, 9), (8, 8), (-8, 1)):
        with pytest.raises(ValueError, match="outside a region of 64 bytes"):
            part(data, offset, (count,), torch.int64)
    with pytest.raises(ValueError, match="offset 4 is not a multiple of"):
        part(data, 4, (1,), torch.int64)


def test_a_page_of_flags_is_seen_by_whoever_has_its_descriptor():
    page = FlagPage(None)
    other = FlagPage(None, os.dup(page.fd))
    page.words[511] = -5
    assert other.words[511] == -5 and other.words.shape == (512,) and other.device_words is None
    other.words[0] = 1 << 62
    page.close()
    page.close()
    assert other.words[0] == 1 << 62
    other.close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MoeA2AError, match="cannot map a page of flags"):
        FlagPage(None, os.memfd_create("empty"))
    assert len(os.listdir("/proc/self/fd")) == before
