"""DeepEP's normal mode on CPU ranks, against a reference in plain loops."""

from __future__ import annotations

import pytest
from deep_ep_normal_steps import all_forms, dropped, handles, sizes, two_batches, worst
from ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_form_and_every_way_to_wait_matches_the_reference(ranks: int) -> None:
    run_ranks(all_forms, ranks)


def test_two_batches_take_turns_in_one_buffer() -> None:
    run_ranks(two_batches, 2)


def test_steps_that_are_not_combined_make_room_unless_their_handle_is_held() -> None:
    run_ranks(dropped, 2)


def test_handles_may_be_used_again_and_again() -> None:
    run_ranks(handles, 2)


def test_a_number_of_rows_may_be_named_in_place_of_counts() -> None:
    run_ranks(worst, 2)


def test_sizes_follow_from_bytes_and_may_be_several() -> None:
    run_ranks(sizes, 2)
