"""Stores: one agreed sequence of views, whoever proposes at the same time, and whatever happens to the store."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import Etcd, gone, serving, tcp, wait_until_it_answers

from moe_a2a import ConfigError
from moe_a2a.errors import JoinRefused, MessageError, StoreAway
from moe_a2a.membership.store import Store, change, open_store, recall, split_url
from moe_a2a.membership.store_process import start_store
from moe_a2a.membership.view import LIFE, Endpoint, View, join, mark_failed, move_watcher, reserve


def first(ranks: int = 4, slots: int = 6) -> View:
    return View.of([Endpoint("127.0.0.1:1", 100 + r, f"host-{r // 2}") for r in range(ranks)], slots)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Servers that all tests here share; a test takes a group of its own."""
    started: dict[str, str] = {}
    with tcp(idle_s=120) as url:
        started["tcp"] = url
        yield started


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    wait_until_it_answers(server.url)
    yield server
    server.close()


@pytest.fixture(params=["tcp", "etcd"])
def url(request: pytest.FixtureRequest, servers: dict[str, str]) -> str:
    if request.param == "tcp":
        return servers["tcp"]
    server: Etcd = request.getfixturevalue("etcd")
    return server.url


_groups = iter(range(1_000_000))


@pytest.fixture
def group() -> str:
    return f"group-{next(_groups)}"


def test_only_the_first_change_of_an_epoch_is_made(url: str, group: str) -> None:
    one, two = open_store(url, group), open_store(url, group)
    assert one.get() is None
    view = first()
    assert one.compare_and_set(0, view) == view
    assert two.compare_and_set(0, mark_failed(view, {0: 100})) == view
    without_0, without_1 = mark_failed(view, {0: 100}), mark_failed(view, {1: 101})
    assert one.compare_and_set(1, without_0) == without_0
    assert two.compare_and_set(1, without_1) == without_0
    assert two.get() == without_0
    assert change(two, lambda v: mark_failed(v, {1: 101}), known=view).ranks == (2, 3)
    assert change(two, lambda v: mark_failed(v, {1: 101})).epoch == 3


def test_groups_of_one_store_do_not_see_each_other(url: str, group: str) -> None:
    one, other = open_store(url, group), open_store(url, group + "-other")
    one.compare_and_set(0, first())
    one.put("name", b"\x00value")
    assert other.get() is None and other.find("name") is None and one.find("name") == b"\x00value"


@pytest.mark.alone
def test_a_watch_ends_with_the_newest_view_or_with_its_time(url: str, group: str) -> None:
    store, watching = open_store(url, group), open_store(url, group)
    found: list[View | None] = []
    thread = threading.Thread(target=lambda: found.append(watching.watch(0, 10.0)))
    thread.start()
    time.sleep(0.2)
    store.compare_and_set(0, first())
    thread.join(timeout=5)
    assert found == [first()]
    started = time.monotonic()
    assert watching.watch(1, 0.3) is None
    assert 0.2 < time.monotonic() - started < 3.0
    change(store, lambda v: mark_failed(v, {0: 100}))
    change(store, lambda v: mark_failed(v, {1: 101}))
    newest = watching.watch(1, 5.0)
    assert newest is not None and newest.epoch in (2, 3)
    if newest.epoch == 2:
        newest = watching.watch(2, 5.0)
    assert newest is not None and newest.ranks == (2, 3)


def test_a_watcher_far_behind_still_finds_the_newest_view(url: str, group: str) -> None:
    store, late = open_store(url, group), open_store(url, group)
    view = store.compare_and_set(0, first())
    assert late.get() == view
    for port in range(2, 150):
        view = store.compare_and_set(view.epoch, move_watcher(view, "host-0", f"127.0.0.1:{port}"))
    assert late.watch(1, 5.0) == view
    assert late.compare_and_set(1, mark_failed(first(), {0: 100})) == view, "an old proposal began a second history"
    assert open_store(url, group).get() == view


def propose_many(url: str, group: str, seed: int, count: int, answers: mp.connection.Connection) -> None:
    """Random changes, and every view that a watch shows meanwhile."""
    choose = random.Random(seed)
    store: Store = open_store(url, group)
    watching = open_store(url, group)
    seen: dict[int, View] = {}
    done = threading.Event()

    def follow() -> None:
        epoch = 0
        while True:
            ended = done.is_set()
            view = watching.watch(epoch, 0.3)
            if view is not None:
                seen[view.epoch] = view
                epoch = view.epoch
            elif ended:
                return

    thread = threading.Thread(target=follow)
    thread.start()
    for number in range(count):
        rank, fresh = choose.randrange(6), seed * 1000 + number + 1000

        def transition(view: View, rank: int = rank, fresh: int = fresh, number: int = number) -> View:
            slot = view.slots[rank]
            if slot.takes_part:
                return mark_failed(view, {rank: slot.incarnation}, f"{seed}-{number}")
            if slot.state.value == "ready":
                return join(view, {rank: slot.incarnation}, [number])
            return reserve(view, rank, Endpoint("127.0.0.1:1", fresh, f"host-{rank}"))

        try:
            view = change(store, transition)
            assert seen.setdefault(view.epoch, view) == view
        except JoinRefused:
            pass
    done.set()
    thread.join()
    answers.send(seen)


