"""CPU ranks: the layout is said when a step is sent, and steps that follow an earlier one's routing."""

from __future__ import annotations

import pytest
from ranks import Ctx, run_ranks
from steps import Case, check_contiguous, world_of

from moe_a2a import ConfigError, Contiguous, Grouped, HandleError, InputError, Masked, Options
from moe_a2a import reference as ref
from moe_a2a.workload import make_inputs

CASE = Case(experts=8, hidden=128)
KINDS = {"masked": Masked, "contiguous": Contiguous, "grouped": Grouped}


def _as_sent(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config()) as a2a:
        for step, (sent, asked) in enumerate(
            [(None, None), ("grouped", None), ("contiguous", None), ("contiguous", "masked"), (None, "contiguous")]
        ):
            world = world_of(CASE, ctx.world, step)
            x, ids, weights = world.x[ctx.rank], world.ids[ctx.rank], world.weights[ctx.rank]
            handle = a2a.dispatch_send(x, ids, weights, layout=sent)
            got = a2a.dispatch_recv(handle, layout=asked)
            assert type(got) is KINDS[asked or sent or "masked"]
            a2a.discard(handle)
        with pytest.raises(InputError, match="layout='flat'; allowed: 'masked', 'contiguous', 'grouped'"):
            a2a.dispatch_send(x, ids, weights, layout="flat")  # type: ignore[arg-type]


def test_a_step_is_received_as_it_was_sent_unless_asked_otherwise() -> None:
    run_ranks(_as_sent, 2)


def _follow(ctx: Ctx) -> None:
    with ctx.a2a(CASE.config(channels=("one", "two"))) as a2a:
        world = world_of(CASE, ctx.world, 0)
        sizes = CASE.sizes(ctx.world)
        mine = ctx.rank
        first = a2a.dispatch(world.x[mine], world.ids[mine], world.weights[mine], layout="contiguous")
        a2a.combine(first.x, first.handle)
        for step in (1, 2):
            rows = [
                make_inputs(9, r, step, len(x), hidden=CASE.hidden, experts=CASE.experts, top_k=CASE.top_k).x
                for r, x in enumerate(world.x)
            ]
            got = a2a.dispatch(rows[mine], layout="contiguous", like=first.handle, host_counts=True)
            want = ref.dispatch_contiguous(sizes, rows, world.ids, world.weights, mine)
            check_contiguous(got, want)
            assert got.counts_list == [-(-n // 128) * 128 for n in want.counts.tolist()]
            a2a.combine(got.x, got.handle)
        x = world.x[mine]
        with pytest.raises(InputError, match="leave topk_ids and topk_weights out"):
            a2a.dispatch(x, world.ids[mine], layout="contiguous", like=first.handle)
        with pytest.raises(
            InputError, match=rf"x has 1 tokens, and the step that like= names had {len(x)}; give as many"
        ):
            a2a.dispatch(x.new_zeros(1, CASE.hidden), layout="contiguous", like=first.handle)
        with pytest.raises(HandleError, match="give the handle of a step of channel 'two'"):
            a2a.dispatch(x, layout="contiguous", like=first.handle, channel="two")
        with pytest.raises(InputError, match="topk_ids is a NoneType"):
            a2a.dispatch(x, layout="contiguous")


def test_a_step_may_follow_the_routing_of_an_earlier_one() -> None:
    run_ranks(_follow, 4)


def test_the_sms_of_contiguous_steps_are_checked() -> None:
    with pytest.raises(ConfigError, match="num_sms=1; allowed is 2 or more"):
        Options(num_sms=1)
    with pytest.raises(ConfigError, match="num_sms='all' is a str; give an int"):
        Options(num_sms="all")  # type: ignore[arg-type]


def _no_sms(ctx: Ctx) -> None:
    with pytest.raises(ConfigError, match="num_sms=8 is for GPU ranks; leave it out on CPU ranks"):
        ctx.a2a(CASE.config(), num_sms=8)


def test_cpu_ranks_have_no_sms() -> None:
    run_ranks(_no_sms, 1)
