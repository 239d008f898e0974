"""Runs a function on several ranks, each a process of its own, forked from one preloaded server process.

A test hands over a module-level function `fn(ctx, *args)`; every rank gets a `Ctx` and its return value comes back in rank order. An
exception on a rank is raised in the test, with the rank's traceback.
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
_server.set_forkserver_preload(["torch", "torch.distributed", "moe_a2a", "moe_a2a.reference", "moe_a2a.workload", "ranks"])


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

    def barrier(self, name: str) -> None:
        self.store.set(f"barrier/{name}/{self.rank}", "1")
        self.store.wait([f"barrier/{name}/{r}" for r in range(self.world)])


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
    fn: Callable[..., Any], world: int, *args: Any, hosts: int | Sequence[str] = 1, order: Sequence[int] | None = None
) -> tuple[list[Any], list[Connection], dist.TCPStore]:
    """Start the ranks, in `order`. Returns processes and connections in rank order, and the store that must be kept."""
    labels = host_labels(world, hosts) if isinstance(hosts, int) else list(hosts)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[Any] = [None] * world
    connections: list[Any] = [None] * world
    for place, rank in enumerate(order or range(world)):
        connections[rank], theirs = _server.Pipe(duplex=False)
        delay = 0.05 * place if order else 0.0
        processes[rank] = _server.Process(
            target=_main, args=(theirs, fn, rank, world, labels[rank], store.port, delay, args), daemon=True
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
    """Run `fn(ctx, *args)` on `world` ranks. Returns their results in rank order (None for ranks in `dies`, which must die)."""
    processes, connections, store = start_ranks(fn, world, *args, hosts=hosts, order=order)
    results: list[Any] = [None] * world
    failures: dict[int, str] = {}
    left = {connection: rank for rank, connection in enumerate(connections)}
    deadline = time.monotonic() + timeout
    try:
        while left:
            ready = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailed(f"ranks {sorted(left.values())} did not end within {timeout} s; so far: {failures}")
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
    finally:
        for process in processes:
            process.join(timeout=0 if left else 5)
            if process.is_alive():
                process.kill()
                process.join()
        del store
    unexpected = {rank: text for rank, text in failures.items() if not (rank in dies and text == "died")}
    if unexpected:
        raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in sorted(unexpected.items())))
    return results
