"""Groups of processes: ranks that die, join, leave and come back, and what becomes of their watchers and store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import members as m
import pytest
from members import Group, Process, Refused
from stores import Etcd, gone, serving, tcp, wait_until_it_answers

from moe_a2a import ConfigError
from moe_a2a.membership.control import Died, Message, NewView, encode
from moe_a2a.membership.member import MemberOptions
from moe_a2a.membership.store import open_store
from moe_a2a.membership.view import LIFE, mark_failed, reborn

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A store for all tests that let it live; every group has a name of its own."""
    with tcp(idle_s=120) as shared:
        yield shared


def test_every_survivor_masks_a_rank_that_was_killed(url: str) -> None:
    with Group(url, 4, 2) as group:
        assert [rank.call(m.active) for rank in group.members] == [(1, (0, 1, 2, 3))] * 4
        victim = group[0]  # rank 0 is no more than any other
        survivors = group.members[1:]
        for rank in survivors:
            rank.tell(m.masks, 0, victim.incarnation)
        time.sleep(0.05)
        killed = time.monotonic()
        victim.kill()
        took = max(rank.hear() for rank in survivors) - killed
        assert took < 2.0, f"took {took:.3f} s"
        views = [rank.call(m.view) for rank in survivors]
        assert views[0] == views[1] == views[2]
        assert views[0].epoch == 2 and views[0].ranks == (1, 2, 3)
        assert views[0].slots[0].note == "its process is gone"
        assert all(rank.call(m.knows_dead, 0, victim.incarnation) for rank in survivors)


def test_a_host_that_loses_all_its_ranks_at_once(url: str) -> None:
    with Group(url, 6, 3) as group:
        for rank in (2, 3):
            os.kill(group[rank].process.pid, signal.SIGKILL)
        for rank in (0, 1, 4, 5):
            group[rank].call(m.wait_ranks, (0, 1, 4, 5))
        assert len({group[rank].call(m.active) for rank in (0, 1, 4, 5)}) == 1


def test_a_new_process_takes_a_dead_ranks_slot_and_the_old_incarnation_stays_out(url: str) -> None:
    with Group(url, 3, 1) as group:
        group[1].kill()
        group[0].call(m.wait_ranks, (0, 2))
        new = group.join("host-0").ready()
        assert new.rank == 1 and new.incarnation != group[1].incarnation
        assert group[0].call(m.view).ranks == (0, 2), "it took part before it was activated"
        with pytest.raises(Refused, match="waits to be activated"):
            new.call(m.check)
        new.tell(m.wait_active)
        assert group[2].call(m.activate, {1: new.incarnation}, [12]) == (0, 1, 2)
        assert new.hear() == (0, 1, 2)
        new.call(m.check)
        assert new.call(m.view).members("default", 11) == (0, 2)
        assert group[0].call(m.propose, {1: group[1].incarnation}) == (0, 1, 2), "meant the process before it"


def test_a_group_grows_into_its_reserved_slots_and_shrinks_again(url: str) -> None:
    with Group(url, 2, 2, max_ranks=4, charter={"hidden_size": 512, "channels": ["a"]}) as group:
        charter = {"hidden_size": 512, "channels": ("a",)}
        new = [group.join(f"host-{n}", charter=charter) for n in (0, 2)]
        for process in new:
            process.ready()
        assert {process.rank for process in new} == {2, 3}
        for process in new:
            process.tell(m.wait_active)
        group[0].call(m.activate, {process.rank: process.incarnation for process in new}, [5])
        for process in new:
            process.hear()
        with pytest.raises(Refused, match="all 4 slots are taken"):
            group.join("host-1", charter=charter).ready()
        assert new[0].call(m.leave, [8]) == (0, 1, 2, 3), "it drains first"
        without = tuple(rank for rank in range(4) if rank != new[0].rank)
        assert new[0].call(m.leave) == without
        group[1].call(m.wait_ranks, without)


def test_who_does_not_fit_is_refused_and_the_group_does_not_notice(url: str) -> None:
    with Group(url, 2, 1, charter={"hidden_size": 512}) as group:
        with pytest.raises(Refused, match="hidden_size differs: the group has 512, this process has 256") as caught:
            group.join("host-0", charter={"hidden_size": 256}).ready()
        assert caught.value.kind == "JoinRefused"
        with pytest.raises(Refused, match="slot 1 is taken by a live rank"):
            group.join("host-0", rank=1, charter={"hidden_size": 512}).ready()
        with pytest.raises(Refused, match="slot 2 does not exist"):
            group.join("host-0", rank=2, charter={"hidden_size": 512}).ready()
        assert [rank.call(m.active) for rank in group.members] == [(1, (0, 1))] * 2
        other = Process(m.join, MemberOptions(url, group="nobody", timeout_s=20))
        with pytest.raises(Refused, match="knows no group 'nobody'"):
            other.ready()


