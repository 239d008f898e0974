"""Reading what a source announced, while the source may go on without this rank and use its memory again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_a2a.elastic.shared import read_arrivals
from moe_a2a.errors import MoeA2AError
from moe_a2a.step import Roll
from moe_a2a.transport.wire import Kind, Record

SOURCE, STEP = 2, 5


def read(stands: list[bool], valid: bool) -> tuple[list[int], Roll]:
    """stands: whether the record is still there, look by look. valid: whether the tables make sense."""
    looks = iter(stands)
    spot = SimpleNamespace(owner=0, stands=lambda number: next(looks))

    def arrival(step: object, source: int, record: Record, owner: int, at: int, keep: bool) -> SimpleNamespace:
        assert keep and (owner, at) == (0, 64)
        if not valid:
            raise MoeA2AError("token numbers outside")
        return SimpleNamespace(rank=source)

    roll = Roll(1, 1, {SOURCE: 7}, ((SOURCE,),), (SOURCE,), ())
    step = SimpleNamespace(number=STEP, roll=roll)
    found = {SOURCE: (Record(Kind.DISPATCH, STEP, 7, epoch=3), spot)}
    arrivals = read_arrivals(SimpleNamespace(arrival=arrival), step, found, lambda source: 64)
    return [arrival.rank for arrival in arrivals], roll


def test_what_stands_when_its_tables_have_been_copied_has_come():
    came, roll = read([True, True], valid=True)
    assert came == [SOURCE] and not roll.missing and roll.epochs == {SOURCE: 3} and list(roll.reading) == [SOURCE]


@pytest.mark.parametrize("valid", [True, False])
def test_what_was_overwritten_before_is_not_believed_and_its_source_is_missing(valid):
    came, roll = read([False, False], valid)
    assert came == [] and roll.missing == {SOURCE} and not roll.reading and not roll.epochs


def test_tables_that_make_no_sense_and_stand_are_an_error():
    with pytest.raises(MoeA2AError, match="token numbers outside"):
        read([True, True], valid=False)
