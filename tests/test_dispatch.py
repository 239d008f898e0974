"""Dispatch against the oracle: every layout, dtype and FP8 form, on one host and on several; rows nobody may touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ctx, host_labels, run_ranks
from steps import (
    DTYPES,
    POISON,
    TOPOLOGIES,
    Case,
    check_dispatched,
    dispatch_args,
    expert_output,
    payloads,
    run_case,
    run_cases,
    run_step,
    world_of,
)

from moe_a2a import AllToAll, Masked
from moe_a2a import reference as ref


@pytest.mark.parametrize("labels", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_every_payload_arrives_and_sums_up_as_the_oracle_says(labels):
    cases = list(payloads(len(labels)))
    assert run_ranks(run_cases, len(labels), cases, hosts=labels) == [12] * len(labels)


def test_eight_ranks_on_four_hosts():
    cases = [
        Case(experts=32, top_k=8, hidden=128, exact=False),
        Case(experts=8, top_k=3, dtype=torch.float32, fp8="ue8m0", weights_at="combine", tokens=(5, 13, 1)),
    ]
    run_ranks(run_cases, 8, cases, hosts=4)


FULL = {"tokens": (13,), "padding": 0.0, "holes": 0.0}
UNUSUAL = {
    "no tokens anywhere": Case(tokens=(0,)),
    "tokens on one rank only": Case(tokens=(9, 0, 0, 0)),
    "tokens without any expert": Case(tokens=(6, 2), padding=1.0),
    "most choices are holes": Case(holes=0.9),
    "one token": Case(tokens=(1,), max_tokens=1),
    "every place taken": Case(**FULL, top_k=8, experts=8),
    "every place taken, FP8": Case(**FULL, top_k=8, experts=8, fp8="fp32", hidden=640),
    "every place taken, FP8, weights at combine": Case(**FULL, top_k=8, experts=8, fp8="pow2", weights_at="combine"),
    "top-1": Case(top_k=1, exact=False),
    "top-32 of 32": Case(top_k=32, experts=32, exact=False, dtype=torch.float32),
    "top-32 of 36": Case(top_k=32, experts=36, exact=False, dtype=torch.float32),
    "1024 experts": Case(experts=1024, top_k=8, max_tokens=5, tokens=(5, 2), exact=False),
    "one expert a rank": Case(experts=4, top_k=2),
    "all to the hottest": Case(routing="k-hot", tokens=(13, 13, 12), max_tokens=17, exact=False),
    "zipf": Case(routing="zipf", experts=64, top_k=8, max_tokens=33, tokens=(33, 20, 0, 8), exact=False),
    "H = 128": Case(hidden=128, fp8="ue8m0"),
    "H = 7168": Case(hidden=7168, experts=8, fp8="ue8m0", tokens=(4, 2)),
    "no padding of groups": Case(alignment=1),
    "groups padded to 128": Case(alignment=128),
}


@pytest.mark.parametrize("hosts", [1, 2])
def test_unusual_sizes_arrive_and_sum_up_as_the_oracle_says(hosts):
    run_ranks(_named_cases, 4, UNUSUAL, hosts=hosts)


def _named_cases(ctx: Ctx, cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        try:
            run_case(ctx, case)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(
    "labels", [["a"] * 4, ["a", "a", "b", "b"], ["a", "b", "a"]], ids=["1 host", "2 hosts", "a b a"]
)
def test_a_hundred_steps_with_changing_numbers_of_tokens_leave_nothing_stale(labels):
    """More tokens, fewer tokens, other experts, other layouts, on the same buffers: older rows must not show."""
    run_ranks(_many_steps, len(labels), hosts=labels)


def _many_steps(ctx: Ctx) -> None:
    case = Case(experts=12, hidden=128, max_tokens=11, tokens=(11, 0, 5, 1, 8), padding=0.3, seed=5)
    with ctx.a2a(case.config()) as a2a:
        for step in range(100):
            one = case.replace(
                fp8=(None, "fp32", "ue8m0")[step // 7 % 3], weights_at=("dispatch", "combine")[step // 5 % 2]
            )
            run_step(a2a, one, step, case.layouts[step % 3])


def test_ranks_may_choose_different_layouts():
    run_ranks(_mixed_layouts, 4, hosts=2)


def _mixed_layouts(ctx: Ctx) -> None:
    case = Case(experts=8, hidden=128)
    with ctx.a2a(case.config()) as a2a:
        for step in range(6):
            run_step(a2a, case, step, case.layouts[(step + ctx.rank) % 3])


# ------------------------------------------------------------------------------------------------------------ storage


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    raw(out).fill_(POISON)
    return out


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("hosts", [1, 2])
def test_rows_that_hold_no_token_are_never_touched(hosts):
    run_ranks(_poison, 4, hosts=hosts)


def _poison(ctx: Ctx) -> None:
    step = 0
    for dtype in DTYPES:
        for fp8 in (None, "ue8m0"):
            case = Case(experts=8, hidden=128, dtype=dtype, fp8=fp8, alignment=16, seed=3)
            left: dict[int, int] = {}  # address of the object's storage -> rows that were poisoned after use
            checked = 0
            with ctx.a2a(case.config()) as a2a:
                for round_ in range(7):
                    for layout in case.layouts:
                        out = _out(ctx, case, layout) if round_ == 0 else None
                        checked += _poisoned_step(a2a, case, step, layout, out, left)
                        step += 1
            assert checked > 0, "no storage was used again"


def _out(ctx: Ctx, case: Case, layout: str) -> torch.Tensor:
    block = ctx.world * case.max_tokens
    shape = (2, block) if layout == "masked" else (2 * block + 40,)
    return poisoned(*shape, case.hidden, dtype=case.dtype if case.fp8 is None else torch.float8_e4m3fn)


def _poisoned_step(
    a2a: AllToAll, case: Case, step: int, layout: Any, out: torch.Tensor | None, left: dict[int, int]
) -> int:
    """One step whose output goes to poisoned storage. Returns how many rows without tokens were looked at."""
    world = world_of(case, a2a.world_size, step)
    args, keywords = dispatch_args(case, world, a2a.rank)
    got = a2a.dispatch(*args, layout=layout, alignment=case.alignment, out=out, **keywords)
    check_dispatched(case, world, a2a.rank, got)
    rows = got.x.view(-1, case.hidden)
    if isinstance(got, Masked):
        free = (torch.arange(got.x.shape[1]) >= got.counts[:, None]).flatten()
    else:
        free = got.source < 0
    if out is not None:
        assert got.x.data_ptr() == out.data_ptr() or not len(got.x), "x is not in the storage that was given"
        rows = out.view(-1, case.hidden)
        free = torch.cat([free, torch.ones(len(rows) - len(free), dtype=torch.bool)])
        known = len(rows)
    else:
        known = min(left.get(got.x.data_ptr(), 0), len(rows))
    written = (raw(rows)[:known][free[:known]] != POISON).any(dim=1)
    assert not written.any(), f"{layout}: rows that hold no token were written"
    a2a.combine(expert_output(case, world, a2a.rank, got), got.handle)
    raw(rows).fill_(POISON)
    if out is None:
        left[got.x.data_ptr()] = len(rows)
    return len(written) if out is None else 0


def test_results_stay_valid_until_the_channels_next_dispatch_but_one():
    run_ranks(_validity, 2, hosts=1)


def _validity(ctx: Ctx) -> None:
    case = Case(experts=4, top_k=2, hidden=128, fp8="ue8m0")
    with ctx.a2a(case.config()) as a2a:
        for step, layout in enumerate(case.layouts * 2):
            worlds = [world_of(case, ctx.world, step + more) for more in range(2)]
            got = []
            for world in worlds:
                args, keywords = dispatch_args(case, world, ctx.rank)
                got.append(a2a.dispatch(*args, layout=layout, alignment=case.alignment, **keywords))
                y = expert_output(case, world, ctx.rank, got[-1])
                a2a.combine(y, got[-1].handle)
            for world, result in zip(worlds, got, strict=True):
                check_dispatched(case, world, ctx.rank, result)


def test_arguments_may_be_reused_as_soon_as_they_are_sent():
    run_ranks(_reuse, 4, hosts=2)


def _reuse(ctx: Ctx) -> None:
    case = Case(experts=8, hidden=128, weights_at="dispatch", fp8="fp32", quantised=True)
    with ctx.a2a(case.config()) as a2a:
        for step, layout in enumerate(case.layouts * 3):
            world, mine = world_of(case, ctx.world, step), world_of(case, ctx.world, step)
            (x, ids, weights), keywords = dispatch_args(case, mine, ctx.rank)
            handle = a2a.dispatch_send(x, ids, weights, **keywords)
            raw(x).fill_(POISON)
            ids.fill_(-1)
            weights.fill_(torch.nan)
            keywords["scales"].fill_(torch.nan)
            got = a2a.dispatch_recv(handle, layout=layout, alignment=case.alignment)
            check_dispatched(case, world, ctx.rank, got)
            y = expert_output(case, world, ctx.rank, got)
            a2a.combine_send(y, handle)
            y.fill_(torch.nan)
            out = a2a.combine_recv(handle)
            assert not out.isnan().any()


def test_gradients_are_not_recorded_and_do_not_get_in_the_way():
    run_ranks(_gradients, 2)


def _gradients(ctx: Ctx) -> None:
    case = Case(experts=4, top_k=2, hidden=128, dtype=torch.float32)
    with ctx.a2a(case.config()) as a2a:
        for layout in case.layouts:
            world = world_of(case, ctx.world, 0)
            (x, ids, weights), _ = dispatch_args(case, world, ctx.rank)
            got = a2a.dispatch(
                x.requires_grad_(), ids, weights.requires_grad_(), layout=layout, alignment=case.alignment
            )
            y = expert_output(case, world, ctx.rank, got).requires_grad_()
            assert not got.x.requires_grad and not a2a.combine(y, got.handle).requires_grad


# ------------------------------------------------------------------------------------------------------------ the wire


@pytest.mark.parametrize("labels", [host_labels(4, 2), ["a", "a", "b"]], ids=["2 x 2", "2 + 1"])
def test_a_token_crosses_once_to_each_host_and_its_sum_once_back(labels):
    """Bytes on the wire are at most 5 % above the rows of that minimum, one way and the other."""
    results = run_ranks(_wire, len(labels), hosts=labels)
    written, minimum = sum(w for w, _ in results), results[0][1]
    assert minimum <= written <= 1.05 * minimum


def _wire(ctx: Ctx) -> tuple[int, int]:
    case = Case(experts=48, top_k=8, hidden=4096, max_tokens=64, tokens=(64, 40, 17, 64), padding=0.2, exact=False)
    world = world_of(case, ctx.world, 0)
    with ctx.a2a(case.config()) as a2a:
        args, keywords = dispatch_args(case, world, ctx.rank)
        got = a2a.dispatch(*args, layout="contiguous", **keywords)
        a2a.combine(expert_output(case, world, ctx.rank, got), got.handle)
        written = got.handle.wire_bytes
        rows = 0
        for here in a2a.hosts:
            for source in set(range(ctx.world)) - set(here):
                goes = [(ref.local_ids(case.sizes(ctx.world), world.ids[source], r) >= 0).any(dim=1) for r in here]
                rows += int(torch.stack(goes).any(dim=0).sum())
        return written, 2 * rows * case.config().row_bytes


def test_ranks_of_one_host_put_nothing_on_the_wire():
    assert run_ranks(_no_wire, 2) == [0, 0]


def _no_wire(ctx: Ctx) -> int:
    case = Case(experts=4, top_k=2)
    world = world_of(case, ctx.world, 0)
    with ctx.a2a(case.config()) as a2a:
        args, keywords = dispatch_args(case, world, ctx.rank)
        got = a2a.dispatch(*args, **keywords)
        a2a.combine(expert_output(case, world, ctx.rank, got), got.handle)
        return got.handle.wire_bytes
