"""Construction: ranks meet, compare what they were given, and all raise alike if one of them cannot go on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ctx, host_labels, run_ranks
from steps import Case, run_case, run_step

from moe_a2a import AllToAll, Config, ConfigError, EngineError, MoeA2AError, Options, RankLost, rendezvous
from moe_a2a.bootstrap import StoreBootstrap
from moe_a2a.transport import engine
from moe_a2a.transport.engine import Engine

pytestmark = pytest.mark.alone

CASE = Case(experts=24, hidden=128)
CONFIG = CASE.config()


def refusal(kind: type[MoeA2AError], make: Callable[[], AllToAll], *words: str) -> MoeA2AError:
    """The error of a construction that must fail, with these words in its message."""
    with pytest.raises(kind) as caught:
        make().close()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
    return caught.value


# ---------------------------------------------------------------------------------------------- what ranks disagree on

DIFFERENCES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"num_experts": 48}, {}, ["num_experts", "24", "48"]),
    ({"hidden_size": 256}, {}, ["hidden_size", "128", "256"]),
    ({"top_k": 3}, {}, ["top_k", "4", "3"]),
    ({"max_tokens_per_rank": 14}, {}, ["max_tokens_per_rank", "13", "14"]),
    ({"dtype": torch.float16}, {}, ["dtype", "bfloat16", "float16"]),
    ({"channels": ("default", "other")}, {}, ["channels", "other"]),
    ({"channels": ("another",)}, {}, ["channels", "default", "another"]),
    ({}, {"timeout_s": 7.5}, ["timeout_s", "20", "7.5"]),
    ({}, {"protocol": "rdma"}, ["protocol", "tcp", "rdma"]),
    ({}, {"metadata_server": "etcd://here"}, ["metadata_server", "P2PHANDSHAKE", "etcd://here"]),
]


def _differ(ctx: Ctx) -> None:
    for changes, options, words in DIFFERENCES:
        mine = (changes, options) if ctx.rank == 2 else ({}, {})
        started = time.monotonic()
        refusal(ConfigError, lambda mine=mine: ctx.a2a(CASE.config(**mine[0]), **mine[1]), "rank 2", "rank 0", *words)
        assert time.monotonic() - started < 5
    with ctx.a2a(CONFIG) as a2a:
        run_step(a2a, CASE, 0, "masked")


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_difference_between_ranks_is_told_on_all_with_field_and_rank(hosts):
    run_ranks(_differ, 4, hosts=hosts)


def _cannot_share(ctx: Ctx) -> None:
    config = Config(num_experts=18, hidden_size=128, top_k=2, max_tokens_per_rank=4)
    refusal(ConfigError, lambda: ctx.a2a(config), "num_experts=18", f"{ctx.world} ranks", "redundant experts")


def test_experts_that_cannot_be_shared_out_equally_are_refused_on_all_ranks():
    run_ranks(_cannot_share, 4)


# -------------------------------------------------------------------------------------------------------------- memory


def _too_large(ctx: Ctx) -> None:
    config = Config(num_experts=8, hidden_size=7168, top_k=8, max_tokens_per_rank=10**8)
    words = ("GB", "max_tokens_per_rank=100000000", "14336", f"{ctx.world} ranks", "free", "lower max_tokens_per_rank")
    refusal(ConfigError, lambda: ctx.a2a(config), *words)
    # What fits one rank's machine may not fit another's.
    few = mock.patch.object(rendezvous, "available_memory", return_value=10_000)
    with few if ctx.rank == 1 else contextlib.nullcontext():
        words = ("GB", "max_tokens_per_rank=13", *(("rank 1 could not start",) if ctx.rank != 1 else ()))
        refusal(ConfigError, lambda: ctx.a2a(CONFIG), *words)
    with ctx.a2a(CONFIG) as a2a:
        run_step(a2a, CASE, 0, "masked")


@pytest.mark.parametrize("hosts", [1, 2])
def test_buffers_that_do_not_fit_are_refused_with_how_much_and_why(hosts):
    run_ranks(_too_large, 2, hosts=hosts)


def _buffers(ctx: Ctx, config: Config) -> int:
    with ctx.a2a(config) as a2a:
        return a2a.buffer_bytes


@pytest.mark.parametrize("hosts, factor", [(1, 1.1), (2, 1.6)])
@pytest.mark.parametrize("tokens, channels", [(128, ("a", "b")), (512, ("a",))])
def test_buffers_are_no_larger_than_the_rows_need(hosts, factor, tokens, channels):
    config = Config(num_experts=256, hidden_size=7168, top_k=8, max_tokens_per_rank=tokens, channels=channels)
    one_way = len(channels) * 2 * 4 * tokens * config.row_bytes
    assert max(run_ranks(_buffers, 4, config, hosts=hosts)) <= factor * 2 * one_way


# ---------------------------------------------------------------------------------------------------------------- names


def _names(ctx: Ctx) -> None:
    with ctx.a2a(CONFIG) as a2a:
        refusal(ConfigError, lambda: ctx.a2a(CONFIG), "channel 'default'", "in use", "other channel names")
        two = CASE.config(channels=("left", "default"))
        refusal(ConfigError, lambda: ctx.a2a(two), "channel 'default'", "in use")
        with ctx.a2a(CASE.config(channels=("left",))) as other:
            for step in range(3):
                run_step(a2a, CASE, step, "masked")
                run_step(other, CASE.replace(seed=1), step, "grouped")
    for step in range(3):  # the name is free again
        with ctx.a2a(CONFIG) as a2a:
            run_step(a2a, CASE, step, "contiguous")
    a2a.close()


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_channel_name_belongs_to_one_object_at_a_time(hosts):
    run_ranks(_names, 4, hosts=hosts)


def _same_keys(ctx: Ctx) -> None:
    for step in range(4):
        store = dist.PrefixStore("ep", ctx.store)  # another object, but the same keys
        options = Options(timeout_s=10, host=ctx.host)
        with AllToAll(CONFIG, store=store, rank=ctx.rank, world_size=ctx.world, options=options) as a2a:
            run_step(a2a, CASE, step, "masked")


def test_a_store_with_keys_of_earlier_objects_can_be_used_again():
    run_ranks(_same_keys, 4, hosts=2)


def _late(ctx: Ctx) -> None:
    """Keys of an object whose construction failed do not mislead the next."""
    for _ in range(3):
        if ctx.rank == 1:
            time.sleep(0.3)
        bad = CASE.config(top_k=3) if ctx.rank == 0 else CONFIG
        refusal(ConfigError, lambda bad=bad: ctx.a2a(bad), "top_k")
    with ctx.a2a(CONFIG) as a2a:
        run_step(a2a, CASE, 0, "masked")


def test_after_a_failed_construction_another_one_works():
    run_ranks(_late, 3)


# --------------------------------------------------------------------------------------------------------------- engine


def _no_wheel(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def _old_wheel(name: str) -> str:
    return "0.3.12" if name == "mooncake-transfer-engine-non-cuda" else _no_wheel(name)


def _engine_troubles() -> Iterator[tuple[Any, dict[str, Any], list[str]]]:
    """(what is wrong on one rank, options of all, words of the message)."""
    version = "moe_a2a.transport.engine.importlib.metadata.version"
    yield mock.patch(version, _no_wheel), {}, ["Mooncake Transfer Engine", "not installed", "pip install"]
    yield mock.patch(version, _old_wheel), {}, ["0.3.12", "too old", "0.3.13.post1"]
    yield mock.patch.dict(os.environ, MC_TCP_PROTO="1"), {}, ["MC_TCP_PROTO=1", "unset"]
    missing = ImportError("libibverbs.so.1: cannot open shared object file: No such file or directory")
    broken = mock.Mock(side_effect=missing)
    yield mock.patch("moe_a2a.transport.engine.importlib.import_module", broken), {}, ["libibverbs.so.1", "apt-get"]
    nothing = contextlib.nullcontext()
    yield nothing, {"protocol": "carrier-pigeon"}, ["protocol='carrier-pigeon'", "allowed: tcp, rdma"]
    yield mock.patch.object(engine, "rdma_devices", list), {"protocol": "rdma"}, ["'rdma' needs an RDMA device"]
    yield nothing, {"metadata_server": "http://127.0.0.1:1/metadata"}, ["metadata_server='http://127.0.0.1:1/metadata'"]


def _engine(ctx: Ctx) -> None:
    for trouble, options, words in _engine_troubles():
        everywhere = bool(options)
        with trouble if everywhere or ctx.rank == 1 else contextlib.nullcontext():
            if not everywhere and ctx.rank != 1:
                words = [*words, "rank 1 could not start"]
            refusal(EngineError, lambda options=options: ctx.a2a(CONFIG, **options), *words)
    with ctx.a2a(CONFIG) as a2a:
        run_step(a2a, CASE, 0, "masked")


def test_an_engine_that_one_rank_cannot_use_is_told_on_all_ranks():
    run_ranks(_engine, 4, hosts=2)


def _without_engine(ctx: Ctx) -> None:
    with mock.patch("moe_a2a.transport.engine.importlib.metadata.version", _no_wheel), ctx.a2a(CONFIG) as a2a:
        run_step(a2a, CASE, 0, "masked")


def test_one_host_needs_no_engine():
    run_ranks(_without_engine, 2)


def _unreachable(ctx: Ctx) -> None:
    get = Engine.get

    def misplaced(*settings: str) -> Engine:
        found = get(*settings)
        if ctx.rank == 2:
            found.name = "127.0.0.1:1"  # what it tells the others: a place where nobody listens
        return found

    started = time.monotonic()
    with mock.patch.object(Engine, "get", misplaced):
        error = refusal(RankLost, lambda: ctx.a2a(CONFIG, timeout_s=5.0), "rank 2", "127.0.0.1:1", " s)")
    assert time.monotonic() - started < 8
    assert error.ranks == (2,)
    assert ctx.rank == 0 or "rank 0 could not start" in str(error)


def _wrong_address(ctx: Ctx) -> None:
    options = {"host_address": "no-such-host.invalid"} if ctx.rank == 3 else {}
    error = refusal(
        RankLost, lambda: ctx.a2a(CONFIG, timeout_s=5.0, **options), "rank 3", "no-such-host.invalid", " s)"
    )
    assert error.ranks == (3,)


def test_a_rank_that_cannot_be_reached_is_told_on_all_with_address_and_time():
    run_ranks(_unreachable, 4, hosts=2)
    run_ranks(_wrong_address, 4, hosts=2)


# ------------------------------------------------------------------------------------------------------- ways to meet


def _absent(ctx: Ctx) -> None:
    if ctx.rank == 2:
        ctx.store.wait(["told/0", "told/1"])
        return
    started = time.monotonic()
    error = refusal(RankLost, lambda: ctx.a2a(CONFIG, timeout_s=1.0), "rank 2 did not come", "within 1 s")
    assert error.ranks == (2,) and 1 <= time.monotonic() - started < 3
    ctx.store.set(f"told/{ctx.rank}", "")


def test_a_rank_that_does_not_come_is_named():
    run_ranks(_absent, 3)


def _gone_since(ctx: Ctx) -> None:
    with ctx.a2a(CONFIG) as a2a:
        run_step(a2a, CASE, 0, "masked")
    _absent(ctx)


def test_a_rank_that_came_to_an_earlier_meeting_only_is_named():
    run_ranks(_gone_since, 3)


def _group(ctx: Ctx, kind: str, file: str) -> None:
    store = dist.PrefixStore("group", ctx.store) if kind == "tcp" else dist.FileStore(file, ctx.world)
    refusal(ConfigError, lambda: AllToAll(CONFIG), "init_process_group", "store=")
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=ctx.world, timeout=timedelta(seconds=20))
    try:
        options = Options(timeout_s=10, host=ctx.host)
        for step, group in enumerate((None, dist.group.WORLD, dist.new_group(range(ctx.world)))):
            with AllToAll(CONFIG, group, options=options) as a2a:
                assert (a2a.rank, a2a.world_size) == (ctx.rank, ctx.world)
                if group is not None:
                    refusal(ConfigError, lambda g=group: AllToAll(CONFIG, g, options=options), "channel 'default'")
                run_step(a2a, CASE, step, "masked")
        differing = CASE.config(top_k=5) if ctx.rank == 1 else CONFIG
        refusal(ConfigError, lambda: AllToAll(differing, options=options), "top_k", "rank 1")
        pair = dist.new_group([1, 3])
        if ctx.rank in (1, 3):
            with AllToAll(CONFIG, pair, options=options) as a2a:
                assert (a2a.rank, a2a.world_size) == (ctx.rank // 2, 2)
                run_step(a2a, CASE, 7, "grouped")
        else:
            with pytest.raises((ConfigError, ValueError)):
                AllToAll(CONFIG, pair, options=options)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind, hosts", [("tcp", 2), ("file", 1)])
def test_any_gloo_group_will_do_also_a_part_of_the_ranks(kind, hosts, tmp_path):
    run_ranks(_group, 4, kind, str(tmp_path / "store"), hosts=hosts)


class Folder:
    """A key-value store of the user's own: a folder of files."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def _file(self, key: str) -> Path:
        return self.path / key.replace("/", "_")

    def set(self, key: str, value: str, /) -> None:
        part = self._file(f"{key}.{os.getpid()}")
        part.write_text(value)
        part.rename(self._file(key))

    def get(self, key: str, /) -> bytes:
        return self._file(key).read_bytes()

    def wait(self, keys: Sequence[str], timeout: timedelta, /) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        while not all(self._file(key).exists() for key in keys):
            if time.monotonic() > deadline:
                raise KeyError(keys)
            time.sleep(1e-3)


