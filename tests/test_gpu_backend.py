"""GPU ranks through AllToAll, without a GPU: two processes at once, kernels interpreted (see `interpreted_ranks`)."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from deep_ep_masks import masked_by_hand
from deep_ep_normal_steps import brief
from deep_ep_steps import dropped
from ranks import Ctx, RankPool, run_ranks
from steps import (
    Case,
    Flight,
    check_dispatched,
    check_masked,
    check_sum,
    combine_weights,
    dispatch_args,
    expert_output,
    run_step,
    same,
    world_of,
)

from moe_a2a import AllToAll, ConfigError, HandleError, InputError, Masked, RankLost
from moe_a2a import reference as ref
from moe_a2a.fp8 import FP8
from moe_a2a.gpu.layout import Layout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton, whose interpreter runs the kernels: install triton",
)

CASE = Case(experts=4, hidden=128, top_k=2, max_tokens=3, tokens=(3, 1), holes=0.2, layouts=("masked",))
POISON = 0x7F


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(["here"] * 2) as pool:
        yield pool


def gpu_ranks(ctx: Ctx, case: Case = CASE, **options: Any) -> AllToAll:
    """An AllToAll of all ranks of this test, with GPU ranks' backend."""
    from interpreted_ranks import become_gpu_rank

    become_gpu_rank()
    return ctx.a2a(case.config(channels=("a", "b")), **options)


def storage(a2a: AllToAll, dtype: torch.dtype) -> torch.Tensor:
    """Storage for what a dispatch returns, filled with bytes that only tokens may overwrite."""
    rows = a2a.world_size * a2a.config.max_tokens_per_rank
    out = torch.empty((a2a.local_experts, rows, a2a.config.hidden_size), dtype=dtype)
    out.view(torch.uint8).fill_(POISON)
    return out


def check_untouched(got: Masked) -> None:
    for e, n in enumerate(got.counts.tolist()):
        assert (got.x[e, n:].view(torch.uint8) == POISON).all(), f"expert {e}: a row that holds no token was written"


# ------------------------------------------------------------------------------------------------------------- steps


def _forms(ctx: Ctx) -> None:
    """Every form of rows, in whole calls and in split halves, with weights at either end, into given storage."""
    with gpu_ranks(ctx) as a2a:
        for number, fp8 in enumerate((None, "fp32", "pow2", "ue8m0")):
            for whole in (True, False):
                case = CASE.replace(
                    fp8=fp8,
                    quantised=fp8 is not None and whole,
                    weights_at="dispatch" if (number + whole) % 2 else "combine",
                    id_dtype=torch.int32 if whole else torch.int64,
                )
                _step(a2a, case, number, whole)
        a2a.check()


def _step(a2a: AllToAll, case: Case, number: int, whole: bool) -> None:
    world = world_of(case, 2, number)
    args, keywords = dispatch_args(case, world, a2a.rank)
    into = storage(a2a, FP8 if case.fp8 else case.dtype)
    if whole:
        got = a2a.dispatch(*args, out=into, **keywords)
    else:
        got = a2a.dispatch_recv(a2a.dispatch_send(*args, **keywords), out=into)
    assert got.x is into
    check_dispatched(case, world, a2a.rank, got)
    check_untouched(got)
    y, weights = expert_output(case, world, a2a.rank, got), combine_weights(case, world, a2a.rank, got)
    sums = torch.full((len(args[1]), case.hidden), torch.nan, dtype=case.dtype)
    if whole:
        assert a2a.combine(y, got.handle, weights, out=sums) is sums
    else:
        a2a.combine_send(y, got.handle, weights)
        assert a2a.combine_recv(got.handle, out=sums) is sums
    check_sum(case, world, a2a.rank, a2a.hosts, sums)
    assert a2a.missing(got.handle) == []


def test_whole_calls_and_split_halves_of_every_form_match_the_oracle(pool: RankPool) -> None:
    pool.call(_forms)


def _other_dtypes(ctx: Ctx) -> None:
    for dtype in (torch.float16, torch.float32):
        case = CASE.replace(dtype=dtype, tokens=(0, 3))
        with gpu_ranks(ctx, case) as a2a:
            for number in range(3):
                _step(a2a, case, number, number == 1)
            a2a.check()


def test_other_payload_dtypes_and_ranks_without_tokens_match_the_oracle(pool: RankPool) -> None:
    pool.call(_other_dtypes)


