"""GPU ranks through AllToAll, without a GPU: two processes at once, kernels interpreted (see `interpreted_ranks`)."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
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

from moe_a2a import AllToAll, HandleError, InputError, Masked, RankLost
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


def test_a_rank_that_does_not_come_is_missing_and_all_are_told(pool: RankPool) -> None:
    pool.call(_late)


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


def test_a_rank_that_dies_is_named_long_before_the_budget_ends() -> None:
    run_ranks(_death, 2, dies=[1])
