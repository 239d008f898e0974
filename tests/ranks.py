"""Runs a function on several ranks, each a process of its own, forked from one preloaded server process.

A test hands over a module-level function `fn(ctx, *args)`; every rank gets a `Ctx` and its return value comes back in
rank order. An exception on a rank is raised in the test, with the rank's traceback.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Config, Options

_server = mp.get_context("forkserver")
_server.set_forkserver_preload(
    ["torch", "torch.distributed", "moe_a2a", "moe_a2a.reference", "moe_a2a.workload", "ranks"]
)


@dataclass
class Ctx:
    """A rank of a test: its place, a store that all ranks reach, and a short time-out."""

    rank: int
    world: int
    host: str
    store: dist.TCPStore
    timeout_s: float = 20.0

    def a2a(self, config: Config, **options: Any) -> AllToAll:
        """An AllToAll of all ranks of this test."""
        options.setdefault("timeout_s", self.timeout_s)
        options.setdefault("host", self.host)
        return AllToAll(config, store=self.store, rank=self.rank, world_size=self.world, options=Options(**options))

    def barrier(self, name: str, ranks: int | None = None) -> None:
        """Of all ranks, or of the first so many."""
        self.store.set(f"barrier/{name}/{self.rank}", "1")
        self.store.wait([f"barrier/{name}/{r}" for r in range(self.world if ranks is None else ranks)])


#: Once a rank has failed the others get this long, to fail too or to end.
_GRACE_S = 4.0


class RankFailed(AssertionError):
    """A rank raised or died; the message holds its traceback."""


def _main(
    connection: Connection, fn: Callable[..., Any], rank: int, world: int, host: str, port: int, delay: float, args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.pop("MOE_A2A_HOST", None)
    time.sleep(delay)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        connection.send(("ok", fn(Ctx(rank, world, host, store), *args)))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
    connection.close()


def host_labels(world: int, hosts: int) -> list[str]:
    """Equal shares of ranks for each host."""
    return [f"host-{r * hosts // world}" for r in range(world)]


def start_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    hosts: int | Sequence[str] = 1,
    order: Sequence[int] | None = None,
    per_rank: Sequence[tuple[Any, ...]] | None = None,
) -> tuple[list[Any], list[Connection], dist.TCPStore]:
    """Start the ranks, in `order`. Returns processes and connections in rank order, and the store that must be kept.

    per_rank: arguments for each rank, in front of `args`; `fn` then gets its connection too, after the context.
    """
    labels = host_labels(world, hosts) if isinstance(hosts, int) else list(hosts)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[Any] = [None] * world
    connections: list[Any] = [None] * world
    for place, rank in enumerate(order or range(world)):
        connections[rank], theirs = _server.Pipe(duplex=False)
        delay = 0.05 * place if order else 0.0
        given = args if per_rank is None else (theirs, *per_rank[rank], *args)
        processes[rank] = _server.Process(
            target=_main, args=(theirs, fn, rank, world, labels[rank], store.port, delay, given), daemon=True
        )
        processes[rank].start()
        theirs.close()
    return processes, connections, store


def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    hosts: int | Sequence[str] = 1,
    order: Sequence[int] | None = None,
    timeout: float = 120.0,
    dies: Sequence[int] = (),
) -> list[Any]:
    """Run `fn(ctx, *args)` on `world` ranks. Returns their results in rank order (None for ranks in `dies`, which must
    die)."""
    processes, connections, store = start_ranks(fn, world, *args, hosts=hosts, order=order)
    results: list[Any] = [None] * world
    failures: dict[int, str] = {}  # the first to fail comes first: the others often fail because of it
    left = {connection: rank for rank, connection in enumerate(connections)}
    deadline = time.monotonic() + timeout
    try:
        while left:
            ready = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.update(dict.fromkeys(left.values(), "had not ended when this was given up"))
                break
            for connection in ready:
                rank = left.pop(connection)  # type: ignore[index,arg-type]
                try:
                    status, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    status, value = "error", "died"
                if status == "ok":
                    results[rank] = value
                else:
                    failures[rank] = value
                    if not (rank in dies and value == "died"):
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
    finally:
        _end(processes, 0 if left else 5)
        del store
    unexpected = {rank: text for rank, text in failures.items() if not (rank in dies and text == "died")}
    if unexpected:
        raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in unexpected.items()))
    return results


def _end(processes: Sequence[Any], patience: float) -> None:
    for process in processes:
        process.join(timeout=patience)
        if process.is_alive():
            process.kill()
            process.join()


class RankPool:
    """Ranks that stay and run one function after another: for tests with many small examples. Starts when first called,
    and again after a failure."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)
        self._processes: list[Any] = []
        self._replies: list[Connection] = []
        self._requests: list[Connection] = []

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float = 30.0) -> list[Any]:
        """Run `fn(ctx, *args)` on all ranks. Raises RankFailed."""
        if not self._processes:
            self._start()
        for request in self._requests:
            request.send((fn, args))
        results: list[Any] = [None] * len(self._labels)
        failures: dict[int, str] = {}
        left = {reply: rank for rank, reply in enumerate(self._replies)}
        deadline = time.monotonic() + timeout
        while left:
            ready = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.update(dict.fromkeys(left.values(), "had not answered when this was given up"))
                break
            for reply in ready:
                rank = left.pop(reply)  # type: ignore[index,arg-type]
                try:
                    status, results[rank] = reply.recv()  # type: ignore[union-attr]
                except EOFError:
                    status, results[rank] = "error", "died"
                if status == "error":
                    failures[rank] = results[rank]
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            self.close()
            raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        return results

    def _start(self) -> None:
        pipes = [_server.Pipe(duplex=False) for _ in self._labels]
        self._requests = [sender for _, sender in pipes]
        inboxes = [receiver for receiver, _ in pipes]
        self._processes, self._replies, self._store = start_ranks(
            _serve, len(self._labels), hosts=self._labels, per_rank=[(inbox,) for inbox in inboxes]
        )
        for inbox in inboxes:
            inbox.close()

    def close(self) -> None:
        for request in self._requests:
            request.close()
        _end(self._processes, 1)
        self._processes, self._requests = [], []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(ctx: Ctx, reply: Connection, inbox: Connection) -> None:
    while True:
        try:
            fn, args = inbox.recv()
        except EOFError:
            return
        try:
            reply.send(("ok", fn(ctx, *args)))
        except BaseException:
            reply.send(("error", traceback.format_exc()))