def _folder(ctx: Ctx, path: str) -> None:
    options = Options(timeout_s=10, host=ctx.host)
    for step in range(3):
        with AllToAll(CONFIG, store=Folder(path), rank=ctx.rank, world_size=ctx.world, options=options) as a2a:
            run_step(a2a, CASE, step, "masked")


def test_anything_with_get_set_and_wait_will_do(tmp_path):
    run_ranks(_folder, 4, str(tmp_path), hosts=2)


def test_a_group_or_a_store_must_be_given_whole():
    store, options = dist.HashStore(), Options(timeout_s=1)

    def make(**given: Any) -> Callable[[], AllToAll]:
        return lambda: AllToAll(CONFIG, options=options, **given)

    refusal(ConfigError, make(store=store), "rank=", "world_size=")
    refusal(ConfigError, make(store=store, rank=0), "rank=", "world_size=")
    refusal(ConfigError, make(rank=0, world_size=1), "store=")
    refusal(ConfigError, make(store=store, rank=1, world_size=1), "rank=1", "world_size=1")
    refusal(ConfigError, make(store=store, rank=-1, world_size=1), "rank=-1")
    refusal(ConfigError, make(store=store, rank=0, world_size=0), "world_size=0")
    with make(store=store, rank=0, world_size=1)() as a2a:
        run_step(a2a, CASE, 0, "masked")


