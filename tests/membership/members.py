"""Groups of real processes for tests: each holds a Member, and does what the test tells it to."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from moe_a2a.bootstrap import StoreBootstrap
from moe_a2a.membership.group import found_group, join_group
from moe_a2a.membership.member import Member, MemberOptions

_server = mp.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch.distributed", "moe_a2a.membership.group", "members"])
ANSWER_S = 30.0
_names = itertools.count()


def _main(pipe: Connection, make: Callable[..., Member], args: Sequence[Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    member = None
    try:
        member = make(*args)
        pipe.send(("ok", (member.rank, member.incarnation)))
        while True:
            request = pipe.recv()
            if request is None:
                break
            fn, given = request
            try:
                pipe.send(("ok", fn(member, *given)))
            except Exception as error:
                pipe.send(("error", (type(error).__name__, str(error))))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(("error", (type(error).__name__, str(error) + "\n" + traceback.format_exc())))
    if member is not None:
        member.close()


class Refused(Exception):
    """What a process of the group raised. kind: the name of the exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Process:
    """A process with a Member. rank, incarnation: once `ready` has been called."""

    def __init__(self, make: Callable[..., Member], *args: Any, environment: dict[str, str] | None = None) -> None:
        self._pipe, theirs = _server.Pipe()
        self.process = _server.Process(target=_main, args=(theirs, make, args, environment or {}), daemon=True)
        self.process.start()
        theirs.close()
        self.rank = self.incarnation = -1

    def ready(self) -> Process:
        self.rank, self.incarnation = self.hear()
        return self

    def tell(self, fn: Callable[..., Any], *args: Any) -> None:
        self._pipe.send((fn, args))

    def hear(self) -> Any:
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"rank {self.rank} did not answer")
        status, value = self._pipe.recv()
        if status == "error":
            raise Refused(*value)
        return value

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        self.tell(fn, *args)
        return self.hear()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self) -> None:
        if self.process.is_alive():
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self.process.join(timeout=8)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def found(rank: int, world: int, port: int, options: MemberOptions, more: dict[str, Any]) -> Member:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return found_group(StoreBootstrap(store, rank, world), options, **more)


def join(options: MemberOptions, rank: int | None = None, charter: dict[str, Any] | None = None) -> Member:
    return join_group(options, rank, charter)


class Group:
    """Founders of a group, in rank order; hosts are played by labels."""

    def __init__(
        self, url: str, ranks: int, hosts: int, environment: dict[str, str] | None = None, **more: Any
    ) -> None:
        self.url, self.environment, self.name = url, environment or {}, f"test-{next(_names)}"
        self._meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.members = [
            Process(
                *(found, rank, ranks, self._meeting.port, self.options(f"host-{rank * hosts // ranks}"), more),
                environment=self.environment,
            )
            for rank in range(ranks)
        ]
        self.others: list[Process] = []
        for member in self.members:
            member.ready()

    def options(self, host: str) -> MemberOptions:
        return MemberOptions(self.url, group=self.name, host=host, timeout_s=20.0)

    def join(self, host: str, rank: int | None = None, charter: dict[str, Any] | None = None) -> Process:
        process = Process(join, self.options(host), rank, charter, environment=self.environment)
        self.others.append(process)
        return process

    def __getitem__(self, rank: int) -> Process:
        return self.members[rank]

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.members, *self.others]:
            process.end()


# What members are told to do.


def masks(member: Member, rank: int, incarnation: int, within_s: float = 10.0) -> float:
    """Wait, as a step would, until a process takes no part. Returns the time."""
    deadline = time.monotonic() + within_s
    while member.page.takes_part(rank, incarnation):
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} still takes part at epoch {member.page.epoch}")
        time.sleep(2e-4)
    return time.monotonic()


def knows_dead(member: Member, rank: int, incarnation: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not member.page.is_dead(rank, incarnation) and time.monotonic() < deadline:
        time.sleep(1e-3)
    return member.page.is_dead(rank, incarnation)


def active(member: Member) -> tuple[int, tuple[int, ...]]:
    return member.view.epoch, member.view.ranks


def wait_ranks(member: Member, ranks: tuple[int, ...], within_s: float = 15.0) -> int:
    return member.wait(lambda view: view.ranks == ranks, within_s).epoch


def wait_epoch(member: Member, epoch: int, within_s: float = 15.0) -> tuple[int, ...]:
    return member.wait(lambda view: view.epoch >= epoch, within_s).ranks


def propose(member: Member, ranks: dict[int, int]) -> tuple[int, ...]:
    return member.propose_failed(ranks, "a test says so").ranks


def activate(member: Member, ranks: dict[int, int], first: list[int]) -> tuple[int, ...]:
    return member.activate(ranks, first).ranks


def wait_active(member: Member) -> tuple[int, ...]:
    return member.wait_active().ranks


def check(member: Member) -> None:
    member.check()


def refresh(member: Member) -> int:
    return member.refresh().epoch


def publish(member: Member, name: str, value: bytes) -> None:
    member.publish(name, value)


def lookup(member: Member, name: str) -> bytes | None:
    return member.lookup(name)


def frozen(member: Member, wanted: bool, within_s: float = 12.0) -> bool:
    deadline = time.monotonic() + within_s
    while member.frozen != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return member.frozen


def store_url(member: Member) -> str:
    return member.options.store


def watcher_pid(member: Member) -> int:
    return member.watcher_pid


def watcher_address(member: Member) -> str:
    return member._line.watcher_address


def rejoin(member: Member) -> tuple[int, int]:
    member.rejoin()
    return member.rank, member.incarnation


def leave(member: Member, last: list[int] | None = None) -> tuple[int, ...]:
    return member.leave(last=last).ranks


def view(member: Member) -> Any:
    return member.view


def say_that_it_waits(member: Member) -> None:
    member.page.say_that_it_waits()


def heard(member: Member, rank: int) -> float:
    return member.page.heard(rank)


def waited(member: Member, rank: int) -> float:
    return member.page.waited(rank)


def hears(member: Member, rank: int, after: float, within_s: float = 10.0) -> bool:
    """Whether a rank is heard of, and that it waited after a time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if member.page.heard(rank) and member.page.waited(rank) >= after:
            return True
        time.sleep(0.01)
    return False
