"""Times of elastic groups of CPU ranks: what elasticity costs a step, and how long losses and joins take.

    python bench/elastic_times.py --ranks 4 --hosts 2 --kills 20 --json results.json

cost: steps of an elastic and of an ordinary group, in turn in the same processes. losses: a rank is killed at a random
time while all make steps, until the survivors have made the first step without it (`whole_again_ms`), and how long
that step itself took (`next_step_ms`). joins: a process that has loaded everything takes the slot (`joined_ms`: to the
end of its first step).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import signal
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from summary import summary

from moe_a2a import AllToAll, Config, Elastic, Options
from moe_a2a.membership.store_process import start_store
from moe_a2a.workload import make_inputs

_server = mp.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch.distributed", "moe_a2a.all_to_all", "moe_a2a.elastic.group"])
HIDDEN, TOP_K, EXPERTS = 7168, 8, 256


def _step(a2a: AllToAll, inputs: Any, y: list[torch.Tensor]) -> list[int]:
    got = a2a.dispatch(inputs.x, inputs.topk_ids, inputs.topk_weights)
    if not y:
        y.append(torch.zeros_like(got.x))
    a2a.combine(y[0], got.handle)
    return a2a.missing(got.handle)


def _inputs(rank: int, tokens: int) -> Any:
    return make_inputs(0, rank, 0, tokens, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K, dtype=torch.bfloat16)


def _cost(pipe: Connection, port: int, rank: int, ranks: int, host: str, tokens: int, steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    given: dict[str, Any] = {"store": store, "rank": rank, "world_size": ranks, "options": Options(host=host)}
    groups = {
        "ordinary": AllToAll(Config(EXPERTS, HIDDEN, TOP_K, tokens), **given),
        "elastic": AllToAll(Config(EXPERTS, HIDDEN, TOP_K, tokens, channels=("e",)), elastic=Elastic(), **given),
    }
    inputs = _inputs(rank, tokens)
    times: dict[str, list[float]] = {name: [] for name in groups}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in groups}
    for number in range(steps + 3):
        for name in sorted(groups, reverse=bool(number % 2)):
            store.set(f"{number}/{name}/{rank}", "")
            store.wait([f"{number}/{name}/{r}" for r in range(ranks)])
            started = time.monotonic()
            _step(groups[name], inputs, outputs[name])
            if number >= 3:
                times[name].append(time.monotonic() - started)
    for a2a in groups.values():
        a2a.close()
    pipe.send(times)


def _serve(pipe: Connection, port: int, rank: int, ranks: int, host: str, url: str, tokens: int, joins: bool) -> None:
    """Make steps; tell of every one that is the first with other ranks, or lacks some."""
    torch.set_num_threads(1)
    config, options = Config(EXPERTS, HIDDEN, TOP_K, tokens), Options(timeout_s=10.0, host=host)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    inputs, y = _inputs(rank, tokens), []
    if joins:
        pipe.recv()
        started = time.monotonic()
        a2a = AllToAll(config, rank=rank, options=options, elastic=Elastic(url, join=True))
        _step(a2a, inputs, y)
        pipe.send(("joined", time.monotonic() - started))
    else:
        a2a = AllToAll(config, store=store, rank=rank, world_size=ranks, options=options, elastic=Elastic(url))
        pipe.send(("ready", 0.0))
    assert a2a.elastic is not None
    before: tuple[int, ...] = ()
    while not store.check(["end"]):
        started = time.monotonic()
        missing = _step(a2a, inputs, y)
        ended = time.monotonic()
        if a2a.elastic.ranks != before and not missing:
            before = a2a.elastic.ranks
            pipe.send(("whole", before, started, ended))
    os._exit(0)


def cost(ranks: int, labels: list[str], tokens: int, steps: int) -> dict[str, Any]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = []
    for rank in range(ranks):
        ours, theirs = _server.Pipe()
        args = (theirs, store.port, rank, ranks, labels[rank], tokens, steps)
        _server.Process(target=_cost, args=args, daemon=True).start()
        pipes.append(ours)
    found = [pipe.recv() for pipe in pipes]
    medians = {name: 1e3 * statistics.median(t for times in found for t in times[name]) for name in found[0]}
    more = 100 * (medians["elastic"] / medians["ordinary"] - 1)
    return {"tokens": tokens, **{f"{k}_ms": round(v, 3) for k, v in medians.items()}, "more_percent": round(more, 1)}


class _Serving:
    """Ranks that make steps, and one process for every join to come."""

    def __init__(self, ranks: int, labels: list[str], tokens: int) -> None:
        self.ranks, self.labels, self.tokens = ranks, labels, tokens
        self.url = start_store()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(ranks):
            pipe, process = self.start(rank, False)
            self.pipes.append(pipe)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def start(self, rank: int, joins: bool) -> tuple[Connection, Any]:
        ours, theirs = _server.Pipe()
        args = (theirs, self.store.port, rank, self.ranks, self.labels[rank], self.url, self.tokens, joins)
        process = _server.Process(target=_serve, args=args, daemon=True)
        process.start()
        return ours, process

    def whole(self, rank: int, members: tuple[int, ...]) -> tuple[float, float]:
        """When a rank's first step with exactly these members began and ended."""
        while True:
            if not self.pipes[rank].poll(30.0):
                raise TimeoutError(f"rank {rank} makes no whole step of {members}")
            what, *said = self.pipes[rank].recv()
            if what == "whole" and said[0] == members:
                return said[1], said[2]


def losses(ranks: int, labels: list[str], tokens: int, kills: int, seed: int) -> dict[str, Any]:
    serving, chance = _Serving(ranks, labels, tokens), random.Random(seed)
    everybody = tuple(range(ranks))
    again, following, joined = [], [], []
    for rank in everybody:
        serving.whole(rank, everybody)
    for _ in range(kills):
        victim = chance.randrange(ranks)
        pipe, process = serving.start(victim, True)
        time.sleep(chance.uniform(0.3, 0.6))
        others = tuple(rank for rank in everybody if rank != victim)
        killed = time.monotonic()
        os.kill(serving.processes[victim].pid, signal.SIGKILL)
        ends = [serving.whole(rank, others) for rank in others]
        again.append(max(end for _, end in ends) - killed)
        following += [end - start for start, end in ends]
        serving.processes[victim].join()
        serving.pipes[victim], serving.processes[victim] = pipe, process
        pipe.send("join")
        joined.append(pipe.recv()[1])
        for rank in everybody:
            serving.whole(rank, everybody)
    serving.store.set("end", "1")
    for process in serving.processes:
        process.join(10)
    return {
        "kills": kills,
        "whole_again_ms": summary(again, digits=1),
        "next_step_ms": summary(following, digits=1),
        "joined_ms": summary(joined, digits=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    labels = [f"host-{rank * given.hosts // given.ranks}" for rank in range(given.ranks)]
    result: dict[str, Any] = {"ranks": given.ranks, "hosts": given.hosts, "cores": len(os.sched_getaffinity(0))}
    result["cost"] = [cost(given.ranks, labels, tokens, given.steps) for tokens in given.tokens]
    if given.kills:
        result |= losses(given.ranks, labels, given.tokens[0], given.kills, given.seed)
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
