"""A rank of a chaos run that makes collectives of a process group of backend moe_a2a.

A step is a few collectives. The first one is always the same, because a process that joins does not know what comes
next: everybody says who it is and which step it would make next. The highest number is the step's, and says what the
other collectives are. After one that failed, everybody begins again with a first one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from moe_a2a.chaos.rank import Place, Rank, Run
from moe_a2a.chaos.steps import WrongRows
from moe_a2a.collectives.options import Options
from moe_a2a.collectives.process_group import ProcessGroupMoeA2A
from moe_a2a.collectives.work import CollectiveWork
from moe_a2a.errors import ExcludedFromView, MoeA2AError
from moe_a2a.membership.member import Member
from moe_a2a.membership.view import State

#: Small, so that larger tensors take several rounds.
_CHUNK_BYTES = 16384
_SIZES = (3, 5000)
_BLANK = -1

#: A collective that has begun: (what it is, its work, whether its result is right given who took part).
_Begun = tuple[str, CollectiveWork, Callable[[Collection[int]], bool]]


def make(pipe: Connection, run: Run, rank: int, place: Place) -> Rank:
    return _CollectiveRank(pipe, run, rank, place)


class _CollectiveRank(Rank):
    _group: ProcessGroupMoeA2A

    def __init__(self, pipe: Connection, run: Run, rank: int, place: Place) -> None:
        super().__init__(pipe, run, rank, place)
        self._last = self._count = 0
        #: rank -> (incarnation, count) as that rank last said.
        self._said: dict[int, tuple[int, int]] = {}
        self._gone: set[tuple[int, int]] = set()
        self._alone = True

    def found(self) -> None:
        self._group = self._make(self.meeting(), False)

    def join(self) -> None:
        if self._alone:
            self._group, self._alone = self._make(None, True), False
        self.rejoin()

    def rejoin(self) -> None:
        self._group.join(self.run.patience_s)

    def leave(self, steps: int) -> None:
        self._group.deactivate([self.rank])

    def close(self) -> None:
        self._group.shutdown()

    @property
    def member(self) -> Member | None:
        return self._group.member

    @property
    def next(self) -> int:
        return self._last + 1

    def make_steps(self) -> None:
        began = time.monotonic()
        self._admit()
        self._count += 1
        self._last += 1
        self.reach(self._last, 0)
        work, pieces = self._gather()
        self.reach(self._last, 1)
        if not _ends_right(work):
            self.report(self._last, work.ranks, work.failed_ranks or [self.rank], (), 0, began)
            return
        self._last = self._learn(work, pieces)
        self.reach(self._last, 2)
        begun = [self._begin(which, min(work.ranks)) for which in (self._last, self._last // 7)]
        self.reach(self._last, 3)
        ended = [(_ends_right(of), name, of, right) for name, of, right in begun]
        rows = len(work.ranks)
        for is_right, name, of, right in ended:
            if is_right:
                self._expect(right(of.ranks), f"{name} among {of.ranks} differs from what it has to be")
                rows += 1
        failed = [of for is_right, _, of, _ in ended if not is_right]
        missing = {rank for of in failed for rank in of.failed_ranks or [self.rank]}
        self.report(self._last, begun[-1][1].ranks, missing, (), rows, began)
        self.reach(self._last, 4)

    def _make(self, store: dist.Store | None, joining: bool) -> ProcessGroupMoeA2A:
        run, place = self.run, self.place
        options = Options(
            slots=run.load.ranks,
            joining=joining,
            raises=False,
            collective_timeout_s=run.timeout_s,
            p2p_timeout_s=run.timeout_s,
            reconcile_s=run.patience_s,
            store=run.store,
            group=run.group,
            host=place.host,
            host_address=place.host_address,
            control_address=place.address,
            chunk_bytes=_CHUNK_BYTES,
        )
        return ProcessGroupMoeA2A(store, self.rank, run.load.ranks, timedelta(seconds=run.patience_s), options)

    def _admit(self) -> None:
        """The lowest rank lets those in that are ready, between two steps."""
        member = self.member
        assert member is not None
        if not member.frozen:
            slots = member.view.slots
            ready = [rank for rank, slot in enumerate(slots) if slot.state is State.READY]
            if ready and self.rank == min(member.view.ranks, default=-1):
                self._group.activate(ready)

    # the first collective

    def _gather(self) -> tuple[CollectiveWork, list[torch.Tensor]]:
        member = self.member
        assert member is not None
        pieces = [torch.full((4,), _BLANK) for _ in range(self._group.slots)]
        own = torch.tensor([self.rank, member.incarnation, self._last, self._count])
        return self._group.allgather([pieces], [own]), pieces

    def _learn(self, work: CollectiveWork, pieces: list[torch.Tensor]) -> int:
        """Check what the others said of themselves; nothing may come twice, or of a process that is gone. Returns the
        step's number."""
        self._expect(self.rank in work.ranks, f"a result among {work.ranks}, which this rank is none of")
        numbers: list[int] = []
        for rank, piece in enumerate(pieces):
            who, incarnation, number, count = piece.tolist()
            if rank not in work.ranks:
                self._expect(who == _BLANK, f"rank {rank} takes no part, and there is a piece of it: {piece}")
                continue
            last, before = self._said.get(rank, (incarnation, 0))
            if last != incarnation:
                self._gone.add((rank, last))
                before = 0
            self._expect(
                who == rank and count > before and (rank, incarnation) not in self._gone,
                f"the piece of rank {rank} is {piece}, after one of incarnation {last} with count {before}",
            )
            self._said[rank] = (incarnation, count)
            numbers.append(number)
        return max(numbers)

    # the others

    def _begin(self, which: int, root: int) -> _Begun:
        """Begin one of several collectives of this step."""
        group, rank, number, slots = self._group, self.rank, self._last, self._group.slots
        size = _SIZES[number % len(_SIZES)]

        def brings(source: int, to: int = 0) -> torch.Tensor:
            return (torch.arange(size) + 31 * source + 7 * to + 5 * number + 3 * which) % 251

        def total(ranks: Collection[int], to: int = 0) -> torch.Tensor:
            return torch.stack([brings(source, to) for source in ranks]).sum(0)

        kind, out = which % 6, brings(rank)
        if kind == 0:
            return "all_reduce", group.allreduce([out]), lambda ranks: torch.equal(out, total(ranks))
        if kind == 1:
            most = dist.AllreduceOptions()
            most.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
            highest = out.float()
            return (
                "all_reduce(max)",
                group.allreduce([highest], most),
                lambda ranks: torch.equal(highest, torch.stack([brings(r) for r in ranks]).amax(0).float()),
            )
        if kind == 2:
            from_root = dist.BroadcastOptions()
            from_root.rootRank = root
            return "broadcast", group.broadcast([out], from_root), lambda ranks: torch.equal(out, brings(root))
        if kind == 3:
            work = group.reduce_scatter([out], [[brings(rank, to) for to in range(slots)]])
            return "reduce_scatter", work, lambda ranks: torch.equal(out, total(ranks, rank))
        pieces = [torch.full((size,), _BLANK) for _ in range(slots)]
        if kind == 4:
            work = group.allgather([pieces], [out])
            return "all_gather", work, lambda ranks: _equal(pieces, {r: brings(r) for r in ranks})
        work = group.alltoall(pieces, [brings(rank, to) for to in range(slots)])
        return "all_to_all", work, lambda ranks: _equal(pieces, {r: brings(r, rank) for r in ranks})

    def _expect(self, true: bool, what: str) -> None:
        if not true:
            raise WrongRows(f"rank {self.rank}, step {self._last}: {what}")


def _ends_right(work: CollectiveWork) -> bool:
    """Wait for the end. Raises ExcludedFromView. Ranks that had a failure in different collectives of a step find that
    they call different things, and fail once more."""
    try:
        return work.wait()
    except ExcludedFromView:
        raise
    except MoeA2AError:
        return False


def _equal(pieces: list[torch.Tensor], wanted: dict[int, torch.Tensor]) -> bool:
    blank = torch.full_like(pieces[0], _BLANK)
    return all(torch.equal(piece, wanted.get(rank, blank)) for rank, piece in enumerate(pieces))
