"""The Transfer Engine: what is refused before it can do harm, and that a write arrives."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from moe_a2a import EngineError
from moe_a2a.transport import engine as module
from moe_a2a.transport.engine import Engine, check_protocol, load


def refused(*words: str) -> str:
    """The message of load()'s refusal, which holds all words."""
    with pytest.raises(EngineError) as caught:
        load()
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def install(monkeypatch, **versions: str) -> None:
    """Pretend that these wheels are installed and no others: name with _ for -, and its version."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_an_engine_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    install(monkeypatch)
    refused("Mooncake Transfer Engine", "not installed", "pip install", "mooncake-transfer-engine", "moe-a2a doctor")


@pytest.mark.parametrize("version", ["0.3.13", "0.3.9", "0.3.13rc1"])
def test_an_engine_without_acknowledged_writes_is_too_old(monkeypatch, version):
    install(monkeypatch, mooncake_transfer_engine=version)
    refused(f"mooncake-transfer-engine {version}", "too old", "0.3.13.post1", "pip install")


def test_the_oldest_engine_that_will_do_and_newer_ones_are_accepted(monkeypatch):
    for version in ("0.3.13.post1", "0.3.14", "1.0"):
        install(monkeypatch, mooncake_transfer_engine_non_cuda=version)
        assert hasattr(load(), "TransferEngine")


def test_unacknowledged_writes_asked_for_by_the_environment_are_refused(monkeypatch):
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    refused("MC_TCP_PROTO=1", "unset")


@pytest.mark.parametrize(
    "library, fix",
    [
        ("libibverbs.so.1", "apt-get install"),
        ("libcuda.so.1", "pip install"),
        ("libfoo.so.9", "apt-file search libfoo.so.9"),
    ],
)
def test_a_library_that_is_missing_is_named_with_what_to_do(monkeypatch, library, fix):
    def fail(name: str, *args: object) -> None:
        raise ImportError(f"{library}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(module.importlib, "import_module", fail)
    refused(library, "cannot be loaded", fix)


@pytest.mark.parametrize("protocol", ["TCP", "nvlink_intra", "quic", "efa"])
def test_a_protocol_that_is_not_offered_is_refused_with_those_that_are(protocol):
    with pytest.raises(EngineError) as caught:
        check_protocol(SimpleNamespace(SUPPORT_EFA=False), protocol, "")
    for word in (f"protocol={protocol!r}", "tcp", "rdma"):
        assert word in str(caught.value)


def test_rdma_without_a_device_is_refused_and_not_replaced_by_tcp(monkeypatch):
    monkeypatch.setattr(module, "rdma_devices", list)
    with pytest.raises(EngineError, match=r"'rdma' needs an RDMA device.*protocol='tcp'"):
        check_protocol(SimpleNamespace(), "rdma", "")


def test_a_device_filter_is_checked_against_the_machine(monkeypatch):
    monkeypatch.setattr(module, "rdma_devices", lambda: ["mlx5_0", "mlx5_1"])
    check_protocol(SimpleNamespace(), "rdma", "mlx5_1")
    check_protocol(SimpleNamespace(), "rdma", "mlx5_0,mlx5_1")
    with pytest.raises(EngineError, match=r"mlx5_7.*mlx5_0, mlx5_1"):
        check_protocol(SimpleNamespace(), "rdma", "mlx5_0,mlx5_7")


def _write_to_the_other(ctx) -> None:
    engine = Engine.get("127.0.0.1", "tcp", "", "P2PHANDSHAKE")
    assert Engine.get("127.0.0.1", "tcp", "", "P2PHANDSHAKE") is engine
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    engine.register(memory.data_ptr(), len(memory))
    ctx.store.set(f"place/{ctx.rank}", f"{engine.name} {memory.data_ptr()}")
    peer, address = ctx.store.get(f"place/{1 - ctx.rank}").decode().split()
    half = len(memory) // 2
    memory[:half] = torch.arange(half) % 251 + ctx.rank
    batch = engine.submit_write(peer, memory.data_ptr(), int(address) + half, half)
    deadline = time.monotonic() + 10
    while not engine.is_done(batch, peer):
        assert time.monotonic() < deadline
    ctx.barrier("applied")  # done means that it is there
    want = (torch.arange(half) % 251 + 1 - ctx.rank).to(torch.uint8)
    assert torch.equal(memory[half:], want)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1 .*tcp"):
        _write_to_nobody(engine, memory.data_ptr(), int(address))
    engine.unregister(memory.data_ptr())


def _write_to_nobody(engine: Engine, source: int, target: int) -> None:
    deadline = time.monotonic() + 10
    batch = engine.submit_write("127.0.0.1:1", source, target, 64)
    while not engine.is_done(batch, "127.0.0.1:1"):
        assert time.monotonic() < deadline


def test_a_write_that_is_done_has_been_applied_and_one_to_nobody_fails():
    run_ranks(_write_to_the_other, 2)


def _reach(ctx, stop):
    """Rank 0 writes to rank 1 for the first time, which is stopped, and to rank 2 meanwhile."""
    engine = Engine("127.0.0.1", "tcp", "", module.P2P)
    memory = torch.zeros(4096, dtype=torch.uint8)
    engine.register(memory.data_ptr(), 4096)
    ctx.store.set(f"place/{ctx.rank}", f"{engine.name} {memory.data_ptr()} {os.getpid()}")
    if ctx.rank:
        ctx.store.wait(["over"])
        return None
    places = [ctx.store.get(f"place/{rank}").decode().split() for rank in (1, 2)]

    def reach(place):
        started = time.monotonic()
        engine.reach(place[0], memory.data_ptr(), int(place[1]), 64, 1.0)
        return time.monotonic() - started

    reach(places[1])
    if stop:
        os.kill(int(places[0][2]), signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineError):
            reach(places[0])
        took = time.monotonic() - started
        os.kill(int(places[0][2]), signal.SIGCONT)
    else:
        took = reach(places[0])
    reach(places[1])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # it is not given up for ever
        with contextlib.suppress(EngineError):
            reach(places[0])
            break
    ctx.store.set("over", "1")
    return took


@pytest.mark.parametrize("stop", [False, True])
def test_the_first_write_to_a_process_that_hangs_ends(stop):
    """The engine itself waits for a minute for its answer."""
    assert run_ranks(_reach, 3, stop)[0] < 15
