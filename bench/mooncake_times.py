"""How long a group of `mooncake-cpu` takes over the loss of a rank, and over taking another one in.

    python bench/mooncake_times.py --ranks 4 --hosts 2 --kills 100 [--json FILE]

Ranks are processes that do nothing but all_reduce; one of them is killed (-9). From the kill until the last survivor's
failed operation has ended, in the view without the dead rank, and until the last survivor's next operation has ended,
right. Then a process, forked from one that has everything loaded, takes the slot. Hosts are played on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import random
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from summary import summary

WAIT_S = 60.0


def rank_main(rank: int, world: int, host: str, port: int, joins: bool, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from moe_a2a.compat.mooncake import pg

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["MOE_A2A_HOST"] = host
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    options = pg.MooncakeBackendOptions(world, joins)
    timeout = timedelta(seconds=WAIT_S)
    dist.init_process_group(
        "mooncake-cpu", store=store, rank=rank, world_size=world, timeout=timeout, pg_options=options
    )
    group = dist.group.WORLD

    def add() -> int:
        """How many ranks took part; 0 if it failed."""
        ones = torch.ones(2)
        work = dist.all_reduce(ones, async_op=True)
        assert work is not None
        work.wait()
        return int(ones[0]) if pg.get_local_success(work) else 0

    if joins:
        started = time.monotonic()
        pg.join_group(group)
        joined = time.monotonic()
        assert add()
        pipe.send((joined - started, time.monotonic() - started))
    else:
        assert add()
        pipe.send(None)
    while True:
        order, *given = pipe.recv()
        if order == "end":
            dist.destroy_process_group()
            return
        if order == "add":
            pipe.send("ready")
            ended = _until_lost(add, world - 1)
            assert not pg.get_active_ranks(group)[given[0]]
            pipe.send(ended)
        elif order == "activate":
            while not all(pg.get_peer_state(group, given)):
                time.sleep(1e-3)
            started = time.monotonic()
            answer = pg.activate_ranks(group, given)
            assert answer.status is pg.ProposalStatus.Applied, answer
            pipe.send(time.monotonic() - started)
            assert add()
        elif order == "new group":
            started = time.monotonic()
            dist.new_group(list(range(world)), backend="mooncake-cpu")
            pipe.send(time.monotonic() - started)


def _until_lost(add: Any, left: int) -> tuple[float, float]:
    """Operations until one has ended right with so many ranks. Returns when the one that failed ended (0.0 if none did
    here: a rank that had got everything before has ended it right, while others could not), and when that one did."""
    failed = 0.0
    while True:
        ranks = add()
        now = time.monotonic()
        if not ranks:
            failed = now
        elif ranks == left:
            return failed, now


class Ranks:
    def __init__(self, world: int, hosts: int) -> None:
        import torch.distributed as dist

        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "moe_a2a.compat.mooncake.pg"])
        self._world, self._hosts = world, hosts
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[Any] = [None] * world
        self.pipes: list[Any] = [None] * world
        for rank in range(world):
            self.start(rank)
        for rank in range(world):
            self.hear(rank)

    def start(self, rank: int, joins: bool = False) -> None:
        ours, theirs = self._context.Pipe()
        host = f"host-{rank * self._hosts // self._world}"
        args = (rank, self._world, host, self._store.port, joins, theirs)
        self.processes[rank] = self._context.Process(target=rank_main, args=args, daemon=True)
        self.processes[rank].start()
        theirs.close()
        self.pipes[rank] = ours

    def hear(self, rank: int) -> Any:
        if not self.pipes[rank].poll(WAIT_S + 5):
            raise TimeoutError(f"rank {rank} said nothing")
        return self.pipes[rank].recv()

    def tell(self, ranks: list[int], *order: Any) -> None:
        for rank in ranks:
            self.pipes[rank].send(order)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(("end",))
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def measure(world: int, hosts: int, kills: int, seed: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {
        name: [] for name in ("failed_ended", "next_ended", "activate", "join", "join_to_first", "new_group")
    }
    ranks = Ranks(world, hosts)
    choose = random.Random(seed)
    everybody = list(range(world))
    try:
        for _ in range(5):
            ranks.tell(everybody, "new group")
            times["new_group"].append(max(ranks.hear(rank) for rank in everybody))
        for _ in range(kills):
            victim = choose.randrange(world)
            others = [rank for rank in everybody if rank != victim]
            ranks.tell(everybody, "add", victim)
            assert [ranks.hear(rank) for rank in everybody] == ["ready"] * world
            time.sleep(choose.uniform(0.02, 0.06))
            killed = time.monotonic()
            os.kill(ranks.processes[victim].pid, signal.SIGKILL)
            ended = [ranks.hear(rank) for rank in others]
            times["failed_ended"] += [failed - killed for failed, _ in [max(ended)] if failed]
            times["next_ended"].append(max(right for _, right in ended) - killed)
            ranks.processes[victim].join()
            ranks.start(victim, joins=True)
            ranks.tell(others, "activate", victim)
            times["activate"].append(max(ranks.hear(rank) for rank in others))
            joined, first = ranks.hear(victim)
            times["join"].append(joined)
            times["join_to_first"].append(first)
    finally:
        ranks.close()
    found = {f"{name}_ms": summary(seconds) for name, seconds in times.items() if seconds}
    return {"ranks": world, "hosts": hosts, "kills": kills, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = measure(given.ranks, given.hosts, given.kills, given.seed)
    result["cores"] = len(os.sched_getaffinity(0))
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
