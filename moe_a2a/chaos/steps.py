"""A step of an elastic group, checked to the last bit against the oracle (moe_a2a/reference.py), which knows nothing of
losses: a rank that is missing from a dispatch brought no tokens, and one that is missing from a combine is what ids of
-1 say.

Every rank derives the inputs of all ranks from the seed. All sums are exact in every dtype: small whole numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_a2a import reference
from moe_a2a.all_to_all import AllToAll
from moe_a2a.config import Config
from moe_a2a.step import Roll
from moe_a2a.types import LAYOUTS, Contiguous, Dispatched, Grouped, Handle, Masked
from moe_a2a.workload import make_inputs

_HIDDEN, _TOP_K, _MOST_TOKENS, _ALIGNMENT = 128, 3, 9, 8
#: Tokens of a rank, handed on to the next rank with every step.
_TOKENS = (9, 4, 0, 7, 6)
#: Inputs repeat after so many steps: an odd number, so that what buffers of two parities hold is never the same.
_CYCLE = 45


@dataclass(frozen=True)
class Workload:
    """What all ranks of a run bring and compute."""

    ranks: int
    seed: int

    @property
    def experts(self) -> int:
        return 4 * self.ranks

    @property
    def sizes(self) -> reference.Sizes:
        return reference.Sizes(self.ranks, self.experts, _MOST_TOKENS)

    def config(self) -> Config:
        return Config(self.experts, _HIDDEN, _TOP_K, _MOST_TOKENS)

    def inputs(self, number: int) -> World:
        return _world(self, number % _CYCLE)

    def expert(self, expert: Tensor | int, starts: Tensor, number: int) -> Tensor:
        """What an expert makes in this step of rows that start at these numbers, [n, H]: small whole numbers."""
        return ((starts + 7 * expert + 5 * number) % 9 - 4).to(torch.bfloat16)


def _starts(source: Tensor) -> Tensor:
    """source: [n]; returns int64 [n, H]."""
    return 31 * source.long()[:, None] + torch.arange(_HIDDEN)


@dataclass(frozen=True)
class World:
    """What all ranks bring to one step: lists by rank."""

    x: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]

    def without(self, ranks: Collection[int]) -> World:
        """The world in which these ranks brought nothing."""

        def cut(parts: list[Tensor]) -> list[Tensor]:
            return [part[:0] if rank in ranks else part for rank, part in enumerate(parts)]

        return World(cut(self.x), cut(self.ids), cut(self.weights))


@functools.cache
def _world(load: Workload, number: int) -> World:
    made = [
        make_inputs(
            load.seed,
            rank,
            number,
            _TOKENS[(rank + number) % len(_TOKENS)],
            hidden=_HIDDEN,
            experts=load.experts,
            top_k=_TOP_K,
            padding=0.1,
            holes=0.1,
        )
        for rank in range(load.ranks)
    ]
    weights = [torch.where(i.topk_ids % 2 == 0, 0.5, 1.0) for i in made]
    return World([i.x for i in made], [i.topk_ids for i in made], weights)


class WrongRows(AssertionError):
    """A step's result is not what the oracle says, or not what it says of itself."""


