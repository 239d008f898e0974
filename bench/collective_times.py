"""Times of collectives over backend moe_a2a and over gloo, in one run: the same ranks, the same tensors, in turns.

    python bench/collective_times.py --ranks 4 [--hosts 2] [--repeats 200] [--json FILE]

Every case is checked before it is timed. A time is of one call that waits for its end, on the slowest rank: the median
of the repeats of each rank, and of those the largest. Hosts are played on one machine; gloo does not know of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_a2a
from moe_a2a.collectives import Options

Call = Callable[[], Any]
#: (what, bytes of a rank's tensor).
CASES = [
    ("barrier", 0),
    ("all_reduce", 8),
    ("all_reduce", 64 << 10),
    ("all_reduce", 1 << 20),
    ("all_reduce", 16 << 20),
    ("broadcast", 8),
    ("broadcast", 1 << 20),
    ("all_gather", 8),
    ("all_gather", 1 << 20),
    ("all_to_all", 1 << 20),
    ("reduce_scatter", 1 << 20),
    ("ping_pong", 8),
    ("ping_pong", 1 << 20),
]
#: Blocks of repeats, in which the two take turns.
TURNS = 5


def call_of(what: str, nbytes: int, group: Any, rank: int, world: int) -> tuple[Call, Callable[[], bool]]:
    """(one call, whether the first one gave what it must)."""
    count = max(1, nbytes // 4)
    own = torch.full((count,), float(rank + 1))
    total = float(sum(range(1, world + 1)))
    if what == "barrier":
        return lambda: dist.barrier(group=group), lambda: True
    if what == "all_reduce":
        tensor = own.clone()
        return lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group), lambda: bool((tensor == world).all())
    if what == "broadcast":
        return lambda: dist.broadcast(own, src=0, group=group), lambda: bool((own == 1).all())
    if what == "all_gather":
        out = torch.zeros(world * count)
        expected = torch.arange(1, world + 1).repeat_interleave(count)
        return lambda: dist.all_gather_into_tensor(out, own, group=group), lambda: bool((out == expected).all())
    count -= count % world
    if what == "all_to_all":
        out = torch.zeros(count)
        expected = torch.arange(1, world + 1).repeat_interleave(count // world)
        return lambda: dist.all_to_all_single(out, own[:count], group=group), lambda: bool((out == expected).all())
    if what == "reduce_scatter":
        out = torch.zeros(count // world)
        return lambda: dist.reduce_scatter_tensor(out, own[:count], group=group), lambda: bool((out == total).all())
    assert what == "ping_pong"
    got = torch.zeros(len(own))

    def ping_pong() -> None:
        if rank == 0:
            dist.send(own, 1, group=group)
            dist.recv(got, 1, group=group)
        elif rank == 1:
            dist.recv(got, 0, group=group)
            dist.send(own, 0, group=group)

    return ping_pong, lambda: rank > 1 or bool((got == 2 - rank).all())


def rank_main(rank: int, world: int, host: str, port: int, repeats: int, limit: int, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # names that torch 2.13 has changed, and 2.11 has not
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    groups = {"gloo": dist.group.WORLD, "moe_a2a": dist.new_group(backend="moe_a2a", pg_options=Options(host=host))}
    for what, nbytes in CASES:
        if nbytes > limit:
            continue
        times: dict[str, list[float]] = {name: [] for name in groups}
        calls = {name: call_of(what, nbytes, group, rank, world) for name, group in groups.items()}
        each = max(1, (repeats if nbytes < 4 << 20 else repeats // 8) // TURNS)
        for name, (call, right) in calls.items():
            call()
            if not right():
                raise AssertionError(f"{name}: {what} of {nbytes} bytes gave something else")
            for _ in range(min(each, 5)):
                call()
        for _ in range(TURNS):
            for name, (call, _) in calls.items():
                dist.barrier()
                for _ in range(each):
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
        pipe.send({name: statistics.median(found) for name, found in times.items()})
    dist.barrier()
    dist.destroy_process_group(groups["moe_a2a"])
    pipe.send("end")
    dist.destroy_process_group()


def measure(ranks: int, hosts: int, repeats: int, limit: int) -> list[dict[str, Any]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        given = (rank, ranks, f"host-{rank * hosts // ranks}", store.port, repeats, limit, theirs)
        processes.append(context.Process(target=rank_main, args=given, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    cases = []
    for what, nbytes in CASES:
        if nbytes > limit:
            continue
        said = [pipe.recv() for pipe in pipes[: 2 if what == "ping_pong" else ranks]]
        for pipe in pipes[len(said) :]:
            pipe.recv()
        us = {name: 1e6 * max(found[name] for found in said) for name in said[0]}
        cases.append({"call": what, "bytes": nbytes, "us": us, "gloo_over_moe_a2a": us["gloo"] / us["moe_a2a"]})
    for pipe, process in zip(pipes, processes, strict=True):
        assert pipe.recv() == "end"
        process.join(timeout=20)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200, help="calls of each case (an eighth from 4 MB on)")
    parser.add_argument("--limit", type=int, default=16 << 20, help="largest tensor, in bytes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cases = measure(given.ranks, given.hosts, given.repeats, given.limit)
    print(f"{'':16}{'bytes':>10}{'gloo us':>12}{'moe_a2a us':>12}{'gloo / ours':>13}")
    for case in cases:
        us = case["us"]
        print(
            f"{case['call']:16}{case['bytes']:>10}{us['gloo']:>12.1f}{us['moe_a2a']:>12.1f}"
            f"{case['gloo_over_moe_a2a']:>13.2f}"
        )
    if given.json:
        sizes = {"ranks": given.ranks, "hosts": given.hosts, "repeats": given.repeats, "cores": os.cpu_count()}
        versions = {"torch": torch.__version__, "moe_a2a": moe_a2a.__version__}
        given.json.write_text(json.dumps({**sizes, "versions": versions, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
