"""Waits end: with a record, with the news of a death, or with the time-out; they say who was missing."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from moe_a2a import RankLost
from moe_a2a.transport.memory import HostMemory
from moe_a2a.transport.progress import Progress
from moe_a2a.transport.wait import Watch, named, wait_for, wait_tasks
from moe_a2a.transport.wire import Kind, Record, Status

pytestmark = pytest.mark.alone

OK = Record(Kind.DISPATCH, 1, 1)


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    """Regions of ranks 4, 6 and 8, all writable here; this rank is 4."""
    made = HostMemory(4096, 3, 0)
    others = [HostMemory(4096, 3, i) for i in (1, 2)]
    for i, other in enumerate(others, start=1):
        made.map_peer(i, other.fd)
    made.others = others  # type: ignore[attr-defined]
    yield made
    for each in (*others, made):
        each.close()


@pytest.fixture
def watch(memory: HostMemory) -> Iterator[Watch]:
    made = Watch(memory, (4, 6, 8), 4)
    yield made
    made.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def never() -> None:
    return None


def after(seconds: float, record: Record = OK):
    start = time.monotonic()
    return lambda: record if time.monotonic() - start > seconds else None


def test_a_wait_ends_when_the_last_record_has_come(watch):
    started = time.monotonic()
    found = wait_for({4: lambda: OK, 6: after(0.05), 8: after(0.02)}, 5, watch, "dispatch")
    assert found == {4: OK, 6: OK, 8: OK}
    assert 0.05 <= time.monotonic() - started < 1


def test_after_its_time_a_wait_names_those_that_are_missing_and_only_those(watch):
    started = time.monotonic()
    with pytest.raises(RankLost) as caught:
        wait_for({4: lambda: OK, 6: never, 8: never}, 0.2, watch, "dispatch of step 3")
    assert 0.2 <= time.monotonic() - started < 1
    assert caught.value.ranks == (6, 8)
    for word in ("dispatch of step 3", "ranks 6, 8", "0.2 s"):
        assert word in str(caught.value)
    assert isinstance(caught.value, TimeoutError)


def test_a_death_ends_a_wait_long_before_its_time(watch, sleeper):
    watch.add_process(6, sleeper.pid)
    threading.Timer(0.1, sleeper.send_signal, [signal.SIGKILL]).start()
    started = time.monotonic()
    with pytest.raises(RankLost, match="rank 6 died") as caught:
        wait_for({4: lambda: OK, 6: never}, 20, watch, "combine")
    assert caught.value.ranks == (6,) and time.monotonic() - started < 5


def test_the_death_of_a_rank_that_is_not_waited_for_ends_nothing(watch, sleeper):
    watch.add_process(8, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert wait_for({6: after(0.1)}, 5, watch, "dispatch") == {6: OK}


def after_a_look(watch: Watch):
    """A poll that finds a record only after `watch` has looked for losses."""
    looked = threading.Event()
    check = watch.check

    def look(waiting_for) -> None:
        looked.set()
        check(waiting_for)

    watch.check = look  # type: ignore[method-assign]
    return lambda: OK if looked.is_set() else None


def test_what_a_rank_announced_before_it_died_counts(watch, sleeper):
    """The record is there, but the reader looks for it only after it has seen the death."""
    watch.add_process(6, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert wait_for({6: after_a_look(watch)}, 5, watch, "dispatch") == {6: OK}


def test_a_loss_that_did_not_matter_keeps_nothing_alive(watch, memory):
    memory.others[0].close()
    poll = after_a_look(watch)

    def caller() -> weakref.ref[object]:
        class Owner:
            pass

        owner = Owner()
        wait_for({6: poll}, 5, watch, "dispatch")
        return weakref.ref(owner)

    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()


def test_the_rank_that_another_one_found_missing_is_blamed_and_not_the_messenger(watch, memory):
    memory.others[0].set_fault(12)
    with pytest.raises(RankLost, match="rank 6 reports that rank 12 is missing") as caught:
        wait_for({6: never}, 20, watch, "dispatch")
    assert caught.value.ranks == (12,)
    fault = Record(Kind.COMBINE, 1, 1, status=Status.FAULT, missing=3)
    with pytest.raises(RankLost, match="rank 8 reports that rank 3 is missing") as caught:
        wait_for({8: lambda: fault}, 20, watch, "combine")
    assert caught.value.ranks == (3,)


def test_a_rank_that_closed_its_object_is_not_waited_for(watch, memory):
    memory.others[1].close()
    assert wait_for({6: after(0.05)}, 5, watch, "dispatch") == {6: OK}
    with pytest.raises(RankLost, match="rank 8 closed") as caught:
        wait_for({8: never}, 20, watch, "dispatch")
    assert caught.value.ranks == (8,)


def test_a_dead_rank_is_blamed_before_the_ranks_that_waited_for_it(watch, sleeper):
    watch.add_process(6, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(RankLost, match="rank 6 died") as caught:
        wait_for({11: never}, 0.1, watch, "combine")  # 11, on another host, was waiting for 6
    assert caught.value.ranks == (6,)


def test_a_stopped_rank_is_blamed_before_the_ranks_whose_rows_it_did_not_take_in(watch, sleeper):
    watch.add_process(6, sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    with pytest.raises(RankLost, match="rank 6 hangs") as caught:
        wait_for({11: never}, 0.1, watch, "dispatch")
    assert caught.value.ranks == (6,)
    sleeper.send_signal(signal.SIGCONT)


def test_a_process_that_cannot_be_watched_is_left_to_the_time_out(watch):
    watch.add_process(6, 0)
    watch.add_process(8, 2**22 + 1)  # no such process
    with pytest.raises(RankLost, match="sent nothing within"):
        wait_for({6: never}, 0.05, watch, "dispatch")


def test_two_threads_may_look_at_once(watch, sleeper):
    """The caller waits for records while the thread that drives transfers waits for partial sums."""
    watch.add_process(6, sleeper.pid)
    errors: list[BaseException] = []
    stop = time.monotonic() + 0.5

    def look() -> None:
        try:
            while time.monotonic() < stop:
                watch.check([6])
                watch.gone()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_ranks_are_named_in_words():
    assert named([3]) == "rank 3" and named([3, 5]) == "ranks 3, 5"


class Transfer:
    """A task of a few stretches; counts them."""

    def __init__(self, stretches: int, error: Exception | None = None) -> None:
        self.stretches, self.error, self.count = stretches, error, 0

    def run(self) -> Iterator[None]:
        while self.count < self.stretches:
            self.count += 1
            yield
        if self.error is not None:
            raise self.error


@pytest.fixture
def progress() -> Iterator[Progress]:
    made = Progress()
    yield made
    made.close(2)


def test_a_task_starts_in_the_callers_thread_and_ends_without_being_waited_for(progress):
    transfer = Transfer(50)
    task = progress.start(transfer.run())
    assert transfer.count >= 1
    deadline = time.monotonic() + 5
    while not task.done:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert transfer.count == 50 and task.error is None


def test_a_wait_drives_the_ranks_own_transfers(memory, progress):
    watch = Watch(memory, (4, 6, 8), 4, progress)
    transfers = [Transfer(n) for n in (1, 30, 200)]
    tasks = [progress.start(t.run()) for t in transfers]
    assert wait_for({6: lambda: OK if all(t.done for t in tasks) else None}, 5, watch, "dispatch") == {6: OK}
    assert [t.count for t in transfers] == [1, 30, 200]
    watch.close()


def test_an_own_transfer_that_fails_ends_the_wait(memory, progress):
    watch = Watch(memory, (4, 6, 8), 4, progress)
    progress.start(Transfer(20, RankLost("rank 9 could not be written to", [9])).run())
    with pytest.raises(RankLost, match="rank 9") as caught:
        wait_for({6: never}, 5, watch, "dispatch")
    assert caught.value.ranks == (9,)
    watch.close()


def test_transfers_that_do_not_end_are_given_up_after_their_time(memory, progress):
    watch = Watch(memory, (4, 6, 8), 4, progress)
    transfers = {2: Transfer(10**9), 3: Transfer(5), 5: Transfer(10**9)}
    tasks = [progress.start(transfer.run(), rank) for rank, transfer in transfers.items()]
    started = time.monotonic()
    with pytest.raises(RankLost, match=r"ranks 2, 5 did not end within 0\.2 s") as caught:
        wait_tasks(tasks, 0.2, watch, "combine")
    assert caught.value.ranks == (2, 5) and time.monotonic() - started < 2
    for transfer in transfers.values():
        transfer.stretches = 0
    watch.close()


def test_closing_lets_transfers_at_hand_end_and_ends_the_thread():
    before = threading.active_count()
    progress = Progress()
    transfer = Transfer(30)
    task = progress.start(transfer.run())
    progress.close(5)
    assert task.done and transfer.count == 30
    assert threading.active_count() == before
