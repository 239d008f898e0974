"""Steps of elastic groups against the oracle, restricted to the ranks that a result says are in it.

The oracle knows nothing of losses: a rank that is missing from a dispatch brought no tokens, and a rank that is missing
from a combine gave no sums, which is what ids of -1 say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from ranks import Ctx
from steps import Case, World, check_dispatched, check_sum, combine_weights, dispatch_args, expert_output, world_of

from moe_a2a import AllToAll, Elastic, Handle, Options

CASE = Case(experts=32, hidden=128, tokens=(9, 4, 13, 0, 7))


def elastic_a2a(ctx: Ctx, case: Case = CASE, timeout_s: float = 10.0, **elastic: Any) -> AllToAll:
    options = Options(timeout_s=timeout_s, host=ctx.host)
    return AllToAll(
        case.config(),
        store=ctx.store,
        rank=ctx.rank,
        world_size=ctx.world,
        options=options,
        elastic=Elastic(**elastic),
    )


def without(world: World, ranks: Collection[int], ids: Collection[int] = ()) -> World:
    """The world in which these ranks brought nothing."""

    def cut(parts: list[Any] | None) -> list[Any] | None:
        return None if parts is None else [part[:0] if r in ranks else part for r, part in enumerate(parts)]

    del ids
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
    """One step, made move by move and checked against what it says of itself."""

    a2a: AllToAll
    case: Case
    number: int
    channel: str | None = None
    layout: str = ""
    world: World | None = None
    handle: Handle | None = None
    got: Any = None

    def send(self) -> None:
        self.world = world_of(self.case, self.a2a.world_size, self.number)
        args, keywords = dispatch_args(self.case, self.world, self.a2a.rank)
        self.handle = self.a2a.dispatch_send(*args, channel=self.channel, **keywords)

    def receive(self) -> None:
        layout = self.layout or self.case.layouts[self.number % len(self.case.layouts)]
        self.got = self.a2a.dispatch_recv(self.handle, layout=layout, alignment=self.case.alignment)
        members = self.handle._step.roll.incarnations
        came = members.keys() - set(self.a2a.missing(self.handle)) - self.handle._step.roll.left
        absent = set(range(self.a2a.world_size)) - came
        self.world = without(self.world, absent - {self.a2a.rank})
        check_dispatched(self.case, self.world, self.a2a.rank, self.got)

    def send_back(self) -> None:
        y = expert_output(self.case, self.world, self.a2a.rank, self.got)
        self.a2a.combine_send(y, self.handle, combine_weights(self.case, self.world, self.a2a.rank, self.got))

    def finish(self) -> None:
        out = self.a2a.combine_recv(self.handle)
        roll, rank = self.handle._step.roll, self.a2a.rank
        world = served(self.case, self.world, rank, self.a2a.world_size, roll.returned)
        hosts = [range(self.a2a.world_size)]
        check_sum(self.case, world, rank, hosts, out)
        lost = self.a2a.elastic.lost(self.handle)
        gone = (self.world.ids[rank] != world.ids[rank]).any(dim=1)
        assert lost.tokens == int(gone.sum()), f"{lost}, but {int(gone.sum())} tokens lack experts"
        if gone.any():
            assert set(lost.experts) == set(self.world.ids[rank][self.world.ids[rank] != world.ids[rank]].tolist())
        if not self.missing:
            assert roll.returned == roll.incarnations.keys() - roll.left

    @property
    def missing(self) -> list[int]:
        return self.a2a.missing(self.handle)

    def run(self) -> ElasticFlight:
        self.send()
        self.receive()
        self.send_back()
        self.finish()
        return self
