"""Steps of elastic groups against the oracle, restricted to the ranks that a result says are in it.

The oracle knows nothing of losses: a rank that is missing from a dispatch brought no tokens, and a rank that is missing
from a combine gave no sums, which is what ids of -1 say.
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from ranks import Ctx
from steps import Case, World, check_dispatched, check_sum, combine_weights, dispatch_args, expert_output, world_of

from moe_a2a import AllToAll, Elastic, Handle, Options
from moe_a2a.membership.store_process import start_store

CASE = Case(experts=48, hidden=128, tokens=(9, 4, 13, 0, 7))
MOVES = ("send", "receive", "send_back", "finish")
#: Steps after the one in which a rank said that it is enough.
_LAST = 12


@dataclasses.dataclass(frozen=True)
class Where:
    """A group in a store."""

    store: str
    group: str


_stores: list[str] = []


def _store() -> str:
    """One for many tests: to start one takes longer than a test. It ends some time after its last user."""
    if not _stores or not _answers(_stores[-1]):
        _stores.append(start_store(idle_s=60.0))
    return _stores[-1]


def _answers(url: str) -> bool:
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def new_group() -> Where:
    return Where(_store(), secrets.token_hex(4))


def elastic_a2a(
    ctx: Ctx,
    where: Where,
    founders: int,
    *,
    case: Case = CASE,
    join: int | None = None,
    timeout_s: float = 10.0,
    **elastic: Any,
) -> AllToAll:
    """Found a group of the first so many ranks, or join it as rank `join` (-1: whichever is free)."""
    given = Elastic(where.store, group=where.group, join=join is not None, **elastic)
    options = Options(timeout_s=timeout_s, host=ctx.host)
    if join is not None:
        return AllToAll(case.config(), rank=None if join == -1 else join, options=options, elastic=given)
    return AllToAll(case.config(), store=ctx.store, rank=ctx.rank, world_size=founders, options=options, elastic=given)


def without(world: World, ranks: Collection[int]) -> World:
    """The world in which these ranks brought nothing."""

    def cut(parts: list[Any] | None) -> list[Any] | None:
        return None if parts is None else [part[:0] if r in ranks else part for r, part in enumerate(parts)]

    return dataclasses.replace(
        world, **{field.name: cut(getattr(world, field.name)) for field in dataclasses.fields(world)}
    )


def served(case: Case, world: World, rank: int, slots: int, ranks: Collection[int]) -> World:
    """The world in which this rank's tokens chose experts of these ranks alone."""
    experts = case.sizes(slots).experts_per_rank
    owner = world.ids[rank].long().div(experts, rounding_mode="floor")
    there = torch.zeros(owner.shape, dtype=torch.bool)
    for other in ranks:
        there |= owner == other
    ids = list(world.ids)
    ids[rank] = torch.where(there, world.ids[rank], -1)
    return dataclasses.replace(world, ids=ids)


@dataclasses.dataclass
class ElasticFlight:
    """One step, made move by move and checked against what it says of itself. Its number in its channel chooses inputs
    and layout, so that ranks that come later bring what the others expect."""

    a2a: AllToAll
    case: Case = CASE
    channel: int = 0
    handle: Handle | None = None
    got: Any = None

    def send(self) -> None:
        number = self.a2a._backend._number[self.channel] + 1
        self.world = world_of(self.case, self.a2a.world_size, number)
        args, keywords = dispatch_args(self.case, self.world, self.a2a.rank)
        channel = self.a2a.config.channels[self.channel]
        self.handle = self.a2a.dispatch_send(*args, channel=channel, **keywords)
        assert self.handle.step == number

    def receive(self) -> None:
        layout = self.case.layouts[self.handle.step % len(self.case.layouts)]
        self.got = self.a2a.dispatch_recv(self.handle, layout=layout, alignment=self.case.alignment)
        roll = self.handle._step.roll
        came = {arrival.rank for arrival in self.handle._step.arrivals}
        assert set(self.missing) == roll.incarnations.keys() - came - roll.left
        self.world = without(self.world, set(range(self.a2a.world_size)) - came - {self.a2a.rank})
        check_dispatched(self.case, self.world, self.a2a.rank, self.got)

    def send_back(self) -> None:
        y = expert_output(self.case, self.world, self.a2a.rank, self.got)
        self.a2a.combine_send(y, self.handle, combine_weights(self.case, self.world, self.a2a.rank, self.got))

    def finish(self) -> None:
        out = self.a2a.combine_recv(self.handle)
        roll, rank, slots = self.handle._step.roll, self.a2a.rank, self.a2a.world_size
        world = served(self.case, self.world, rank, slots, roll.returned)
        check_sum(self.case, world, rank, [range(slots)], out)
        lost = self.a2a.elastic.lost(self.handle)
        choices, left = self.world.ids[rank], world.ids[rank]
        assert lost.tokens == int((choices != left).any(dim=1).sum()), f"{lost}"
        assert set(lost.experts) == set(choices[choices != left].tolist())
        assert self.missing or roll.returned == roll.incarnations.keys() - roll.left

    @property
    def missing(self) -> list[int]:
        return self.a2a.missing(self.handle)


@dataclasses.dataclass
class Made:
    """What a rank says of a step that it made."""

    number: int
    missing: list[int]
    members: list[int]
    seconds: float
    left: list[int]


def serve(
    ctx: Ctx,
    a2a: AllToAll,
    enough: Callable[[Made], bool],
    before: Callable[[int, str], None] = lambda number, move: None,
    case: Case = CASE,
    most: int = 3000,
    key: str = "enough",
) -> list[Made]:
    """Make steps until a few after one that some rank found to be `enough`. before: called before every move of every
    step. key: other for every call of a test. Returns all steps."""
    made: list[Made] = []
    last = most = most + a2a._backend._number[0]
    while not made or made[-1].number < last:
        flight = ElasticFlight(a2a, case)
        number = a2a._backend._number[0] + 1
        started = time.monotonic()
        for move in MOVES:
            before(number, move)
            getattr(flight, move)()
        roll = flight.handle._step.roll
        took = time.monotonic() - started
        made.append(Made(number, flight.missing, sorted(roll.incarnations), took, sorted(roll.left)))
        if last == most and ctx.store.check([key]):
            last = int(ctx.store.get(key))
        elif last == most and enough(made[-1]):
            last = int(ctx.store.compare_set(key, "", str(number + _LAST)))
    assert last < most, f"{most} steps, and it was never enough: {made[-1]}"
    return made


def run_out(a2a: AllToAll, case: Case = CASE) -> None:
    """A step, checked."""
    flight = ElasticFlight(a2a, case)
    for move in MOVES:
        getattr(flight, move)()
