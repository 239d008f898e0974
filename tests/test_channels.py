"""Several steps at once: on one channel, on two, sent and received apart, discarded."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from ranks import Ctx, run_ranks
from steps import Case, Flight, run_step

from moe_a2a import HandleError

CASE = Case(experts=16, hidden=128, tokens=(13, 3, 0, 7, 9), padding=0.3)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_ranks_may_handle_two_channels_in_different_orders(hosts):
    """Once both are sent, every rank goes on in an order of its own: it must not deadlock, nor mix up rows."""
    run_ranks(_two_channels, 4, hosts=hosts)


def _two_channels(ctx: Ctx) -> None:
    die = random.Random(ctx.rank)
    with ctx.a2a(CASE.config(channels=("left", "right"))) as a2a:
        for round_ in range(20):
            flights = [
                Flight(a2a, CASE, round_, "left"),
                Flight(a2a, CASE.replace(seed=1, fp8="fp32"), round_, "right"),
            ]
            for flight in die.sample(flights, 2):
                flight.send()
            turns = [iter((flight.receive, flight.send_back)) for flight in flights] * 2
            die.shuffle(turns)
            for turn in turns:
                next(turn)()
            for flight in die.sample(flights, 2):
                flight.finish()


@pytest.mark.parametrize("hosts", [1, 2])
def test_one_rank_may_finish_a_channel_before_another_rank_begins_it(hosts):
    run_ranks(_opposite_orders, 4, hosts=hosts)


def _opposite_orders(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config(channels=("a", "b"))) as a2a:
        for round_ in range(10):
            flights = [Flight(a2a, CASE, round_, "a"), Flight(a2a, CASE.replace(seed=1), round_, "b")]
            for flight in flights:
                flight.send()
            if ctx.rank % 2:
                flights.reverse()
            for flight in flights:
                flight.receive()
                flight.send_back()
            for flight in reversed(flights):
                flight.finish()


@pytest.mark.parametrize("hosts", [1, 2])
def test_two_steps_of_one_channel_may_be_open(hosts):
    run_ranks(_two_steps, 4, hosts=hosts)


def _two_steps(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config()) as a2a:
        for round_ in range(6):
            first, second = Flight(a2a, CASE, 2 * round_), Flight(a2a, CASE, 2 * round_ + 1)
            first.send()
            second.send()
            order = (first, second) if round_ % 2 else (second, first)
            for flight in order:
                flight.receive()
            for flight in order:
                flight.send_back()
            for flight in order:
                flight.finish()


@pytest.mark.parametrize("hosts", [1, 2])
def test_steps_of_one_channel_may_overlap_for_ever(hosts):
    """Dispatch n + 1 is sent before step n is combined: two-batch overlap on one channel."""
    run_ranks(_overlap, 4, hosts=hosts)


def _overlap(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config()) as a2a:
        before = None
        for step in range(20):
            flight = Flight(a2a, CASE.replace(weights_at="combine"), step)
            flight.send()
            if before is not None:
                before.land()
            before = flight


def test_a_third_open_step_is_refused_and_hurts_nothing():
    run_ranks(_third_step, 4, hosts=2)


def _third_step(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config(channels=("a", "b"))) as a2a:
        flights = [Flight(a2a, CASE, n) for n in range(2)]
        for flight in flights:
            flight.send()
        for _ in range(3):
            with pytest.raises(HandleError) as caught:
                Flight(a2a, CASE, 2).send()
            for word in ("channel 'a'", "two open steps", "1, 2", "combine or discard"):
                assert word in str(caught.value)
        run_step(a2a, CASE, 9, "masked", channel="b")  # the other channel is free
        for flight in flights:
            flight.land()
        run_step(a2a, CASE, 3, "masked")


def test_a_step_is_not_overwritten_by_the_one_after_next_if_the_one_between_ends_first():
    """Steps 1 and 3 share buffers. With step 1 still open, step 3 must wait its turn, though only one step is open."""
    run_ranks(_out_of_turn, 4, hosts=2)


def _out_of_turn(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config()) as a2a:
        first, second, third = (Flight(a2a, CASE, n) for n in range(3))
        first.send()
        second.send()
        second.land()
        with pytest.raises(HandleError, match="step 1"):
            third.send()
        first.land()
        third.run()


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_discarded_step_makes_room_and_leaves_nothing_behind(hosts):
    run_ranks(_discard, 4, hosts=hosts)


def _discard(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config()) as a2a:
        for round_ in range(6):
            flight, after = Flight(a2a, CASE, round_), Flight(a2a, CASE, 100 + round_)
            flight.send()
            if round_ % 3:
                after.send()
            if (round_ + ctx.rank) % 2:  # some ranks have received it, some have not
                flight.receive()
            a2a.discard(flight.handle)
            with pytest.raises(HandleError, match="finished"):
                a2a.discard(flight.handle)
            if round_ % 3:
                after.land()
            run_step(a2a, CASE, round_, "grouped")


@pytest.mark.parametrize("hosts", [1, 2])
def test_discarding_what_other_ranks_combine_is_told_on_all_ranks(hosts):
    results = run_ranks(_mixed_discard, 4, hosts=hosts)
    assert all("must do the same" in message for message in results)


def _mixed_discard(ctx: Ctx) -> str:
    with ctx.a2a(CASE.config(), timeout_s=3.0) as a2a:
        flight = Flight(a2a, CASE, 0)
        flight.send()
        flight.receive()

        def combine() -> None:
            flight.send_back()
            flight.finish()

        with pytest.raises(HandleError) as caught:
            a2a.discard(flight.handle) if ctx.rank == 1 else combine()
        ctx.barrier("told")
        return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ handles


def test_a_handle_is_good_for_one_object_one_order_and_once():
    run_ranks(_misuse, 2, hosts=2)


def _misuse(ctx: Ctx) -> None:
    case = Case(experts=4, top_k=2, hidden=128, weights_at="combine")
    y = torch.zeros(2, 2 * case.max_tokens, case.hidden, dtype=case.dtype)
    weights = torch.zeros(case.tokens[ctx.rank], case.top_k)
    with ctx.a2a(case.config()) as a2a, ctx.a2a(case.config(channels=("other",))) as other:

        def refused(call: Any, *words: str) -> None:
            with pytest.raises(HandleError) as caught:
                call()
            for word in words:
                assert word in str(caught.value), f"{word!r} is not in {caught.value}"

        flight = Flight(a2a, case.replace(layouts=("masked",) * 3), 0)
        flight.send()
        handle = flight.handle
        assert (handle.channel, handle.step) == ("default", 1) and "step 1" in repr(handle)
        for wrong in (None, 7, handle.step, "handle"):
            refused(lambda wrong=wrong: a2a.dispatch_recv(wrong), type(wrong).__name__, "handle of a dispatch")
        refused(lambda: other.dispatch_recv(handle), "belongs to another AllToAll", "object that made it")
        refused(lambda: other.combine(y, handle, weights), "another AllToAll")
        refused(lambda: other.discard(handle), "another AllToAll")
        refused(lambda: a2a.combine(y, handle, weights), "step 1", "sent, not received", "received, not combined")
        refused(lambda: a2a.combine_send(y, handle, weights), "sent, not received")
        refused(lambda: a2a.combine_recv(handle), "sent, not received", "being combined")
        flight.receive()
        refused(lambda: a2a.dispatch_recv(handle), "received, not combined", "sent, not received")
        refused(lambda: a2a.combine_recv(handle), "received, not combined")
        flight.send_back()
        refused(lambda: a2a.combine_send(y, handle, weights), "being combined")
        refused(lambda: a2a.combine(y, handle, weights), "being combined")
        refused(lambda: a2a.discard(handle), "being combined")
        refused(lambda: a2a.dispatch_recv(handle), "being combined")
        flight.finish()
        for call in (
            lambda: a2a.dispatch_recv(handle),
            lambda: a2a.combine(y, handle, weights),
            lambda: a2a.combine_send(y, handle, weights),
            lambda: a2a.combine_recv(handle),
            lambda: a2a.discard(handle),
        ):
            refused(call, "step 1", "finished")
        run_step(a2a, case, 1, "masked")  # all of that hurt nobody
        run_step(other, case, 2, "grouped", channel="other")
    refused(lambda: a2a.dispatch_send(torch.zeros(0, 128).bfloat16(), torch.zeros(0, 2).long()), "closed", "new one")