def test_a_rank_that_was_voted_out_is_told_and_its_proposals_do_nothing(url: str) -> None:
    with Group(url, 4, 2) as group:
        cut_off = group[3]
        assert group[0].call(m.propose, {3: cut_off.incarnation}) == (0, 1, 2)
        with pytest.raises(Refused, match="a test says so") as caught:
            cut_off.call(m.propose, {0: group[0].incarnation})
        assert caught.value.kind == "ExcludedFromView"
        with pytest.raises(Refused, match=r"rank 3 is failed in the group's view \(epoch 2\): a test says so"):
            cut_off.call(m.check)
        assert group[0].call(m.active) == (2, (0, 1, 2))
        rank, incarnation = cut_off.call(m.rejoin)
        assert rank == 3 and incarnation != cut_off.incarnation
        cut_off.tell(m.wait_active)
        group[1].call(m.activate, {3: incarnation}, [4])
        assert cut_off.hear() == (0, 1, 2, 3)
        cut_off.call(m.check)


def test_ranks_that_accuse_each_other_agree_on_one_view(url: str) -> None:
    with Group(url, 4, 4) as group:
        group[0].tell(m.propose, {1: group[1].incarnation})
        group[1].tell(m.propose, {0: group[0].incarnation})
        outcomes = []
        for rank in (0, 1):
            try:
                outcomes.append(group[rank].hear())
            except Refused as error:
                outcomes.append(error.kind)
        assert "ExcludedFromView" in outcomes and len([o for o in outcomes if isinstance(o, tuple)]) == 1
        left = next(o for o in outcomes if isinstance(o, tuple))
        for rank in (2, 3):
            group[rank].call(m.wait_ranks, left)


def test_the_store_dies_and_the_view_is_frozen_until_it_is_back() -> None:
    from moe_a2a.membership.store_process import start_store

    with tcp() as url, Group(url, 4, 2) as group:
        before = group[0].call(m.active)
        os.kill(serving(url), signal.SIGKILL)
        assert all(rank.call(m.frozen, True) for rank in group.members)
        group[3].kill()
        for rank in group.members[:3]:
            assert rank.call(m.knows_dead, 3, group[3].incarnation), "evidence needs no store"
            assert rank.call(m.active) == before, "the view changed without the store"
        with pytest.raises(Refused, match="does not answer") as caught:
            group[0].call(m.refresh)
        assert caught.value.kind == "StoreAway"
        start_store(url.removeprefix("tcp://"), idle_s=3)
        epochs = {rank.call(m.wait_ranks, (0, 1, 2)) for rank in group.members[:3]}
        assert len(epochs) == 1 and epochs.pop() > before[0]
        assert not any(rank.call(m.frozen, False) for rank in group.members[:3])


def test_the_store_that_a_group_started_is_started_again() -> None:
    with Group("", 2, 1) as group:
        url = group[0].call(m.store_url)
        pid = serving(url)
        os.kill(group[1].call(m.watcher_pid), signal.SIGKILL)  # and the watcher, which knew what was published
        group[1].call(m.publish, "place", b"here")
        os.kill(pid, signal.SIGKILL)
        assert all(rank.call(m.frozen, True) for rank in group.members)
        assert not any(rank.call(m.frozen, False, 20.0) for rank in group.members)
        assert group[0].call(m.lookup, "place") == b"here" and group[0].call(m.lookup, "charter")
        group[0].kill()  # and rank 0, which had started the first one
        group[1].call(m.wait_ranks, (1,))
        assert serving(url) != pid


def test_a_watcher_that_dies_is_replaced_and_sees_who_died_meanwhile(url: str) -> None:
    with Group(url, 4, 2) as group:
        first = group[2].call(m.watcher_pid)
        address = group[2].call(m.watcher_address)
        os.kill(first, signal.SIGKILL)
        group[3].kill()
        for rank in group.members[:3]:
            rank.call(m.wait_ranks, (0, 1, 2))
        assert group[2].call(m.watcher_pid) != first
        assert group[2].call(m.watcher_address) == address, "the others would tell a port that nobody listens at"
        group[1].kill()
        group[2].call(m.masks, 1, group[1].incarnation)


