"""Views: what each change does, that it may be made twice, and that bytes give back what they were made of."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_a2a import ConfigError
from moe_a2a.errors import JoinRefused, MessageError
from moe_a2a.membership.view import (
    LIFE,
    Endpoint,
    Slot,
    State,
    View,
    join,
    leave,
    mark_failed,
    move_watcher,
    reborn,
    reserve,
)
from moe_a2a.membership.wire import MAX_VIEW_BYTES, decode_view, encode_view


def endpoint(incarnation: int, host: str = "a") -> Endpoint:
    return Endpoint("127.0.0.1:4000", incarnation, host)


def first(ranks: int = 4, max_ranks: int = 6, channels: tuple[str, ...] = ("one", "two")) -> View:
    return View.of([endpoint(100 + r, f"host-{r // 2}") for r in range(ranks)], max_ranks, channels)


def test_the_first_view_has_all_founders_from_step_0() -> None:
    view = first()
    assert (view.epoch, view.max_ranks, view.ranks, view.size) == (1, 6, (0, 1, 2, 3), 4)
    assert view.active == (True, True, True, True, False, False)
    assert view.members("two", 0) == (0, 1, 2, 3)


def test_a_failed_rank_leaves_a_hole_and_slots_keep_their_numbers() -> None:
    view = mark_failed(first(), {1: 101}, "its process is gone")
    assert (view.epoch, view.ranks, view.size) == (2, (0, 2, 3), 4)
    assert view.slots[1].state is State.FAILED and view.slots[1].note == "its process is gone"
    assert mark_failed(view, {3: 103}).size == 3


def test_an_old_incarnation_cannot_be_failed_again() -> None:
    view = mark_failed(first(), {1: 101})
    view = join(reserve(view, 1, endpoint(555)), {1: 555}, [7, 9])
    assert mark_failed(view, {1: 101}) is view
    assert mark_failed(view, {1: 555}).ranks == (0, 2, 3)


def test_a_rank_that_does_not_exist_is_no_matter() -> None:
    assert mark_failed(first(), {5: 1, 77: 4, -1: 3}).epoch == 1


def test_a_joiner_takes_part_from_the_named_steps_on() -> None:
    ready = reserve(first(), 4, endpoint(900))
    assert ready.slots[4].state is State.READY and 4 not in ready.ranks
    view = join(ready, {4: 900}, [10, 20])
    assert [view.members("one", step) for step in (9, 10)] == [(0, 1, 2, 3), (0, 1, 2, 3, 4)]
    assert 4 not in view.members("two", 19) and 4 in view.members("two", 20)


def test_a_rank_that_leaves_takes_part_until_the_named_steps() -> None:
    leaving = leave(first(), {3: 103}, [5, 6])
    assert leaving.ranks == (0, 1, 2, 3)
    assert 3 in leaving.members("one", 4) and 3 not in leaving.members("one", 5)
    gone = leave(leaving, {3: 103})
    assert gone.ranks == (0, 1, 2) and gone.slots[3].state is State.LEFT
    assert leave(gone, {3: 103}) is gone
    assert mark_failed(leaving, {3: 103}).slots[3].state is State.FAILED


def test_a_taken_slot_is_refused_with_the_reason() -> None:
    with pytest.raises(JoinRefused, match=r"slot 2 is taken by a live rank of host host-1 \(active\)"):
        reserve(first(), 2, endpoint(900))
    with pytest.raises(JoinRefused, match="slot 6 does not exist; this group has slots 0 to 5"):
        reserve(first(), 6, endpoint(900))
    failed = mark_failed(first(), {2: 102})
    with pytest.raises(JoinRefused, match="this incarnation of rank 2 is failed"):
        reserve(failed, 2, endpoint(102))
    with pytest.raises(JoinRefused, match="rank 4 is free, and not ready"):
        join(first(), {4: 900}, [0, 0])
    with pytest.raises(JoinRefused, match="all 6 slots are taken"):
        reserve(reserve(first(), 4, endpoint(900)), 5, endpoint(901)).open_slot()


def test_the_lowest_slot_that_nobody_holds_is_given_first() -> None:
    assert first().open_slot() == 4
    assert mark_failed(first(), {1: 101}).open_slot() == 1


def test_a_watcher_that_moved_changes_the_address_of_its_host_only() -> None:
    view = move_watcher(first(), "host-1", "127.0.0.1:9")
    assert view.watchers() == {"host-0": "127.0.0.1:4000", "host-1": "127.0.0.1:9"}
    assert move_watcher(view, "host-1", "127.0.0.1:9") is view


def test_wrong_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 steps for 2 channels"):
        join(reserve(first(), 4, endpoint(900)), {4: 900}, [1])
    with pytest.raises(ConfigError, match="step=-1"):
        leave(first(), {0: 100}, [-1, 0])


def test_two_slots_cannot_have_one_incarnation() -> None:
    with pytest.raises(ConfigError, match="slots 0 and 4 have one incarnation"):
        reserve(first(), 4, endpoint(100))


@st.composite
def histories(draw: st.DrawFn) -> list[View]:
    """A view and its successors, by random changes."""
    size = draw(st.integers(1, 8))
    view = View.of([endpoint(r + 1) for r in range(draw(st.integers(1, size)))], size, ("c",))
    views, fresh = [view], 1000
    for _ in range(draw(st.integers(0, 25))):
        rank = draw(st.integers(0, size - 1))
        who = {rank: view.slots[rank].incarnation}
        kind = draw(st.sampled_from(["fail", "leave", "drain", "reserve", "join"]))
        fresh += 1
        try:
            if kind == "fail":
                view = mark_failed(view, who, "x")
            elif kind == "leave":
                view = leave(view, who)
            elif kind == "drain":
                view = leave(view, who, [draw(st.integers(0, 9))])
            elif kind == "reserve":
                view = reserve(view, rank, endpoint(fresh))
            else:
                view = join(view, who, [draw(st.integers(0, 9))])
        except JoinRefused:
            continue
        views.append(view)
    return views


@settings(deadline=None)
@given(histories())
def test_whatever_happens_epochs_grow_by_one_with_every_change_and_bytes_keep_it_all(views: list[View]) -> None:
    for before, after in pairwise(views):
        assert (after is before) or (after.epoch == before.epoch + 1 and after.slots != before.slots)
    for view in views:
        assert decode_view(encode_view(view)) == view
        again = reborn(view)
        assert again.epoch > view.epoch and again.epoch % LIFE == 0 and again.slots == view.slots


@settings(deadline=None)
@given(histories(), st.data())
def test_every_change_may_be_made_twice(views: list[View], data: st.DataObject) -> None:
    view = views[-1]
    rank = data.draw(st.integers(0, view.max_ranks - 1))
    who = {rank: view.slots[rank].incarnation}
    for change in (
        lambda v: mark_failed(v, who),
        lambda v: leave(v, who),
        lambda v: leave(v, who, [3]),
        lambda v: reserve(v, rank, endpoint(5000)),
        lambda v: join(v, who, [3]),
    ):
        try:
            once = change(view)
        except JoinRefused:
            continue
        assert change(once) is once


@settings(deadline=None)
@given(histories())
def test_an_incarnation_that_is_out_never_comes_back(views: list[View]) -> None:
    out: set[int] = set()
    for view in views:
        active = {slot.incarnation for slot in view.slots if slot.takes_part}
        assert not active & out
        out |= {slot.incarnation for slot in view.slots if slot.state in (State.FAILED, State.LEFT)}


@given(st.binary(max_size=300))
def test_bytes_that_are_no_view_give_a_clear_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode_view(data)


def edited(**changes: object) -> bytes:
    value = json.loads(encode_view(first()))
    value.update(changes)
    return json.dumps(value).encode()


def slot_with(place: int, value: object) -> dict[str, object]:
    slot = ["active", "127.0.0.1:1", 5, "h", [0, 0], [], ""]
    slot[place] = value
    return {"0": slot}


@pytest.mark.parametrize(
    "data",
    [
        edited(moe_a2a_view=2),
        edited(epoch=0),
        edited(epoch=1 << 63),
        edited(epoch=True),
        edited(epoch="1"),
        edited(max_ranks=0),
        edited(max_ranks=10**9),
        edited(max_ranks=3),
        edited(channels=[]),
        edited(channels="ab"),
        edited(channels=["one", "one"]),
        edited(channels=[1, 2]),
        edited(slots=[]),
        edited(slots={"00": slot_with(0, "active")["0"]}),
        edited(slots={"9": slot_with(0, "active")["0"]}),
        edited(slots=slot_with(0, "king")),
        edited(slots=slot_with(0, "free")),
        edited(slots=slot_with(1, "")),
        edited(slots=slot_with(1, "x" * 256)),
        edited(slots=slot_with(1, "a\nb")),
        edited(slots=slot_with(2, 0)),
        edited(slots=slot_with(2, 1.5)),
        edited(slots=slot_with(4, [0])),
        edited(slots=slot_with(4, "00")),
        edited(slots=slot_with(4, [0, -1])),
        edited(slots=slot_with(6, "x" * 256)),
        edited(slots=slot_with(6, 5)),
        edited(slots={"0": ["active"]}),
        b'{"moe_a2a_view": 1, "epoch": NaN}',
        b"[" * 100_000,
        b" " * (MAX_VIEW_BYTES + 1),
    ],
)
def test_a_view_that_cannot_be_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode_view(data)


def test_the_largest_group_fits() -> None:
    slots = tuple(Slot(State.ACTIVE, Endpoint("x" * 255, r + 1, "h" * 255), (0,)) for r in range(1024))
    view = View(1, ("c",), slots)
    assert decode_view(encode_view(view)) == view
    noted = tuple(replace(slot, note="n" * 255) for slot in slots)
    assert len(encode_view(replace(view, slots=noted))) <= MAX_VIEW_BYTES


def test_pickles_are_not_read() -> None:
    import pickle

    with pytest.raises(MessageError, match="not JSON"):
        decode_view(pickle.dumps(first()))
