"""Carries events out on a group, and waits until the group has got over them."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_a2a.chaos import board as b
from moe_a2a.chaos.events import MOVES, Event
from moe_a2a.chaos.group import Group, Hang
from moe_a2a.chaos.network import Network
from moe_a2a.chaos.tally import Tally

_MARGIN_S = 20.0


def repeat(given: Mapping[str, Any], number: int) -> str:
    """The options that repeat an event. given: what the run was asked for."""
    return f"--make {given['makes']} --seed {given['seed']} --first {number} --kills 1"


class Director:
    """One group after the other: a group that has gone wrong is given up. say: prints a line."""

    def __init__(self, make: Callable[..., Group], network: Network | None, tally: Tally, say: Callable[[str], None]):
        self._make, self._network, self._tally, self._say = make, network, tally, say
        self._event = Event(-1, "founding")
        self._marks: list[str] = []
        self._faults = 0
        self._group: Group | None = None
        self._checked = (0, 0)
        self._makes = tally.given["makes"]

    # life

    def begin(self) -> None:
        """Found a group, if there is none. Raises Hang."""
        if self._group is None:
            self._checked = (0, 0)
            self._group = self._make(wrong=self._wrong, note=self._note)
            self._settle("all ranks to make steps")

    def close(self, kindly: bool = True) -> None:
        if self._group is not None:
            self._count_steps()
            self._group.close(kindly)
            self._group = None

    def carry_out(self, event: Event) -> None:
        """Carry out an event, and count and print what came of it. Never raises because of the group."""
        self._event, self._marks, before = event, [], len(self._tally.faults)
        try:
            self.begin()
            group = self._its()
            group.forget()
            self._do(event)
            group.check_both_sides()
            self._unexplained(event)
        except Hang as error:
            self._wrong("hang", str(error))
        self._count_steps()
        tally = self._tally
        tally.count(tally.counts, event.kind)
        for rank in event.ranks:
            tally.count(tally.points, event.where(self._makes))
            tally.count(tally.victims, f"rank {rank}")
        self._say(f"{event.describe(self._makes)}: {', '.join(self._marks)}")
        if len(tally.faults) > before:
            self._keep_stacks()
            self._say(f"    repeat it with {repeat(tally.given, event.number)}")
            self.close(kindly=False)

    def _keep_stacks(self) -> None:
        if self._group is not None:
            name = f"moe-a2a-chaos-{self._tally.given['seed']}-{self._event.number}.txt"
            path = Path(tempfile.gettempdir()) / name
            path.write_text(self._group.dump())
            self._say(f"    where everybody was, stacks and logs: {path}")

    def _wrong(self, kind: str, text: str) -> None:
        self._tally.faults.append((kind, self._event.number, text))
        self._say(f"    WRONG ({kind}) in event {self._event.describe(self._makes)}: {text}")

    def _note(self, text: str) -> None:
        self._say(f"    {text}")

    def _its(self) -> Group:
        assert self._group is not None
        return self._group

    def _count_steps(self) -> None:
        if self._group is not None:
            steps, rows = self._group.checked
            self._tally.steps += steps - self._checked[0]
            self._tally.rows += rows - self._checked[1]
            self._checked = (steps, rows)

    def _mark(self, what: str, seconds: float, name: str = "") -> None:
        """Note a time. name: what it is called in the distribution, if it is to be in there."""
        self._marks.append(f"{what} {1e3 * seconds:.0f} ms")
        if name:
            self._tally.time(name, seconds)

    # events

    def _do(self, event: Event) -> None:
        kind = event.kind
        if kind in ("kill", "stop") and event.point == "join":
            self._strike_at_join(event)
        elif kind in ("kill", "kill two", "stop", "stop two"):
            self._lose(event)
        elif kind == "hiccup":
            (rank,) = event.ranks
            group = self._its()
            group.signal(rank, signal.SIGSTOP)
            group.let_pass(min(event.delay_s, 0.3 * group.timeout_s))
            group.signal(rank, signal.SIGCONT)
            self._settle()
        elif kind == "leave":
            self._leave(event)
        elif kind == "host":
            self._lose_host(event)
        elif kind == "watcher":
            self._lose_watcher(event)
        elif kind in ("store", "store and kill", "store stopped"):
            self._lose_store(event)
        else:
            self._cut(event)

    def _lose(self, event: Event) -> None:
        """Kill or stop ranks, see the others go on, and bring them back."""
        group, kills = self._its(), event.kind.startswith("kill")
        before = {rank: group.lives[rank].incarnation for rank in event.ranks}
        struck = self._strike(event, signal.SIGKILL if kills else signal.SIGSTOP)
        self._go_on(event.ranks, before, struck, event.kind)
        if kills:
            self._replace(event.ranks)
        else:
            self._wake(event.ranks, event.new)
        self._settle()
        self._returned(event.ranks, kills or event.new)

    def _strike(self, event: Event, what: int) -> float:
        """Send a signal to ranks at a point of their steps, or let them leave. Returns when the last one was struck."""
        group = self._its()
        if what == signal.SIGKILL:
            group.expect_end(event.ranks)
        if event.point == "idle":
            last = group.board.pause()
            group.until(lambda: bool((group.board.ranks[:, b.DONE] >= last).all()), self._patience, "a pause")
            group.let_pass(event.delay_s)
        if event.point not in MOVES:
            if event.point == "anywhere":
                group.let_pass(event.delay_s)
            for rank in event.ranks:
                group.signal(rank, what)
            struck = time.monotonic()
            if event.point == "idle":
                if what == signal.SIGKILL:
                    alive = group.everybody - set(event.ranks)
                    group.until(lambda: group.agree(alive, alive), self._patience, "a view while nobody makes steps")
                group.board.resume()
            return struck
        newest = int(group.board.ranks[:, b.STEP].max())
        for rank, steps in zip(event.ranks, event.steps, strict=True):
            words = group.board.ranks[rank]
            words[b.STRUCK] = 0
            words[b.ARM_STEP], words[b.ARM_POINT] = newest + steps, MOVES.index(event.point)
            words[b.ARM_WHAT] = what

        def all_struck() -> bool:
            return bool((group.board.ranks[list(event.ranks), b.STRUCK] > 0).all())

        group.until(all_struck, self._patience, f"{event.point} of ranks {event.ranks}")
        if what == signal.SIGSTOP:
            for rank in event.ranks:
                group.lives[rank].stopped = True
        return float(group.board.ranks[list(event.ranks), b.STRUCK].max()) / 1e9

    def _go_on(self, lost: Iterable[int], before: dict[int, int], since: float, kind: str) -> None:
        """The others agree on a view without these processes, and make whole steps."""
        group = self._its()
        alive = group.everybody - set(lost)
        group.until(lambda: group.agree(alive, alive), self._patience, f"a view of {sorted(alive)}")
        masked = max(self._masked(rank, before, since) for rank in alive)
        self._mark("masked after", masked - since, f"{kind}: masked")
        group.until(lambda: group.whole_since(alive, alive), self._patience, f"whole steps of {sorted(alive)}")
        steps = [group.lives[rank].whole[-1] for rank in alive]
        self._mark("whole after", max(step[3] for step in steps) - since, f"{kind}: whole again")
        for step in steps:
            self._tally.time("next step", step[3] - step[2])

    def _masked(self, rank: int, gone: dict[int, int], since: float) -> float:
        """When a rank first had a view without these processes."""
        views = self._its().lives[rank].views
        return next(
            view.at
            for view in views
            if view.at >= since and not any(view.held.get(r) == incarnation for r, incarnation in gone.items())
        )

    def _replace(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self._its().start(rank, joins=True)

    def _wake(self, ranks: Iterable[int], new: bool) -> None:
        """Let ranks that were stopped go on: they find themselves excluded. new: after others took their slots."""
        group = self._its()
        ghosts = [group.supersede(rank) for rank in ranks] if new else []
        if new:
            self._settle()
        asleep = ghosts or [group.lives[rank] for rank in ranks]
        for live in asleep:
            live.stopped = False
            os.kill(live.process.pid, signal.SIGCONT)
        group.until(lambda: all(live.outside for live in asleep), self._patience, "that they see it")
        for ghost in ghosts:
            group.lay(ghost)

    def _settle(self, what: str = "that everybody is back") -> None:
        group = self._its()
        everybody = group.everybody
        group.until(
            lambda: group.agree(everybody, everybody) and group.whole_since(everybody, everybody), self._patience, what
        )

    def _returned(self, ranks: Iterable[int], new: bool) -> None:
        group = self._its()
        group.until(lambda: all(group.lives[rank].came for rank in ranks), self._patience, "the first step")
        for rank in ranks:
            took = group.lives[rank].came[-1][1]
            self._mark("back in", took, f"back ({'new process' if new else 'in place'})")

    @property
    def _patience(self) -> float:
        return 4 * self._its().timeout_s + _MARGIN_S

    def _strike_at_join(self, event: Event) -> None:
        """A rank is killed, and another one, or its successor, is struck while that joins."""
        group = self._its()
        joins, victim = event.ranks
        everybody = group.everybody
        before = {joins: group.lives[joins].incarnation}
        group.signal(joins, signal.SIGKILL)
        self._go_on([joins], before, time.monotonic(), "kill")
        self._replace([joins])
        group.let_pass(0.7 * event.delay_s)
        kills = event.kind == "kill"
        group.signal(victim, signal.SIGKILL if kills else signal.SIGSTOP)
        alive = everybody - {victim}
        since = time.monotonic()
        group.until(lambda: group.agree(alive, alive), self._patience, f"a view of {sorted(alive)}")
        group.until(lambda: group.whole_since(alive, alive), self._patience, f"whole steps of {sorted(alive)}")
        self._mark("whole after", time.monotonic() - since)
        if kills:
            self._replace([victim])
        elif victim != joins:
            self._wake([victim], event.new)
        else:
            group.signal(victim, signal.SIGCONT)
        self._settle()

    def _leave(self, event: Event) -> None:
        """A rank leaves in order, and comes back."""
        group, (rank,) = self._its(), event.ranks
        self._strike(
            Event(**{**event.__dict__, "point": event.point if event.point in MOVES else MOVES[0]}), b.LEAVE + 3
        )
        group.until(lambda: bool(group.lives[rank].outside), self._patience, f"that rank {rank} has left")
        if not group.lives[rank].outside[0][2]:
            self._tally.count(self._tally.uncalled, "excluded while it left")
        if event.new:
            group.signal(rank, signal.SIGKILL)
            self._replace([rank])
        self._settle()
        self._returned([rank], event.new)

    def _lose_host(self, event: Event) -> None:
        """All ranks of a host are killed, and its watcher: nobody sees it but those who wait."""
        group = self._its()
        ranks = group.ranks_of(event.hosts)
        before = {rank: group.lives[rank].incarnation for rank in ranks}
        group.let_pass(event.delay_s)
        group.kill_watcher(event.hosts[0])
        for rank in ranks:
            group.signal(rank, signal.SIGKILL)
        self._go_on(ranks, before, time.monotonic(), event.kind)
        self._replace(ranks)
        self._settle()
        self._returned(ranks, True)

    def _lose_watcher(self, event: Event) -> None:
        group = self._its()
        host = event.hosts[0]
        group.let_pass(event.delay_s)
        pid = group.kill_watcher(host)
        killed = time.monotonic()

        def another() -> bool:
            return all(group.lives[rank].watcher not in (0, pid) for rank in group.ranks_of([host]))

        group.until(another, self._patience, f"another watcher of host {host}")
        self._mark("another one after", time.monotonic() - killed, "watcher: another one")
        self._settle()

    def _lose_store(self, event: Event) -> None:
        """The store dies or hangs, and comes back; perhaps a rank dies at the same time."""
        group = self._its()
        epoch = max(live.view.epoch for live in group.lives.values() if live.view)
        before = {rank: group.lives[rank].incarnation for rank in event.ranks}
        if event.kind == "store stopped":
            pid = group.store_pid()
            os.kill(pid, signal.SIGSTOP)
            group.let_pass(20 * event.delay_s)
            os.kill(pid, signal.SIGCONT)
            self._settle()
            return
        group.let_pass(event.delay_s)
        os.kill(group.store_pid(), signal.SIGKILL)
        killed = time.monotonic()
        struck = self._strike(event, signal.SIGKILL) if event.ranks else killed
        if self._network is not None:
            group.let_pass(3 * event.delay_s)
            group.start_store(int(group.store_url.rpartition(":")[2]))
        alive = group.everybody - set(event.ranks)

        def thawed() -> bool:
            return (
                group.agree(alive, alive)
                and min(live.view.epoch for r, live in group.lives.items() if live.view and r in alive) > epoch
            )

        group.until(thawed, self._patience, "a view of the store that came back")
        self._mark("thawed after", time.monotonic() - killed, "store: view goes on")
        if event.ranks:
            self._go_on(event.ranks, before, struck, event.kind)
            self._replace(event.ranks)
        self._settle()

    def _cut(self, event: Event) -> None:
        """The network of a host or of the store goes and comes back, or that between two hosts."""
        group, network = self._its(), self._network
        assert network is not None
        group.let_pass(event.delay_s)
        if event.kind == "cut hosts":
            network.part(event.hosts, True)
            group.let_pass(group.timeout_s * (1 + 5 * event.delay_s))
            network.part(event.hosts, False)
            self._settle()
        elif event.kind == "cut store":
            network.cut(network.store, event.silent)
            group.let_pass(group.timeout_s * (0.2 + 10 * event.delay_s))
            network.heal(network.store, event.silent)
            self._settle()
        else:
            (host,) = event.hosts
            ranks = group.ranks_of([host])
            before = {rank: group.lives[rank].incarnation for rank in ranks}
            since = time.monotonic()
            network.cut(host, event.silent)
            try:
                self._go_on(ranks, before, since, "cut host")
                group.let_pass(5 * event.delay_s)
            finally:
                network.heal(host, event.silent)
            group.until(lambda: all(group.lives[r].outside for r in ranks), self._patience, "that they see it")
            self._settle()
            self._returned(ranks, False)

    def _unexplained(self, event: Event) -> None:
        """Count ranks that were excluded, and steps that were not whole, though nothing was done that explains it."""
        group = self._its()
        struck = set(event.ranks) | group.ranks_of(event.hosts) if event.kind != "watcher" else set()
        excluded = [rank for rank, live in group.lives.items() if live.outside and rank not in struck]
        for rank in excluded:
            live = group.lives[rank]
            self._tally.count(self._tally.uncalled, "ranks excluded")
            self._note(f"rank {rank} was excluded without a cause: {live.outside[0][1]}")
        if excluded:
            self._keep_stacks()
        if event.kind in ("leave", "watcher", "store", "store stopped", "cut store"):
            for rank, live in group.lives.items():
                for number, (missing, _) in live.short.items():
                    if rank not in event.ranks:
                        self._tally.count(self._tally.uncalled, "steps not whole")
                        self._note(f"step {number} of rank {rank} lacks {missing} without a cause")
