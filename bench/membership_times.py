"""How long it takes until every survivor's view has masked a rank that was killed, and how long to take one back.

    python bench/membership_times.py --ranks 4 --hosts 2 --kills 100 [--store etcd://127.0.0.1:2379] [--json FILE]

Ranks are processes that hold a Member and look at their page as waits do; there is no data path. Hosts are played on
one machine: each has its own watcher. After every kill a new process takes the slot, and is activated.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from summary import summary

from moe_a2a.bootstrap import StoreBootstrap
from moe_a2a.membership.group import found_group, join_group
from moe_a2a.membership.member import Member, MemberOptions
from moe_a2a.membership.store_process import start_store

NAP_S = 200e-6
LOST_S = 20.0


def rank_main(rank: int, world: int, host: str, url: str, boot: tuple[str, int] | None, pipe: Connection) -> None:
    """boot: where founders meet; None for a process that joins."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = MemberOptions(url, group="bench", host=host)
    if boot is not None:
        import torch.distributed as dist

        store = dist.TCPStore(*boot, is_master=False, wait_for_workers=False)
        member = found_group(StoreBootstrap(store, rank, world), options)
    else:
        member = join_group(options, rank)
    pipe.send((rank, member.incarnation, time.monotonic()))
    while True:
        order, *given = pipe.recv()
        if order == "end":
            member.close()
            return
        if order == "watch":
            victim, incarnation = given
            member.wait(lambda view, who=(victim, incarnation): view.holds(*who))  # type: ignore[misc]
            pipe.send("ready")
            pipe.send(_watch(member, victim, incarnation, time.monotonic()))
        elif order == "activate":
            member.activate({given[0]: given[1]}, [0])
            pipe.send(time.monotonic())
        elif order == "active":
            member.wait_active()
            pipe.send(time.monotonic())


def _watch(member: Member, victim: int, incarnation: int, start: float) -> tuple[float, float]:
    """When this rank knew of the death, and when its view masked the victim (monotonic seconds)."""
    known = 0.0
    while member.page.takes_part(victim, incarnation):
        if not known and member.page.is_dead(victim, incarnation):
            known = time.monotonic()
        if time.monotonic() - start > LOST_S:
            raise TimeoutError(f"rank {member.rank} still has rank {victim} in its view")
        time.sleep(NAP_S)
    masked = time.monotonic()
    assert not member.view.active[victim]
    return known or masked, masked


class Ranks:
    """The ranks of a group, as their parent sees them."""

    def __init__(self, ranks: int, hosts: int, url: str) -> None:
        import torch.distributed as dist

        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch", "torch.distributed", "moe_a2a.membership.group", "moe_a2a.bootstrap"]
        )
        self._world, self._url = ranks, url
        self.host = [f"host-{rank * hosts // ranks}" for rank in range(ranks)]
        meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[Any] = [None] * ranks
        self.pipes: list[Any] = [None] * ranks
        self.incarnations = [0] * ranks
        for rank in range(ranks):
            self.start(rank, ("127.0.0.1", meeting.port))
        for rank in range(ranks):
            self.greet(rank)

    def start(self, rank: int, boot: tuple[str, int] | None = None) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=rank_main, args=(rank, self._world, self.host[rank], self._url, boot, theirs), daemon=True
        )
        process.start()
        theirs.close()
        self.processes[rank], self.pipes[rank] = process, ours

    def greet(self, rank: int) -> float:
        _, self.incarnations[rank], when = self.hear(rank)
        return float(when)

    def hear(self, rank: int) -> Any:
        if not self.pipes[rank].poll(LOST_S + 5):
            raise TimeoutError(f"rank {rank} said nothing")
        return self.pipes[rank].recv()

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(("end",))
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def measure(ranks: int, hosts: int, kills: int, url: str, seed: int) -> dict[str, Any]:
    group = Ranks(ranks, hosts, url)
    choose = random.Random(seed)
    masked: list[float] = []
    known: list[float] = []
    activated: list[float] = []
    rejoined: list[float] = []
    try:
        for _ in range(kills):
            victim = choose.randrange(ranks)
            others = [rank for rank in range(ranks) if rank != victim]
            for rank in others:
                group.pipes[rank].send(("watch", victim, group.incarnations[victim]))
            assert [group.hear(rank) for rank in others] == ["ready"] * len(others)
            time.sleep(choose.uniform(0.02, 0.06))
            killed = time.monotonic()
            os.kill(group.processes[victim].pid, signal.SIGKILL)
            times = [group.hear(rank) for rank in others]
            known.append(max(when for when, _ in times) - killed)
            masked.append(max(when for _, when in times) - killed)
            group.processes[victim].join()
            group.start(victim)
            joined = group.greet(victim)
            helper = choose.choice(others)
            group.pipes[victim].send(("active",))
            asked = time.monotonic()
            group.pipes[helper].send(("activate", victim, group.incarnations[victim]))
            group.hear(helper)
            done = group.hear(victim)
            activated.append(done - asked)
            rejoined.append(joined - killed)
    finally:
        group.close()
    return {
        "ranks": ranks,
        "hosts": hosts,
        "kills": kills,
        "masked_ms": summary(masked),
        "known_ms": summary(known),
        "activated_ms": summary(activated),
        "killed_to_slot_taken_ms": summary(rejoined),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", default="", help="default: a store that is started for this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = measure(given.ranks, given.hosts, given.kills, given.store or start_store(), given.seed)
    result["store"] = given.store.split(":")[0] or "tcp"
    result["cores"] = len(os.sched_getaffinity(0))
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