class Flight:
    """One step, made move by move. Its number chooses inputs and layout."""

    def __init__(self, load: Workload, a2a: AllToAll) -> None:
        self._load, self._a2a = load, a2a
        self.handle: Handle | None = None
        self.got: Dispatched | None = None
        self.not_received: frozenset[int] = frozenset()
        self.rows = 0

    @property
    def number(self) -> int:
        return self._of.step

    @property
    def roll(self) -> Roll:
        roll = self._of._step.roll
        assert roll is not None
        return roll

    @property
    def missing(self) -> frozenset[int]:
        return frozenset(self._a2a.missing(self._of))

    @property
    def _of(self) -> Handle:
        assert self.handle is not None
        return self.handle

    def send(self, number: int) -> None:
        """number: which step this will be."""
        world, rank = self._load.inputs(number), self._a2a.rank
        self.handle = self._a2a.dispatch_send(world.x[rank], world.ids[rank], world.weights[rank])
        self._expect(self.number == number, f"this was to be step {number}")
        self.world = world

    def receive(self) -> None:
        layout = LAYOUTS[self.number % len(LAYOUTS)]
        self.got = self._a2a.dispatch_recv(self._of, layout=layout, alignment=_ALIGNMENT)
        came = {arrival.rank for arrival in self._of._step.arrivals}
        # Others may be missing too: those that this rank's own rows did not reach.
        absent = self.roll.incarnations.keys() - came - self.roll.left
        self.not_received = frozenset(absent)
        self._expect(absent <= self.missing, f"missing are {sorted(self.missing)}, rows came from {sorted(came)}")
        self.world = self.world.without(set(range(self._load.ranks)) - came - {self._a2a.rank})
        self._check_rows(self.got)

    def send_back(self) -> None:
        assert self.got is not None
        self._a2a.combine_send(self._expert_output(self.got), self._of)

    def finish(self) -> None:
        out = self._a2a.combine_recv(self._of)
        load, rank, ids = self._load, self._a2a.rank, self.world.ids[self._a2a.rank]
        owner = torch.where(ids >= 0, ids // load.sizes.experts_per_rank, -1)
        served = torch.isin(owner, torch.tensor(sorted(self.roll.returned), dtype=owner.dtype))
        want = reference.moe_output(
            load.sizes,
            _starts(rank * _MOST_TOKENS + torch.arange(len(ids))),
            torch.where(served, ids, -1),
            self.world.weights[rank],
            rank,
            lambda expert, starts: load.expert(expert, starts, self.number),
            None,
            torch.bfloat16,
        )
        self._expect(torch.equal(out, want), "sums differ from the oracle")
        gone = (ids >= 0) & ~served
        assert self._a2a.elastic is not None
        lost = self._a2a.elastic.lost(self._of)
        self._expect(lost.tokens == int(gone.any(dim=1).sum()), f"{lost}, but {int(gone.sum())} choices are lost")
        self._expect(set(lost.experts) == set(ids[gone].tolist()), f"{lost} are not the experts that are lost")
        whole = self.roll.returned == self.roll.incarnations.keys() - self.roll.left
        self._expect(bool(self.missing) or whole, "nobody is missing, and sums are")
        self.rows += len(out)

    def _expect(self, true: bool, what: str) -> None:
        if not true:
            raise WrongRows(f"rank {self._a2a.rank}, {self._of._step}: {what}; {self.roll}")

    def _check_rows(self, got: Dispatched) -> None:
        sizes, world, rank = self._load.sizes, self.world, self._a2a.rank
        if isinstance(got, Masked):
            want = reference.dispatch_masked(sizes, world.x, world.ids, rank)
            self._same("counts", got.counts, want.counts)
            for expert, rows in enumerate(want.counts.tolist()):
                self._same(f"source of expert {expert}", got.source[expert, :rows], want.source[expert, :rows])
                self._same(f"rows of expert {expert}", got.x[expert, :rows], want.x[expert, :rows])
                self.rows += rows
        elif isinstance(got, Contiguous):
            flat = reference.dispatch_contiguous(sizes, world.x, world.ids, world.weights, rank)
            for field in ("source", "topk_ids", "topk_weights", "counts", "tokens_per_rank", "x"):
                self._same(field, getattr(got, field), getattr(flat, field))
            self.rows += len(got.x)
        else:
            grouped = reference.dispatch_grouped(sizes, world.x, world.ids, world.weights, rank, _ALIGNMENT)
            for field in ("expert_ids", "counts", "offsets", "topk_weights", "source"):
                self._same(field, getattr(got, field), getattr(grouped, field))
            tokens = grouped.source >= 0
            self._same("x", got.x[tokens], grouped.x[tokens])
            self.rows += int(tokens.sum())

    def _same(self, what: str, got: Tensor | None, want: Tensor | None) -> None:
        equal = got is not None and want is not None and got.dtype == want.dtype and torch.equal(got, want)
        self._expect(equal, f"{what} of the {LAYOUTS[self.number % len(LAYOUTS)]} layout differ from the oracle")

    def _expert_output(self, got: Dispatched) -> Tensor:
        """The experts' output. Rows that hold no token are NaN: combine must not read them."""
        first, number = self._a2a.rank * self._load.sizes.experts_per_rank, self.number
        y = torch.full(got.x.shape, torch.nan, dtype=torch.bfloat16)
        if isinstance(got, Masked):
            for expert, rows in enumerate(got.counts.tolist()):
                y[expert, :rows] = self._load.expert(first + expert, _starts(got.source[expert, :rows]), number)
        elif isinstance(got, Grouped):
            rows_ = got.expert_ids >= 0
            experts = first + got.expert_ids[rows_].long()[:, None]
            y[rows_] = self._load.expert(experts, _starts(got.source[rows_]), number)
        else:
            assert got.topk_weights is not None
            total = torch.zeros(got.x.shape)
            for k in range(_TOP_K):
                rows_ = got.topk_ids[:, k] >= 0
                made = self._load.expert(first + got.topk_ids[rows_, k, None], _starts(got.source[rows_]), number)
                total[rows_] += got.topk_weights[rows_, k, None] * made.float()
            y = total.to(torch.bfloat16)
        return y