def test_ranks_that_meet_again_and_again_never_see_each_others_old_words():
    """Three ranks of one process, on one store, in threads: each meeting exchanges its own values."""
    store = dist.HashStore()
    results: list[list[Any]] = [[], [], []]

    def meet(rank: int) -> None:
        for round_ in range(20):
            bootstrap = StoreBootstrap(store, rank, 3)
            for part in range(3):
                results[rank].append(bootstrap.all_gather([round_, part, rank], 10))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = [[[round_, part, rank] for rank in range(3)] for round_ in range(20) for part in range(3)]
    assert results == [want] * 3


# ---------------------------------------------------------------------------------------------------------------- hosts


def _found_out(ctx: Ctx, label: str | None) -> Any:
    if label is not None:
        os.environ["MOE_A2A_HOST"] = label
    with ctx.a2a(CONFIG, host=None) as a2a:
        run_step(a2a, CASE, 0, "masked")
        return a2a.hosts


def test_ranks_of_one_machine_find_out_that_they_share_it():
    assert run_ranks(_found_out, 4, None) == [((0, 1, 2, 3),)] * 4


def _by_environment(ctx: Ctx) -> Any:
    return _found_out(ctx, f"h{ctx.rank % 2}")


def test_the_environment_can_split_a_machine_into_hosts():
    assert run_ranks(_by_environment, 4) == [((0, 2), (1, 3))] * 4