def _flights(ctx: Ctx) -> None:
    """Two open steps in a channel and one in the other; a third is refused, and nothing of it is sent."""
    late = CASE.replace(weights_at="combine")
    with gpu_ranks(ctx) as a2a:
        for number in (0, 10):
            one, two = Flight(a2a, CASE, number, "a"), Flight(a2a, late, number + 1, "a")
            other = Flight(a2a, CASE.replace(fp8="fp32"), number + 2, "b")
            for flight in (one, two, other):
                flight.send()
            with pytest.raises(HandleError, match="is still open"):
                Flight(a2a, CASE, 3).send()
            assert one.handle is not None and (one.handle.channel, one.handle.step) == ("a", 1 + number // 5)
            for flight in (other, one, two):
                flight.receive()
            for flight in (two, other, one):
                flight.send_back()
            for flight in (one, other, two):
                flight.finish()
        a2a.check()


def test_open_steps_of_two_channels_do_not_disturb_each_other(pool: RankPool) -> None:
    pool.call(_flights)


def _origins(ctx: Ctx) -> None:
    """Rows' origins as DeepEP's handles hold them, from whole calls and from reserved results."""
    with gpu_ranks(ctx) as a2a:
        rank, most = a2a.rank, CASE.max_tokens
        for number in range(2):
            world = world_of(CASE, 2, number)
            args, _ = dispatch_args(CASE, world, rank)
            if number == 0:
                got = a2a.dispatch(*args, by_source=True)
            else:
                handle = a2a.dispatch_send(*args)
                reserved = a2a.reserve(handle, by_source=True)
                got = a2a.dispatch_recv(handle)
                assert got is reserved
            want = ref.dispatch_masked(CASE.sizes(2), world.x, world.ids, rank)
            same("counts", got.counts, want.counts)
            assert got.ranges is not None
            for e, n in enumerate(want.counts.tolist()):
                came = want.source[e, :n]
                first = int((came < most).sum())
                assert got.ranges[e].tolist() == [first, first << 32 | n - first]
                same("source", got.source[e, :n], came % most)
            a2a.discard(got.handle)
        a2a.check()


def test_origins_by_source_say_which_rows_are_of_which_rank(pool: RankPool) -> None:
    pool.call(_origins)


def _waits(ctx: Ctx) -> None:
    """Rank 1 is late with its tokens, and rank 0 with its sums."""
    with gpu_ranks(ctx) as a2a:
        run_step(a2a, CASE, 0, "masked")
        waited = torch.zeros(2, 2, dtype=torch.int64)
        flight = Flight(a2a, CASE, 1)
        if ctx.rank == 1:
            time.sleep(0.5)
        flight.send()
        a2a.add_wait_times(flight.handle, waited[0])
        flight.receive()
        if ctx.rank == 0:
            time.sleep(0.5)
        a2a.add_wait_times(flight.handle, waited[1])
        flight.send_back()
        flight.finish()
        assert (waited[ctx.rank, 1 - ctx.rank] > 200_000_000) and (waited >= 0).all(), waited
        assert (waited[:, ctx.rank] < 200_000_000).all() and waited[1 - ctx.rank].max() < 300_000_000, waited


def test_wait_times_tell_who_was_late(pool: RankPool) -> None:
    pool.call(_waits)


# -------------------------------------------------------------------------------------------------- what goes wrong


def _discards(ctx: Ctx) -> None:
    """Steps that are sent, or received, end without a combine, between others that must not notice."""
    with gpu_ranks(ctx) as a2a:
        for number in range(4):
            flight = Flight(a2a, CASE, number)
            flight.send()
            if number % 2:
                flight.receive()
            a2a.discard(flight.handle)
            with pytest.raises(HandleError, match="finished"):
                a2a.combine(torch.zeros_like(storage(a2a, CASE.dtype)), flight.handle)
            run_step(a2a, CASE, number, "masked")
        a2a.check()
        # Rank 0 discards what rank 1 combines: that is told, and sums nothing.
        flight = Flight(a2a, CASE, 4)
        flight.send()
        flight.receive()
        if ctx.rank == 0:
            a2a.discard(flight.handle)
            a2a.check()
        else:
            out = a2a.combine(expert_output(CASE, flight.world, 1, flight.got), flight.handle)
            assert out.isfinite().all() and a2a.missing(flight.handle) == [0]
            with pytest.raises(RankLost, match="missing from a step") as caught:
                a2a.check()
            assert caught.value.ranks == (0,)
        ctx.barrier("told")


def test_steps_can_be_discarded_by_all_and_a_combine_is_told_of_it(pool: RankPool) -> None:
    pool.call(_discards)


def _bad_input(ctx: Ctx) -> None:
    with gpu_ranks(ctx) as a2a:
        world = world_of(CASE, 2, 0)
        (x, ids, weights), _ = dispatch_args(CASE, world, ctx.rank)
        y = torch.zeros_like(storage(a2a, CASE.dtype))
        for says, options in (
            ("channel='c'", {"channel": "c"}),
            ("out has shape", {"out": y[0]}),
            ("allowed: None, 'fp32'", {"fp8": "fp4"}),
        ):
            with pytest.raises(InputError, match=says):
                a2a.dispatch(x, ids, weights, **options)
        got = a2a.dispatch(x, ids)
        with pytest.raises(InputError, match="topk_weights were not given at dispatch"):
            a2a.combine(y, got.handle)
        with pytest.raises(InputError, match="y has shape"):
            a2a.combine(y[:1], got.handle, weights)
        a2a.combine(y, got.handle, weights)
        # What only the kernel can see is told by check, or by a later call of this rank.
        wrong = ids.clone()
        wrong[0, 1] = 4
        says = r"rank 1: topk_ids\[0, 1\] = 4; allowed are 0 to 3"
        for asks in (True, False):
            got = a2a.dispatch(x, wrong if ctx.rank == 1 else ids, weights)
            time.sleep(0.1)  # after which reports are copied at the end of a step
            a2a.combine(y, got.handle)
            if ctx.rank == 1:
                with pytest.raises(InputError, match=says):
                    a2a.check() if asks else a2a.dispatch(x, ids, weights)
            run_step(a2a, CASE, 1, "masked")
        a2a.check()


def test_bad_input_is_refused_or_reported_and_steps_go_on(pool: RankPool) -> None:
    pool.call(_bad_input)


def _misuse(ctx: Ctx) -> None:
    case = CASE.replace(seed=1)
    a2a = gpu_ranks(ctx)
    for number in range(2):
        run_step(a2a, case, number, "masked")
    # As a graph leaves it that is replayed beside an open step; without graphs, calls are refused before that.
    a2a._backend.rank.report[Layout.MISUSE] = Layout.STARTED_EARLY  # type: ignore[attr-defined]
    time.sleep(0.1)
    run_step(a2a, case, 2, "masked")
    with pytest.raises(HandleError, match="while the one before the last was open"):
        run_step(a2a, case, 3, "masked")
    with pytest.raises(HandleError, match="cannot be used further"):
        a2a.check()
    ctx.barrier("both were told")
    a2a.close()
    with pytest.raises(HandleError, match="is closed"):
        a2a.check()


def test_steps_that_overlapped_are_reported_by_a_later_call(pool: RankPool) -> None:
    pool.call(_misuse)


def _late(ctx: Ctx) -> None:
    """Rank 1 makes no step when rank 0 does. Both are told, and rank 0 knows which step lacks it."""
    a2a = gpu_ranks(ctx, timeout_s=2.0)
    run_step(a2a, CASE, 0, "masked")
    run_step(a2a, CASE, 1, "masked")
    flight = Flight(a2a, CASE, 2)
    if ctx.rank == 0:
        world = world_of(CASE, 2, 2)
        args, _ = dispatch_args(CASE, world, 0)
        began = time.monotonic()
        got = a2a.dispatch(*args)
        assert 1.9 < time.monotonic() - began < 6.0
        assert a2a.missing(got.handle) == [1]
        alone = ref.dispatch_masked(CASE.sizes(2), [world.x[0], world.x[1][:0]], [world.ids[0], world.ids[1][:0]], 0)
        check_masked(got, alone)
        with pytest.raises(RankLost, match="rank 0: ranks \\[1\\] were missing from a step") as caught:
            a2a.check()
        assert a2a.missing(got.handle) == [1]
        ctx.store.set("rank 1 was given up", "1")
    else:
        ctx.store.wait(["rank 1 was given up"])
        time.sleep(0.3)  # for the thread that hears of it
        with pytest.raises(RankLost, match="rank 1 is missing, as rank 0 reports") as caught:
            flight.send()
    assert caught.value.ranks == (1,)
    with pytest.raises(HandleError, match="cannot be used further"):
        flight.send()
    ctx.barrier("both were told")
    a2a.close()


@pytest.mark.alone
def test_a_rank_that_does_not_come_is_missing_and_all_are_told(pool: RankPool) -> None:
    pool.call(_late)


def _followed(ctx: Ctx, capacity: int | None) -> None:
    """Contiguous steps, and steps that follow their routing, in whole calls and in halves; one goes without combine."""
    with gpu_ranks(ctx, recv_capacity=capacity) as a2a:
        for number, fp8 in enumerate((None, "fp32", "ue8m0")):
            case = CASE.replace(fp8=fp8, layouts=("contiguous",))
            world = world_of(case, 2, number)
            args, more = dispatch_args(case, world, ctx.rank)
            forms = {name: more[name] for name in ("fp8", "scales") if more.get(name) is not None}
            got = a2a.dispatch(*args, layout="contiguous", **more)
            a2a.discard(got.handle)
            for whole in (True, False, True):
                if whole:
                    again = a2a.dispatch(args[0], layout="contiguous", like=got.handle, **forms)
                else:
                    sent = a2a.dispatch_send(args[0], layout="contiguous", like=got.handle, **forms)
                    again = a2a.dispatch_recv(sent)
                n = int(again.tokens_per_rank.sum())
                names = ("x", "topk_ids", "topk_weights", "source", "scales")
                rows = {name: None if getattr(again, name) is None else getattr(again, name)[:n] for name in names}
                came = replace(again, **rows)
                check_dispatched(case, world, ctx.rank, came)
                if number == 1:
                    a2a.discard(again.handle)
                    continue
                y = torch.full(again.x.shape, torch.nan, dtype=case.dtype)
                y[:n] = expert_output(case, world, ctx.rank, came)
                check_sum(case, world, ctx.rank, a2a.hosts, a2a.combine(y, again.handle))
        a2a.check()


@pytest.mark.parametrize("capacity", [None, 2])
def test_contiguous_steps_follow_a_routing(pool: RankPool, capacity: int | None) -> None:
    pool.call(_followed, capacity, timeout=60.0)


def _rounds(ctx: Ctx) -> None:
    """Steps in three rounds of a token a rank, of which rank 0 makes one, because it asks how many there are."""
    with gpu_ranks(ctx, recv_capacity=2) as a2a:
        for number, layout in enumerate(("contiguous", "grouped", "contiguous", "grouped")):
            case = CASE.replace(fp8="fp32" if number > 1 else None, layouts=(layout,), tokens=(3, 1 + number % 2))
            if number == 2:
                case = case.replace(tokens=(1, 1))
            world = world_of(case, 2, number)
            args, more = dispatch_args(case, world, ctx.rank)
            got = a2a.dispatch(*args, layout=layout, host_counts=True, alignment=case.alignment, **more)
            assert got.rounds == (1 if number == 2 else 3)
            check_dispatched(case, world, ctx.rank, got)
            out = a2a.combine(expert_output(case, world, ctx.rank, got), got.handle)
            check_sum(case, world, ctx.rank, a2a.hosts, out)
            counts = ctx.rank == 0
            got = a2a.dispatch(*args, layout=layout, host_counts=counts, alignment=case.alignment, **more)
            assert got.rounds == (1 if number == 2 and counts else 3)
            if ctx.rank == number % 2:
                a2a.combine(torch.zeros(got.x.shape, dtype=case.dtype), got.handle)
            else:
                a2a.combine_send(torch.zeros(got.x.shape, dtype=case.dtype), got.handle)
                a2a.combine_recv(got.handle)
            sent = a2a.dispatch_send(*args, layout=layout, **more)
            if ctx.rank == number % 2:
                sent = a2a.dispatch_recv(sent).handle
            a2a.discard(sent)
        case = CASE.replace(tokens=(1, 1))
        world = world_of(case, 2, 0)
        got = a2a.dispatch(*dispatch_args(case, world, ctx.rank)[0])
        assert got.x.shape == (2, 2, 128)  # a token a rank
        check_sum(case, world, ctx.rank, a2a.hosts, a2a.combine(expert_output(case, world, ctx.rank, got), got.handle))
        with pytest.raises(InputError, match="a masked step has room for 1 of each rank, because recv_capacity is 2"):
            a2a.dispatch(torch.zeros(2, 128, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int64))
        a2a.check()
        ctx.barrier("rounds")  # a rank that closes first is lost to the other


def test_contiguous_steps_may_go_in_rounds(pool: RankPool) -> None:
    pool.call(_rounds, timeout=120.0)


def _capacities(ctx: Ctx) -> None:
    with pytest.raises(ConfigError, match=r"recv_capacity.*rank 1"):
        gpu_ranks(ctx, recv_capacity=4 + ctx.rank)
    with pytest.raises(
        ConfigError, match="recv_capacity=1, and 2 ranks bring a token each: allowed are 2 rows or more"
    ):
        gpu_ranks(ctx, recv_capacity=1)


def test_capacities_that_differ_or_are_too_small_are_refused_by_all(pool: RankPool) -> None:
    pool.call(_capacities)


def _late_for_a_round(ctx: Ctx) -> None:
    """Rank 1 sends the first round, and receives nothing for longer than the budget."""
    a2a = gpu_ranks(ctx, timeout_s=2.0, recv_capacity=2)
    case = CASE.replace(layouts=("contiguous",), tokens=(3, 3))
    world = world_of(case, 2, 0)
    for _ in range(2):
        args, _ = dispatch_args(case, world, ctx.rank)
        got = a2a.dispatch(*args, layout="contiguous")
        a2a.combine(torch.zeros_like(got.x), got.handle)
    sent = a2a.dispatch_send(*args, layout="contiguous")
    if ctx.rank == 0:
        began = time.monotonic()
        got = a2a.dispatch_recv(sent)
        assert 1.9 < time.monotonic() - began < 6.0
        out = a2a.combine(torch.zeros_like(got.x), sent)
        assert int(got.tokens_per_rank.sum()) == 0 and (got.topk_ids == -1).all() and (out == 0).all()
        assert a2a.missing(sent) == [1] and time.monotonic() - began < 8.0
        ctx.store.set("rank 1 was given up in a round", "1")
    else:
        ctx.store.wait(["rank 1 was given up in a round"])
        time.sleep(0.3)  # for the thread that hears of it
        got = a2a.dispatch_recv(sent)
        out = a2a.combine(torch.zeros_like(got.x), sent)
        assert int(got.tokens_per_rank.sum()) == 0 and (out == 0).all() and a2a.missing(sent) == [0]
    with pytest.raises(RankLost) as caught:
        a2a.check()
    assert ctx.rank == 1 or caught.value.ranks == (1,)
    ctx.barrier("both were told of the round")
    a2a.close()


@pytest.mark.alone
def test_a_rank_that_does_not_come_to_a_round_is_missing(pool: RankPool) -> None:
    pool.call(_late_for_a_round)


def _deep_ep(ctx: Ctx, steps: Callable[[Ctx], None]) -> None:
    from interpreted_ranks import become_gpu_rank

    become_gpu_rank()
    steps(ctx)


@pytest.mark.parametrize("steps", [dropped, masked_by_hand, brief])
def test_programs_for_deepep_run_on_gpu_ranks(steps: Callable[[Ctx], None]) -> None:
    run_ranks(_deep_ep, 2, steps)


def _compiling(ctx: Ctx) -> None:
    """Rank 1 is later than the budget allows, but only at calls that neither rank has made before."""
    with gpu_ranks(ctx, timeout_s=1.0) as a2a:

        def late() -> None:
            ctx.barrier(f"together {next(turn)}")
            if ctx.rank == 1:
                time.sleep(1.5)

        turn = iter(range(9))
        one, two = Flight(a2a, CASE, 0), Flight(a2a, CASE.replace(fp8="pow2"), 1)
        world = world_of(CASE, 2, 2)
        args, _ = dispatch_args(CASE, world, ctx.rank)
        late()
        got = a2a.dispatch(*args)  # in one launch
        late()
        check_sum(CASE, world, ctx.rank, a2a.hosts, a2a.combine(expert_output(CASE, world, ctx.rank, got), got.handle))
        for flight in (one, two):  # in two launches, and with rows of another form
            late()
            flight.send()
            flight.receive()
            if flight is one:
                late()
            flight.send_back()
            flight.finish()
        a2a.check()


def test_calls_that_compile_their_kernels_have_more_time(pool: RankPool) -> None:
    pool.call(_compiling)


def _death(ctx: Ctx) -> None:
    a2a = gpu_ranks(ctx)
    run_step(a2a, CASE, 0, "masked")
    run_step(a2a, CASE, 1, "masked")
    ctx.barrier("all is well")
    if ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    (x, ids, weights), _ = dispatch_args(CASE, world_of(CASE, 2, 2), 0)
    got = a2a.dispatch(x, ids, weights)  # waits for nobody who is gone
    a2a.combine(torch.zeros_like(got.x), got.handle)
    with pytest.raises(RankLost, match="rank 1 died") as caught:
        a2a.dispatch(x, ids, weights)
    assert caught.value.ranks == (1,)
    assert time.monotonic() - began < 5.0  # far less than the budget
    a2a.close()


@pytest.mark.alone
def test_a_rank_that_dies_is_named_long_before_the_budget_ends() -> None:
    run_ranks(_death, 2, dies=[1])
