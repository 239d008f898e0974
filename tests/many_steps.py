"""Thousands of random steps of one rank, every row of them checked on the device: for tests/gpu/test_many_steps.py.

All ranks draw the same plan. In it a step has a kind, which all ranks share, and for each rank a batch size, and
whether it makes the step by a replay of a captured graph of that size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from device_oracle import POISON, World, experts
from torch import Tensor

from moe_a2a import Config, Handle, Masked
from moe_a2a.fp8 import FP8, ScaleFormat

CHECKED = ("counts", "sources", "rows", "scales", "rows that hold no token", "sums")


@dataclass(frozen=True)
class Kind:
    """What all ranks do alike in a step."""

    fp8: ScaleFormat | None
    late_weights: bool = False


KINDS = (Kind(None), Kind(None, True), Kind("fp32"), Kind("ue8m0"))
SIZES = (0, 1, 3, 8, 24, 64)


@dataclass
class Graph:
    """A captured step and its static tensors."""

    graph: Any
    arguments: tuple[Tensor, Tensor, Tensor]
    into: Tensor
    got: Masked
    out: Tensor


@dataclass
class Open:
    """An eager step that is sent."""

    world: World
    kind: Kind
    handle: Handle


class Rank:
    """One rank. a2a: an AllToAll, or what behaves like one. with_graphs: some steps are replays."""

    def __init__(self, a2a: Any, config: Config, world_size: int, with_graphs: bool) -> None:
        self.a2a, self.config, self.rank, self.ranks = a2a, config, a2a.rank, world_size
        self.device: torch.device = a2a.device
        self.local = config.local_experts(world_size)
        self.wrong = torch.zeros(len(CHECKED), dtype=torch.int64, device=self.device)
        self.graphs: dict[tuple[Kind, int], Graph] = {}
        self.steps = self.replays = self.nested = 0
        for kind in KINDS:  # compiles
            self.finish(self.begin(World.make(config, [3] * world_size, 0, self.device), kind))
        if with_graphs:
            for kind in KINDS:
                for size in SIZES:
                    self.graphs[kind, size] = self.capture(kind, size)

    def room(self, kind: Kind) -> Tensor:
        shape = (self.local, self.ranks * self.config.max_tokens_per_rank, self.config.hidden_size)
        return torch.empty(shape, dtype=FP8 if kind.fp8 else torch.bfloat16, device=self.device)

    def begin(self, world: World, kind: Kind) -> Open:
        x, ids, weights = world.of(self.rank)
        given = None if kind.late_weights else weights
        return Open(world, kind, self.a2a.dispatch_send(x.clone(), ids.clone(), given, fp8=kind.fp8))

    def finish(self, step: Open, by_reference: bool = False) -> None:
        self.combine(
            step.world, step.kind, self.a2a.dispatch_recv(step.handle, out=self.poisoned(step.kind)), by_reference
        )

    def make(self, world: World, kind: Kind, by_reference: bool) -> None:
        """A step whose halves are one launch each."""
        x, ids, weights = world.of(self.rank)
        given = None if kind.late_weights else weights
        got = self.a2a.dispatch(x.clone(), ids.clone(), given, fp8=kind.fp8, out=self.poisoned(kind))
        self.combine(world, kind, got, by_reference)

    def poisoned(self, kind: Kind) -> Tensor:
        into = self.room(kind)
        into.view(torch.uint8).fill_(POISON)
        return into

    def combine(self, world: World, kind: Kind, got: Masked, by_reference: bool) -> None:
        y = experts(got.x, got.scales, self.rank * self.local)
        weights = world.of(self.rank)[2] if kind.late_weights else None
        out = self.a2a.combine(y, got.handle, weights)
        self.check(world, kind, got, out, by_reference)

    def capture(self, kind: Kind, size: int) -> Graph:
        x = torch.zeros((size, self.config.hidden_size), dtype=torch.bfloat16, device=self.device)
        ids = torch.full((size, self.config.top_k), -1, dtype=torch.int64, device=self.device)
        weights = torch.zeros((size, self.config.top_k), device=self.device)
        into = self.room(kind)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = self.a2a.dispatch(x, ids, None if kind.late_weights else weights, fp8=kind.fp8, out=into)
            y = experts(got.x, got.scales, self.rank * self.local)
            out = self.a2a.combine(y, got.handle, weights if kind.late_weights else None)
        return Graph(graph, (x, ids, weights), into, got, out)

    def replay(self, world: World, kind: Kind, by_reference: bool = False) -> None:
        captured = self.graphs[kind, world.tokens[self.rank]]
        for static, new in zip(captured.arguments, world.of(self.rank), strict=True):
            static.copy_(new)
        captured.into.view(torch.uint8).fill_(POISON)
        captured.out.fill_(torch.nan)
        captured.graph.replay()
        self.replays += 1
        self.check(world, kind, captured.got, captured.out, by_reference)

    def check(self, world: World, kind: Kind, got: Masked, out: Tensor, by_reference: bool) -> None:
        want = world.sums(self.rank, kind.fp8)
        assert out.shape == want.shape
        self.wrong[:5] += world.wrong_rows(self.rank, got, kind.fp8)
        self.wrong[5] += (out.view(torch.int16) != want.view(torch.int16)).sum()
        if by_reference:
            world.check_against_reference(self.rank, got, out, kind.fp8)
        self.steps += 1

    def run(self, steps: int, every: int, seed: int, skew: Callable[[float], None]) -> None:
        """Make so many steps. Every so many, and at the end, look at what was counted, and check one by the oracle too.

        skew: lets this rank's device fall behind by a part of 1. Raises AssertionError.
        """
        chance = random.Random(seed)
        delays = random.Random(1000 * seed + self.rank)
        looked = 0
        while self.steps < steps:
            form = chance.choices(["plain", "nested", "pair", "discard"], [70, 15, 10, 5])[0]
            kinds = [chance.choice(KINDS) for _ in range(2)]
            worlds = []
            replays = []
            for _ in range(2):
                plan = [(chance.random() < 0.5, chance.choice(SIZES), chance.randint(0, 64)) for _ in range(self.ranks)]
                replays.append(plan[self.rank][0] and bool(self.graphs))
                tokens = [size if captured else any_size for captured, size, any_size in plan]
                worlds.append(World.make(self.config, tokens, chance.getrandbits(40), self.device))
            if delays.random() < 0.1:
                skew(delays.random())
            by_reference = self.steps - looked >= every
            if form == "plain":
                self.whole(worlds[0], kinds[0], replays[0], by_reference)
            elif form == "nested":  # a step, often a replay, inside of an eager one
                outer = self.begin(worlds[1], kinds[1])
                self.whole(worlds[0], kinds[0], replays[0], by_reference)
                self.finish(outer, by_reference)
                self.nested += replays[0]
            elif form == "pair":
                first, second = self.begin(worlds[0], kinds[0]), self.begin(worlds[1], kinds[1])
                self.finish(second, by_reference)
                self.finish(first)
            else:
                opened = self.begin(worlds[0], kinds[0])
                if chance.random() < 0.5:
                    self.a2a.dispatch_recv(opened.handle)
                self.a2a.discard(opened.handle)
            if by_reference:
                self.look(looked)
                looked = self.steps
        self.look(looked)

    def whole(self, world: World, kind: Kind, replay: bool, by_reference: bool) -> None:
        if replay:
            self.replay(world, kind, by_reference)
        elif self.steps % 2 == self.rank % 2:  # ranks need not agree about it
            self.make(world, kind, by_reference)
        else:
            self.finish(self.begin(world, kind), by_reference)

    def look(self, since: int) -> None:
        self.a2a.check()
        found = dict(zip(CHECKED, self.wrong.tolist(), strict=True))
        assert not any(found.values()), f"rank {self.rank}: wrong in steps {since} to {self.steps}: {found}"