def _address_by_environment(ctx: Ctx) -> None:
    os.environ["MOE_A2A_HOST_ADDRESS"] = "no-such-host.invalid"
    refusal(RankLost, lambda: ctx.a2a(CONFIG, timeout_s=5.0), "no-such-host.invalid")
    with ctx.a2a(CONFIG, host_address="127.0.0.1") as a2a:
        run_step(a2a, CASE, 0, "masked")


def test_the_environment_gives_an_address_unless_the_options_do():
    run_ranks(_address_by_environment, 2, hosts=2)


def _host_address(ctx: Ctx) -> None:
    for step, address in enumerate(("127.0.0.1", "localhost")):
        with ctx.a2a(CONFIG, host_address=address) as a2a:
            run_step(a2a, CASE, step, "masked")


def test_a_host_address_may_be_given_as_a_number_or_a_name():
    run_ranks(_host_address, 2, hosts=2)


# ------------------------------------------------------------------------------------------------------------------ end


def _held() -> dict[str, int]:
    """What this process holds, but for sockets and threads of the engine, which keeps its connections."""
    places = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            places.append(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/self/maps") as f:
        maps = sum("memfd:moe_a2a" in line for line in f)
    return {
        "descriptors": sum(not place.startswith("socket:") for place in places),
        "memory descriptors": sum("memfd:moe_a2a" in place for place in places),
        "threads": threading.active_count(),
        "maps": maps,
    }


def _leaks(ctx: Ctx) -> None:
    def once(step: int) -> None:
        with ctx.a2a(CONFIG) as a2a:
            run_step(a2a, CASE, step, CASE.layouts[step % 3])
        ctx.barrier(f"closed {step}")

    for step in range(2):
        once(step)  # the engine, which stays, and torch's own threads
    before = _held()
    for step in range(2, 8):
        once(step)
    after = _held()
    assert after == before, f"{before} became {after}"
    with contextlib.suppress(ConfigError):
        ctx.a2a(CASE.config(top_k=2 + ctx.rank))
    with mock.patch.object(rendezvous, "fetch_fd", side_effect=MoeA2AError("no")), contextlib.suppress(MoeA2AError):
        ctx.a2a(CONFIG)
    ctx.barrier("failed")
    after = _held()
    assert after == before, f"a construction that failed left something behind: {before} became {after}"


@pytest.mark.parametrize("labels", [["a"] * 3, host_labels(4, 2)], ids=["1 host", "2 hosts"])
def test_nothing_is_left_when_an_object_is_closed(labels):
    run_ranks(_leaks, len(labels), hosts=labels)


def _dropped(ctx: Ctx) -> None:
    before = None
    for step in range(4):
        a2a = ctx.a2a(CONFIG)
        run_step(a2a, CASE, step, "masked")
        del a2a
        ctx.barrier(f"dropped {step}")
        before = before or _held()
    assert _held() == before


def test_an_object_that_is_dropped_gives_back_its_memory_and_its_names():
    run_ranks(_dropped, 2)


def _raises_inside(ctx: Ctx) -> None:
    with pytest.raises(ZeroDivisionError), ctx.a2a(CONFIG) as a2a:
        raise ZeroDivisionError
    ctx.barrier("left")
    a2a.close()
    with ctx.a2a(CONFIG) as a2a:
        run_step(a2a, CASE, 0, "masked")


def test_leaving_the_block_with_an_error_closes_too():
    run_ranks(_raises_inside, 2)


@contextlib.contextmanager
def _http_metadata_server() -> Iterator[str]:
    """The engine wheel's own metadata server, on a port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mooncake.http_metadata_server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None and time.monotonic() < deadline, "the metadata server did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/metadata"
    finally:
        server.kill()
        server.wait()


def _with_metadata_server(ctx: Ctx, url: str) -> None:
    run_case(ctx, Case(), metadata_server=url)


def test_engines_that_meet_through_a_metadata_server_move_rows():
    with _http_metadata_server() as url:
        run_ranks(_with_metadata_server, 4, url, hosts=2)