def test_a_watcher_that_hangs_is_replaced(url: str) -> None:
    with Group(url, 3, 2) as group:
        first = group[0].call(m.watcher_pid)
        os.kill(first, signal.SIGSTOP)
        group[1].kill()
        group[0].call(m.wait_ranks, (0, 2))
        assert group[0].call(m.watcher_pid) != first and gone(first, 1.0)


def test_a_death_that_an_empty_store_forgot_is_proposed_again() -> None:
    from moe_a2a.membership.store_process import start_store

    with tcp() as url, Group(url, 4, 4) as group:
        old = group[0].call(m.view)
        group[3].kill()
        for rank in group.members[:3]:
            rank.call(m.wait_ranks, (0, 1, 2))
        os.kill(serving(url), signal.SIGKILL)
        start_store(url.removeprefix("tcp://"), idle_s=3)
        store = open_store(url, group.name)
        # As if a watcher that had missed the news was first; unless the others have been faster than this.
        outdated = store.compare_and_set(0, reborn(old)) == reborn(old)
        for rank in group.members[:3]:
            assert rank.call(m.wait_epoch, LIFE + outdated) == (0, 1, 2)


def test_a_watcher_outlives_ranks_of_other_hosts_and_ends_with_its_own(url: str) -> None:
    with Group(url, 2, 2) as group:
        pids = [rank.call(m.watcher_pid) for rank in group.members]
        assert pids[0] != pids[1]
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            assert int(fields[3]) == pid, "it is in a rank's session"
        group[0].kill()
        group[1].call(m.wait_ranks, (1,))
        assert gone(pids[0], 12.0)
        assert not gone(pids[1], 0.5)


def test_groups_of_a_host_have_their_watchers_in_one_process(url: str) -> None:
    """Each with its own; a later group does not wait for a process to start. If it dies, all get another one."""
    with Group(url, 2, 1) as first, Group(url, 2, 1) as second:
        assert len({rank.call(m.watcher_pid) for rank in [*first.members, *second.members]}) == 1
        assert first[0].call(m.watcher_address) != second[0].call(m.watcher_address)
        second[1].kill()
        second[0].call(m.wait_ranks, (0,))
        assert first[0].call(m.active) == (1, (0, 1)), "another group's rank died"
        pid = first[0].call(m.watcher_pid)
        os.kill(pid, signal.SIGKILL)
        assert gone(pid, 1.0)
        first[1].kill()
        first[0].call(m.wait_ranks, (0,))
        pid = first[0].call(m.watcher_pid)
        assert second[0].call(m.watcher_pid) == pid and second[0].call(m.refresh) == 2
        other = second.join("host-0", rank=1).ready()
        assert other.call(m.watcher_pid) == pid
    assert gone(pid, 15.0)


def test_groups_with_different_secrets_have_different_processes(url: str) -> None:
    secret = {"MOE_A2A_SECRET": "0123456789abcdef-other"}
    with Group(url, 1, 1) as first, Group(url, 1, 1, environment=secret) as second:
        assert first[0].call(m.watcher_pid) != second[0].call(m.watcher_pid)


def stranger(address: str, data: bytes) -> None:
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(data, (host, int(port)))


def test_messages_of_strangers_and_of_old_incarnations_are_ignored(url: str) -> None:
    secret = "0123456789abcdef-secret"
    with Group(url, 3, 3, environment={"MOE_A2A_SECRET": secret}) as group:
        address = group[0].call(m.watcher_address)
        view = group[0].call(m.view)
        two = group[2].incarnation
        forged = mark_failed(view, {0: group[0].incarnation, 1: group[1].incarnation})
        told: list[tuple[Message, bytes]] = [
            (Message(group.name, 1, group[1].incarnation, Died({2: two}, "lies")), b""),
            (Message(group.name, 1, group[1].incarnation, NewView(forged)), b"another secret 16"),
            (Message(group.name, 1, 77, Died({2: two}, "an old incarnation")), secret.encode()),
            (Message(group.name, 9, 77, NewView(forged)), secret.encode()),
            (Message("other", 1, group[1].incarnation, NewView(forged)), secret.encode()),
            (Message(group.name, 1, group[1].incarnation, Died({2: 99}, "another process")), secret.encode()),
        ]
        for message, key in told:
            stranger(address, encode(message, key))
        for noise in (b"", b"x", os.urandom(500), os.urandom(60_000), b"{" * 30_000):
            stranger(address, noise)
        time.sleep(0.5)
        assert group[0].call(m.active) == (1, (0, 1, 2))
        stranger(address, encode(Message(group.name, 1, group[1].incarnation, Died({2: two}, "true")), secret.encode()))
        assert group[1].call(m.wait_ranks, (0, 1)) == 2, "a message of a member with the secret was not believed"


