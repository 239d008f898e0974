"""A rank dies with what another host had sent it: who sent it goes on as soon as it is clear that nobody will answer,
and nobody else is left out."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from elastic_steps import CASE, Made, Where, elastic_a2a, new_group, serve
from ranks import Ctx, run_ranks
from steps import Case

from moe_a2a import AllToAll, ExcludedFromView
from moe_a2a.transport.wire import Kind, Record

TIMEOUT_S = 10.0
STEP, SOURCE, VICTIM, MATE = 9, 0, 2, 3
LATE = CASE.replace(weights_at="combine", layouts=("masked", "grouped"))


def _fail_to_tell(a2a: AllToAll, kind: Kind, delivered: bool, ready: Path) -> None:
    """Writes of this kind to the victim in one step fail, but only when the next rank has gone on to the step after.
    delivered: they do arrive."""
    delivery = a2a._backend._group.rail._delivery
    original = delivery.transfer

    def transfer(step: Any, peer: int, record: Record, *where: Any) -> Generator[None, None, bool]:
        if (step.number, peer, record.kind) != (STEP, VICTIM, kind):
            return (yield from original(step, peer, record, *where))
        if delivered:
            assert (yield from original(step, peer, record, *where))
        while not (ready.exists() and delivery._lookout.lost(step.roll, peer)):
            yield
        return False

    delivery.transfer = transfer


def _lose(ctx: Ctx, where: Where, case: Case, kind: Kind, delivered: bool, ready: str) -> list[Made]:
    with elastic_a2a(ctx, where, ctx.world, timeout_s=TIMEOUT_S, case=case) as a2a:
        others = [rank for rank in range(ctx.world) if rank != VICTIM]
        if ctx.rank == SOURCE:
            _fail_to_tell(a2a, kind, delivered, Path(ready))

        def before(number: int, move: str) -> None:
            if ctx.rank == VICTIM and (number, move) == (STEP, "send_back"):
                os.kill(os.getpid(), signal.SIGKILL)
            if ctx.rank == MATE and (number, move) == (STEP + delivered, "receive"):
                Path(ready).touch()

        return serve(ctx, a2a, lambda step: step.members == others and not step.missing, before, case)


@pytest.mark.parametrize(
    "case, kind, delivered",
    [
        pytest.param(CASE, Kind.DISPATCH, True, id="rows that had arrived are sent to the next rank"),
        pytest.param(LATE, Kind.WEIGHTS, False, id="weights are not sent to the next rank"),
    ],
)
def test_nobody_waits_for_what_nobody_will_send(tmp_path, case, kind, delivered):
    given = (new_group(), case, kind, delivered, str(tmp_path / "ready"))
    results = run_ranks(_lose, 4, *given, hosts=2, dies=[VICTIM])
    others = [rank for rank in range(4) if rank != VICTIM]
    for rank in others:
        assert results[rank][-1].members == others
        assert {len(step.members) for step in results[rank]} == {4, 3}, "somebody else was excluded"
        assert max(step.seconds for step in results[rank]) < 0.5 * TIMEOUT_S
        assert VICTIM in results[rank][STEP - 1].missing


def _no_way_back(ctx: Ctx, where: Where) -> list[Made]:
    with elastic_a2a(ctx, where, ctx.world, timeout_s=TIMEOUT_S) as a2a:
        others = [rank for rank in range(ctx.world) if rank != VICTIM]

        def before(number: int, move: str) -> None:
            if ctx.rank == SOURCE and (number, move) == (STEP, "send_back"):
                group = a2a._backend._group
                del group.rail._delivery._peers[VICTIM]
                group.lookout.accuse(group.lookout.roll(0, STEP), VICTIM, "there was no way to it")

        if ctx.rank == VICTIM:
            with pytest.raises(ExcludedFromView, match="there was no way to it"):
                serve(ctx, a2a, lambda step: False, before)
            return []
        return serve(ctx, a2a, lambda step: step.members == others and not step.missing, before)


def test_rows_of_a_rank_to_which_there_is_no_way_back_break_nothing():
    results = run_ranks(_no_way_back, 4, new_group(), hosts=2)
    for rank in (SOURCE, 1, MATE):
        assert results[rank][-1].members == [SOURCE, 1, MATE]
        assert max(step.seconds for step in results[rank]) < 0.5 * TIMEOUT_S