def test_proposals_that_race_give_one_agreed_sequence_of_views(url: str, group: str) -> None:
    context = mp.get_context("forkserver")
    open_store(url, group).compare_and_set(0, first())
    pipes, processes = [], []
    for seed in range(4):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=propose_many, args=(url, group, seed + 1, 25, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    sequences: list[dict[int, View]] = []
    for pipe in pipes:
        assert pipe.poll(60)
        sequences.append(pipe.recv())
    for process in processes:
        process.join(timeout=10)
    agreed: dict[int, View] = {}
    for sequence in sequences:
        for epoch, view in sequence.items():
            assert agreed.setdefault(epoch, view) == view, f"two views have epoch {epoch}"
    last = open_store(url, group).get()
    assert last is not None and max(agreed) == last.epoch and agreed[last.epoch] == last
    assert all(max(sequence) == last.epoch for sequence in sequences), "somebody did not catch up"
    assert last.epoch > 50, "the proposals did not change much"


def test_what_a_stranger_wrote_into_a_store_gives_a_clear_error(servers: dict[str, str], group: str) -> None:
    import torch.distributed as dist

    _, host, port = split_url(servers["tcp"])
    raw = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    for key, call in (("value/x", lambda s: s.find("x")), ("after/0", lambda s: s.get()), ("head", lambda s: s.get())):
        raw.set(f"moe_a2a/{group}/{key}", "{not ours")
        with pytest.raises(MessageError):
            call(open_store(servers["tcp"], group))


def test_an_address_that_is_none_is_refused() -> None:
    for address in ("127.0.0.1:1", "redis://a:1", "tcp://a", "tcp://a:99999", "etcd://u:p@a:1", "tcp://a:1/x"):
        with pytest.raises(ConfigError, match="give tcp://HOST:PORT"):
            open_store(address, "g")
    with pytest.raises(ConfigError, match="letters, digits"):
        open_store("tcp://127.0.0.1:1", "a/b")
    with pytest.raises(ConfigError, match="give ADDRESS:PORT"):
        start_store("here")
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        start_store("192.0.2.1:0")


@pytest.mark.alone
def test_a_store_that_is_not_there_is_away() -> None:
    started = time.monotonic()
    for scheme in ("tcp", "etcd"):
        with pytest.raises(StoreAway, match="does not answer"):
            open_store(f"{scheme}://127.0.0.1:9", "g")
    assert time.monotonic() - started < 5


@pytest.mark.alone
def test_a_tcp_store_that_hangs_is_away_and_comes_back() -> None:
    with tcp() as url:
        store = open_store(url, "g")
        store.compare_and_set(0, first())
        pid = serving(url)
        os.kill(pid, signal.SIGSTOP)
        try:
            for call in (store.get, lambda: store.watch(1, 0.5)):
                started = time.monotonic()
                with pytest.raises(StoreAway, match="does not answer"):
                    call()
                assert time.monotonic() - started < 8
        finally:
            os.kill(pid, signal.SIGCONT)
        assert store.get() == first()


def test_a_tcp_store_that_lost_its_data_is_given_the_newest_view_that_anybody_knows() -> None:
    with tcp() as url:
        store, other = open_store(url, "g"), open_store(url, "g")
        old = store.compare_and_set(0, first())
        newer = store.compare_and_set(1, mark_failed(old, {0: 100}))
        os.kill(serving(url), signal.SIGKILL)
        with pytest.raises(StoreAway):
            store.get()
        assert start_store(url.removeprefix("tcp://"), idle_s=3) == url
        with pytest.raises(StoreAway, match="lost its data"):
            store.compare_and_set(2, mark_failed(newer, {1: 101}))
        with pytest.raises(StoreAway):
            other.watch(2, 1.0)
        with pytest.raises(StoreAway, match="lost its data"):
            other.watch(2, 1.0)
        found: list[View] = []
        late = threading.Thread(target=lambda: found.append(recall(open_store(url, "g"), newer, "host-1", 5.0)))
        early = threading.Thread(target=lambda: found.append(recall(store, old, "host-0", 5.0)))
        early.start()
        time.sleep(0.2)
        late.start()
        early.join()
        late.join()
        assert found[0] == found[1]
        assert found[0].epoch == LIFE and found[0].ranks == (1, 2, 3)
        assert other.watch(2, 2.0) == found[0]


def test_a_store_outlives_the_process_that_started_it_and_ends_with_its_last_user(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from moe_a2a.membership.store_process import start_store; "
        "print(start_store(idle_s=1.0), flush=True); os.killpg(0, signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGKILL
    url = done.stdout.strip()
    pid = serving(url)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert int(fields[1]) != os.getpid() and int(fields[3]) == pid, "it is in its starter's session"
    store = open_store(url, "g")
    time.sleep(2.5)
    assert store.get() is None, "it ended while it was in use"
    store.close()
    assert gone(pid, 6.0), "it stayed after its last user had gone"


def test_a_user_who_came_before_the_store_was_ready_is_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moe_a2a.cli", "store", "--listen", f"127.0.0.1:{port}", "--idle", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        early = socket.socket()
        try:
            deadline = time.monotonic() + 30
            while early.connect_ex(("127.0.0.1", port)) != 0:  # it listens a while before it serves
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            url = f"tcp://127.0.0.1:{port}"
            assert process.stdout is not None and process.stdout.readline().decode().strip() == url
            open_store(url, "g").close()  # from now on it ends a second after its last user
            late = socket.create_connection(("127.0.0.1", port))
            time.sleep(0.7)
            late.close()
            time.sleep(2.5)
            assert process.poll() is None, "it ended while it was in use"
            early.close()
            assert process.wait(6.0) == 0
        finally:
            early.close()
            process.kill()


def test_a_store_ends_on_a_signal() -> None:
    with tcp(idle_s=60) as url:
        pid = serving(url)
        os.kill(pid, signal.SIGTERM)
        assert gone(pid, 5.0)


def test_etcd_keeps_the_view_while_it_is_down(tmp_path: Path) -> None:
    server = Etcd(tmp_path)
    try:
        wait_until_it_answers(server.url)
        store = open_store(server.url, "g")
        view = store.compare_and_set(0, first())
        server.kill()
        with pytest.raises(StoreAway):
            store.get()
        server.start()
        wait_until_it_answers(server.url)
        assert store.get() == view and store.watch(0, 1.0) == view
    finally:
        server.close()


def test_a_host_whose_lease_ends_is_silent(etcd: Etcd, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_a2a.membership.etcd_store.LEASE_S", 1)
    monkeypatch.setattr("moe_a2a.membership.etcd_store.GRACE_S", 0.5)
    one, two = open_store(etcd.url, group), open_store(etcd.url, group)
    two.announce("host-2")
    deadline = time.monotonic() + 15
    silent: tuple[str, ...] = ()
    while not silent and time.monotonic() < deadline:
        one.announce("host-1")
        silent = one.silent()
        time.sleep(0.2)
    assert silent == ("host-2",)
    two.announce("host-2")
    assert one.silent() == ()


def etcdctl(url: str, *paths: str) -> None:
    """Set up users through the gateway: this machine may have no etcdctl."""
    import requests

    for path in paths:
        name, _, body = path.partition(" ")
        answer = requests.post(f"{url}/v3/{name}", data=body, timeout=5)
        assert answer.status_code == 200, answer.text


def test_etcd_with_user_and_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Etcd(tmp_path, ["--auth-token-ttl", "2"])
    try:
        wait_until_it_answers(server.url)
        etcdctl(
            server.client_url,
            'auth/user/add {"name":"root","password":"secret"}',
            'auth/user/grant {"user":"root","role":"root"}',
            "auth/enable {}",
        )
        with pytest.raises(ConfigError, match="set MOE_A2A_ETCD_USER and MOE_A2A_ETCD_PASSWORD"):
            open_store(server.url, "g")
        monkeypatch.setenv("MOE_A2A_ETCD_USER", "root")
        monkeypatch.setenv("MOE_A2A_ETCD_PASSWORD", "wrong")
        with pytest.raises(ConfigError, match="authentication failed"):
            open_store(server.url, "g")
        monkeypatch.setenv("MOE_A2A_ETCD_PASSWORD", "secret")
        store = open_store(server.url, "g")
        assert store.compare_and_set(0, first()) == first()
        assert store.watch(0, 1.0) == first()
        time.sleep(4)  # tokens live for 2 s
        assert store.get() == first() and store.watch(1, 0.3) is None
    finally:
        server.close()


def test_etcd_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=etcd"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
        ],
        capture_output=True,
    )
    assert made.returncode == 0, made.stderr
    flags = ["--cert-file", str(cert), "--key-file", str(key), "--client-cert-auth", "--trusted-ca-file", str(cert)]
    server = Etcd(tmp_path, flags, tls=True)
    try:
        monkeypatch.setenv("MOE_A2A_ETCD_CERT", str(cert))
        with pytest.raises(ConfigError, match="needs both"):
            open_store(server.url, "g")
        monkeypatch.setenv("MOE_A2A_ETCD_KEY", str(key))
        with pytest.raises(StoreAway, match="certificate verify failed"):
            open_store(server.url, "g")
        monkeypatch.setenv("MOE_A2A_ETCD_CA", str(cert))
        wait_until_it_answers(server.url)
        assert open_store(server.url, "g").compare_and_set(0, first()) == first()
        monkeypatch.delenv("MOE_A2A_ETCD_CERT")
        monkeypatch.delenv("MOE_A2A_ETCD_KEY")
        with pytest.raises(StoreAway):
            open_store(server.url, "g")
    finally:
        server.close()