def test_hosts_tell_each_other_that_they_are_there_and_who_waits(url: str) -> None:
    with Group(url, 3, 3) as group:
        for _ in range(2):
            said = time.monotonic()
            group[1].call(m.say_that_it_waits)
            assert group[2].call(m.hears, 1, said - 1e-3)  # told in whole milliseconds
            assert group[2].call(m.waited, 0) == 0
            time.sleep(0.5)
            assert group[2].call(m.waited, 1) < time.monotonic() - 0.3, "it has not said so again"
        heard = group[2].call(m.heard, 1)
        silent = group[1].call(m.watcher_pid)
        os.kill(silent, signal.SIGSTOP)
        try:
            time.sleep(1.0)
            assert group[2].call(m.heard, 1) < time.monotonic() - 0.5
            assert group[2].call(m.heard, 0) > heard
            assert group[2].call(m.active)[1] == (0, 1, 2), "that alone is no reason to give a rank up"
        finally:
            os.kill(silent, signal.SIGCONT)


def test_a_rank_that_is_closed_leaves_in_order(url: str) -> None:
    with Group(url, 2, 1) as group:
        group[1].end()
        view = group[0].call(m.view)
        assert view.ranks == (0,) and view.slots[1].state.value == "left"


def test_founders_that_were_given_different_things_are_all_told(url: str) -> None:
    import torch.distributed as dist

    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options = MemberOptions(url, group="founders", host="h", timeout_s=10)
    ranks = [Process(m.found, r, 2, meeting.port, options, {"max_ranks": 2 + r}) for r in range(2)]
    for rank in ranks:
        with pytest.raises(Refused, match="max_ranks differs between ranks: rank 0 has 2, rank 1 has 3"):
            rank.ready()
        rank.end()


def test_founders_with_different_stores_are_all_told(url: str) -> None:
    import torch.distributed as dist

    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [url, "tcp://127.0.0.1:9"]
    options = [MemberOptions(store, group="founders-2", host="h", timeout_s=10) for store in stores]
    ranks = [Process(m.found, r, 2, meeting.port, options[r], {}) for r in range(2)]
    for rank in ranks:
        with pytest.raises(Refused, match=r"rank 1 has tcp://127\.0\.0\.1:9; give every rank the same"):
            rank.ready()
        rank.end()


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="give tcp://HOST:PORT"):
        MemberOptions("127.0.0.1:1")
    with pytest.raises(ConfigError, match="timeout_s=0"):
        MemberOptions("tcp://127.0.0.1:1", timeout_s=0)


def test_a_group_on_etcd_goes_on_through_the_death_of_etcd(tmp_path: Path) -> None:
    server = Etcd(tmp_path)
    try:
        wait_until_it_answers(server.url)
        with Group(server.url, 4, 2) as group:
            group[0].kill()
            for rank in group.members[1:]:
                rank.call(m.wait_ranks, (1, 2, 3))
            server.kill()
            assert group[1].call(m.frozen, True)
            group[3].kill()
            assert group[1].call(m.knows_dead, 3, group[3].incarnation)
            assert group[1].call(m.active) == (2, (1, 2, 3))
            server.start()
            assert group[1].call(m.wait_ranks, (1, 2)) == 3
            assert group[2].call(m.wait_ranks, (1, 2)) == 3
    finally:
        server.close()


def test_the_view_can_be_printed(url: str) -> None:
    command = [sys.executable, "-m", "moe_a2a.cli", "members", "--group"]
    with Group(url, 2, 1, max_ranks=3) as group:
        group[1].kill()
        group[0].call(m.wait_ranks, (0,))
        shown = subprocess.run(
            [*command, group.name, "--store", url], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert "epoch 2: 1 of 3 slots take part" in shown and "failed" in shown and "host-0" in shown
        printed = subprocess.run(
            [*command, group.name, "--store", url, "--json"], capture_output=True, text=True, timeout=60, check=True
        )
        assert json.loads(printed.stdout)["slots"]["1"][0] == "failed"
    away = subprocess.run(
        [*command, "x", "--store", "tcp://127.0.0.1:9"], capture_output=True, text=True, timeout=60, check=False
    )
    assert away.returncode == 1 and "does not answer" in away.stderr
