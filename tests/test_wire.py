"""Records: believed only when whole, of the right kind and step, and from the process that they should be from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_a2a.transport.wire import (
    NO_RANK,
    RECORD_BYTES,
    Kind,
    Record,
    Spot,
    Status,
    record_reader,
    withdraw,
    withdrawn,
    write_record,
)

AT = 64
RECORD = Record(Kind.DISPATCH, 7, 2**62 + 5, rows=3, tokens=9, format=17, nbytes=12345)

records = st.builds(
    Record,
    kind=st.sampled_from(Kind),
    step=st.integers(1, 2**64 - 1),
    incarnation=st.integers(0, 2**63 - 1),
    rows=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 2**32 - 1),
    format=st.integers(0, 255),
    status=st.sampled_from(Status),
    missing=st.integers(NO_RANK, 2**31 - 1),
    nbytes=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    mask=st.integers(0, 2**64 - 1),
)


def mailbox(content: bytes = b"") -> bytearray:
    memory = bytearray(3 * RECORD_BYTES)
    memory[AT : AT + len(content)] = content
    return memory


def read(memory: bytearray, record: Record = RECORD) -> Record | None:
    """What a rank that waits for `record` sees."""
    return record_reader(memoryview(memory), AT, record.kind, record.step, record.incarnation)()


@given(records)
def test_a_record_is_read_back_as_it_was_written(record):
    memory = mailbox()
    write_record(memoryview(memory), AT, record)
    assert read(memory, record) == record
    assert memory[:AT] == bytes(AT) and memory[AT + RECORD_BYTES :] == bytes(RECORD_BYTES)
    assert mailbox(record.pack()) == memory


def test_nothing_is_read_before_something_is_written():
    assert read(mailbox()) is None
    assert read(bytearray(b"\xff" * 3 * RECORD_BYTES)) is None


@pytest.mark.parametrize(
    "other",
    [
        Record(Kind.COMBINE, RECORD.step, RECORD.incarnation),
        Record(RECORD.kind, RECORD.step - 1, RECORD.incarnation),
        Record(RECORD.kind, RECORD.step + 1, RECORD.incarnation),
        Record(RECORD.kind, RECORD.step, RECORD.incarnation + 1),
    ],
    ids=["another kind", "an older step", "a newer step", "another process"],
)
def test_a_record_of_something_else_is_not_believed(other):
    assert read(mailbox(other.pack())) is None
    assert read(mailbox(other.pack()), other) == other


@given(st.integers(0, 8 * RECORD_BYTES - 1))
def test_a_flipped_bit_is_noticed_or_does_not_matter(bit):
    data = bytearray(RECORD.pack())
    data[bit // 8] ^= 1 << bit % 8
    assert read(mailbox(bytes(data))) in (None, RECORD)


@given(records, st.sets(st.integers(0, RECORD_BYTES // 4 - 1)))
def test_a_record_that_landed_in_part_is_not_believed(old, missing):
    """Over TCP the words of a record may come in any order; what is not there yet is the record of two steps ago."""
    new, before = RECORD.pack(), bytearray(old.pack())
    for word in set(range(RECORD_BYTES // 4)) - missing:
        before[4 * word : 4 * word + 4] = new[4 * word : 4 * word + 4]
    assert read(mailbox(bytes(before))) in (None, RECORD)


def test_the_step_is_what_is_written_last():
    """Inside a host a reader may look between any two stores: it sees the step only once all else is there."""
    seen: list[Record | None] = []

    class Spy(bytearray):
        def __setitem__(self, where, what):
            super().__setitem__(where, what)
            seen.append(read(self))

    memory = Spy(mailbox(Record(RECORD.kind, 5, RECORD.incarnation, rows=99).pack()))
    write_record(memory, AT, RECORD)  # type: ignore[arg-type]
    assert len(seen) > 1 and seen[:-1] == [None] * (len(seen) - 1) and seen[-1] == RECORD


@pytest.mark.parametrize("later", [1, 2])
@pytest.mark.parametrize("far", [False, True], ids=["by its owner", "from another host"])
def test_a_record_that_is_withdrawn_no_longer_stands_and_its_reader_is_late(later, far):
    memory = mailbox()
    spot, step = Spot(memoryview(memory), AT, RECORD.kind, RECORD.incarnation), RECORD.step
    assert spot.poll(step) is None and not spot.stands(step) and not spot.passed(step)
    write_record(memoryview(memory), AT, RECORD)
    assert spot.poll(step) == RECORD and spot.stands(step) and not spot.passed(step)
    if far:
        memory[AT : AT + RECORD_BYTES] = withdrawn(RECORD.step + later)
    else:
        withdraw(memoryview(memory), AT, RECORD.step + later)
    assert spot.poll(step) is None and not spot.stands(step) and spot.passed(step)


def test_who_waits_for_the_next_record_is_not_late_while_its_place_is_made_free():
    memory = mailbox(RECORD.pack())
    spot, step = Spot(memoryview(memory), AT, RECORD.kind, RECORD.incarnation), RECORD.step + 2
    withdraw(memoryview(memory), AT, step)
    assert spot.poll(step) is None and not spot.stands(step) and not spot.passed(step)
