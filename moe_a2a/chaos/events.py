"""What happens to a group, drawn from a seed: the same seed and number always give the same event."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

#: Where a rank can be struck: within a step, at a random time ("anywhere"), while nobody makes steps, or while a
#: process joins.
MOVES = ("dispatch", "dispatch sent", "received", "combine sent", "step ended")
POINTS = (*MOVES, "anywhere", "idle", "join")
#: What MOVES are called where ranks make collectives.
_COLLECTIVE_MOVES = ("first collective", "first begun", "first ended", "others begun", "step ended")

#: Kind of event -> how often it is drawn.
_WEIGHTS = {
    "kill": 30,  # -9
    "kill two": 14,
    "stop": 10,  # SIGSTOP, and SIGCONT when the others have gone on
    "stop two": 4,
    "hiccup": 4,  # stopped for less than the budget
    "leave": 5,  # in order, and back
    "host": 4,  # all ranks of a host and its watcher are killed
    "watcher": 4,
    "store": 5,
    "store and kill": 5,
    "store stopped": 1,
    "cut host": 6,  # its network goes, and comes back
    "cut hosts": 3,  # two hosts no longer reach each other, and reach everybody else
    "cut store": 3,
}
KINDS = tuple(_WEIGHTS)
#: Those that need a network of the hosts' own.
CUTS = ("cut host", "cut hosts", "cut store")
_TWO = ("kill two", "stop two")
_RANKS = ("kill", "stop", "hiccup", "leave", "store and kill", *_TWO)


@dataclass(frozen=True)
class Event:
    """ranks: who is struck, or, for "join", who joins and who is struck meanwhile. hosts: whose network or watcher.
    point: one of POINTS, for ranks. steps: how many steps from now, by rank. delay_s: for what is at no step. silent:
    a network that is cut drops what is sent; else the host itself sees its link go. new: a new process takes the slot
    of who has left or was stopped, and who was stopped wakes up after that."""

    number: int
    kind: str
    ranks: tuple[int, ...] = ()
    hosts: tuple[int, ...] = ()
    point: str = "anywhere"
    steps: tuple[int, ...] = ()
    delay_s: float = 0.0
    silent: bool = False
    new: bool = False

    def where(self, makes: str) -> str:
        """The point, as it is called where ranks make this (rank.MAKERS)."""
        if makes == "collectives" and self.point in MOVES:
            return _COLLECTIVE_MOVES[MOVES.index(self.point)]
        return self.point

    def describe(self, makes: str) -> str:
        who = [f"rank {rank}" for rank in self.ranks] + [f"host {host}" for host in self.hosts]
        where = f" at {self.where(makes)}" if self.ranks else ""
        return f"{self.number}: {self.kind}{' of ' if who else ''}{' and '.join(who)}{where}"


def fits(kind: str, ranks: int, hosts: int) -> bool:
    """Whether somebody is left, and there is somebody to be struck."""
    return (ranks > 2 or kind not in _TWO) and (hosts > 1 or kind not in ("host", "cut host", "cut hosts"))


def draw(seed: int, number: int, ranks: int, hosts: int, kinds: Collection[str] = KINDS) -> Event:
    """Event `number` of a seed. kinds: those that are wanted."""
    chance = random.Random(f"{seed}/{number}")
    wanted = [kind for kind in KINDS if kind in kinds and fits(kind, ranks, hosts)]
    kind = chance.choices(wanted, [_WEIGHTS[kind] for kind in wanted])[0]
    point = chance.choices(POINTS, [2, 2, 2, 2, 1, 8, 2, 5])[0]
    idles = ("kill", "kill two", "stop", "stop two")
    if (point == "join" and kind not in ("kill", "stop")) or (point == "idle" and kind not in idles):
        point = "anywhere"
    struck: tuple[int, ...] = ()
    if kind in _RANKS:
        struck = tuple(chance.sample(range(ranks), 2 if kind in _TWO else 1))
        if point == "join":  # the one that joins is struck itself, or another one
            struck = (struck[0], chance.choice([struck[0], chance.randrange(ranks)]))
    chosen: tuple[int, ...] = ()
    if kind in ("host", "watcher", "cut host"):
        chosen = (chance.randrange(hosts),)
    elif kind == "cut hosts":
        chosen = tuple(chance.sample(range(hosts), 2))
    return Event(
        number,
        kind,
        struck,
        chosen,
        point,
        tuple(chance.randrange(2, 8) for _ in struck),
        chance.uniform(0.0, 0.4),
        chance.random() < 0.5,
        chance.random() < 0.3,
    )
