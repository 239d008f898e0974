"""Contiguous steps in several rounds, with virtual ranks in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# Before anything imports Triton, which decides then how it runs kernels.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
import virtual_steps
from contiguous_steps import ContiguousSteps, check_combine, check_dispatch, check_grouped, expert_outputs, rows_of
from virtual_steps import Steps, bits, make_inputs, sizes_of

from moe_a2a import Config, ConfigError, Contiguous, HandleError, InputError, Options
from moe_a2a import reference as ref
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.contiguous_state import ContiguousHandle
from moe_a2a.gpu.layout import ROOM, Layout
from moe_a2a.gpu.lockstep import Launches, alone, lockstep
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.gpu.rounds import RoundsRank
from moe_a2a.gpu.wait_times import add_wait_times
from moe_a2a.step import Phase
from moe_a2a.virtual import VirtualGroup
from moe_a2a.workload import Inputs

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton was imported to compile in this process; run without tests/gpu"
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest number: what a step hands out, it must have written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def group_of(ranks: int, window: int, *, tokens: int = 5, **options: Any) -> VirtualGroup:
    """With room for `window` tokens of each rank."""
    return virtual_steps.group_of(ranks, tokens=tokens, recv_capacity=ranks * window, **options)


def rank_of(group: VirtualGroup, rank: int) -> RoundsRank:
    found = group.contiguous[rank]
    assert isinstance(found, RoundsRank)
    return found


# ----------------------------------------------------------------------------------------------------------- good steps


@pytest.mark.parametrize(
    "ranks, window, fp8", [(2, 1, None), (2, 3, "fp32"), (3, 2, "ue8m0"), (4, 2, "pow2"), (4, 3, None)]
)
def test_steps_of_changing_size_match_the_oracle(ranks: int, window: int, fp8: ScaleFormat | None) -> None:
    """In 2 to 5 rounds, with tokens of some ranks in all of them, and of some in few or none."""
    experts = 8 if ranks != 3 else 6
    steps = ContiguousSteps(group_of(ranks, window, top_k=3, experts=experts, hidden=640 if fp8 == "ue8m0" else 128))
    full, some = [5] * ranks, [(3 * r) % 5 for r in range(ranks)]
    steps.step(full, fp8, routing="zipf", holes=0.2)
    steps.step(some, fp8, routing="k-hot", padding=0.3)
    if ranks == 2:
        steps.step([0, 1], fp8)
        steps.step([0, 0], fp8)


def test_batches_longer_than_a_block_match_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds begin within blocks of 128 tokens, and are longer than what is moved at once."""
    from moe_a2a.kernels import contiguous_layout, round_combine, round_recv, round_send

    monkeypatch.setattr(contiguous_layout, "_SCAN", 2)
    for module in (round_send, round_recv, round_combine):
        monkeypatch.setattr(module, "_TILE", 2048)
    steps = ContiguousSteps(group_of(2, 110, top_k=1, tokens=300, experts=4))
    steps.step([300, 256], padding=0.3)
    steps.step([111, 220], "fp32")


def test_rows_wider_than_a_tile_and_odd_sizes_match_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_a2a.kernels import round_combine, round_recv, round_send

    for module in (round_send, round_recv, round_combine):
        monkeypatch.setattr(module, "_TILE", 512)
        monkeypatch.setattr(module, "_PART", 128)
    monkeypatch.setattr(round_combine, "_UNIT", 4)
    steps = ContiguousSteps(group_of(3, 4, hidden=640, top_k=5, tokens=11, experts=15))
    steps.step([11, 4, 6])
    steps.step([7, 11, 3], "ue8m0")


def test_other_payload_dtypes_match_the_oracle() -> None:
    steps = ContiguousSteps(group_of(2, 2, tokens=4, dtype=torch.float32))
    steps.step([4, 2])
    steps.step([3, 4], "fp32")


def test_the_bits_are_those_of_one_round() -> None:
    found = []
    for window in (5, 2):
        steps = ContiguousSteps(group_of(2, window, top_k=4), 5)
        inputs = steps.inputs([5, 4])
        got = steps.dispatch(inputs)
        assert all(d.rounds == (1 if window == 5 else 3) for d in got)
        rows = [bits(t[: rows_of(d)]) for d in got for t in (d.x, d.topk_ids, d.topk_weights, d.source)]
        found.append([*rows, *map(bits, steps.combine(inputs, got))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_may_stay_at_home_and_y_is_read_until_the_sums_are_there() -> None:
    group = group_of(2, 2)
    steps = ContiguousSteps(group)
    steps.step([5, 3], weights=False)
    inputs = steps.inputs([5, 4])
    got = steps.dispatch(inputs)
    y, padded = steps.outputs(got)
    outs = [torch.full_like(i.x, float("nan")) for i in inputs]
    for r in range(2):
        rank_of(group, r).combine_send(padded[r], got[r].handle)
    lockstep([rank_of(group, r)._summing(got[r].handle, outs[r]) for r in range(2)])
    check_combine(group, inputs, y, outs)
    group.check()


def test_counts_on_the_host_give_the_exact_rows_and_rounds() -> None:
    """Ranks that know how many rounds there are need not be all."""
    group = group_of(2, 2, hidden=640)
    steps = ContiguousSteps(group)
    for tokens, rounds in (([5, 0], 3), ([2, 1], 1), ([0, 0], 1)):
        inputs = steps.inputs(tokens)
        got = steps.dispatch(inputs, "ue8m0", host_counts=True)
        for d in got:
            assert len(d.x) == len(d.topk_ids) == len(d.source) == rows_of(d) and d.rounds == rounds
            assert d.counts_list == [-(-n // 128) * 128 for n in d.counts.tolist()]
        steps.combine(inputs, got)
        handles = steps_sent(steps, inputs)
        got = lockstep([rank_of(group, r).receiving(handles[r], host_counts=r == 1) for r in range(2)])
        check_dispatch(group, inputs, got)
        assert [d.rounds for d in got] == [3, rounds] and len(got[0].x) == 10
        steps.combine(inputs, got)
    group.check()


def steps_sent(steps: ContiguousSteps, inputs: Sequence[Inputs]) -> Sequence[Any]:
    """The sending halves of a step."""
    steps.number += 1
    steps.poison()
    x, ids, weights = [i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]
    return steps.group.dispatch_send(x, ids, weights, layout="contiguous")


def test_rows_may_be_written_to_given_storage() -> None:
    group = group_of(2, 2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 4])
    outs = [torch.zeros(12, 128, dtype=torch.bfloat16) for _ in range(2)]
    got = steps.dispatch(inputs, out=outs)
    assert [d.x.data_ptr() for d in got] == [o.data_ptr() for o in outs] and all(len(d.x) == 10 for d in got)
    steps.combine(inputs, got)
    handles = steps_sent(steps, inputs)
    with pytest.raises(InputError, match="out has 9 rows and this step needs 10"):
        alone(rank_of(group, 0).receiving(handles[0], out=outs[0][:9]))
    got = group.contiguous_recv(handles)
    check_dispatch(group, inputs, got)
    steps.combine(inputs, got)


def test_a_routing_serves_several_dispatches() -> None:
    """Also one whose own rows were exactly as many as came."""
    group = group_of(2, 2, top_k=1)
    steps = ContiguousSteps(group)
    first = steps.inputs([5, 3], holes=0.2)
    got = steps.dispatch(first, host_counts=True)
    steps.combine(first, got)
    for seed in range(3):
        fresh = make_inputs(group.config, 100 + seed, 0, [5, 3])
        inputs = [Inputs(f.x, i.topk_ids, i.topk_weights) for f, i in zip(fresh, first, strict=True)]
        again = group.dispatch(
            [i.x for i in inputs],
            layout="contiguous",
            like=[d.handle for d in got],
            fp8="fp32" if seed == 1 else None,
            host_counts=seed == 2,
        )
        assert seed == 2 or all(len(d.x) == len(d.topk_ids) == 10 for d in again)
        check_dispatch(group, inputs, again, "fp32" if seed == 1 else None)
        steps.combine(inputs, again)
    group.check()


@pytest.mark.parametrize("fp8, host_counts", [(None, False), ("ue8m0", True)])
def test_rows_may_be_grouped_by_expert(fp8: ScaleFormat | None, host_counts: bool) -> None:
    group = group_of(3, 2, experts=6, top_k=3, hidden=640)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 0, 4], holes=0.2)
    x, ids, weights = [i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]
    handles = group.dispatch_send(x, ids, weights, layout="contiguous", fp8=fp8)
    got = group.grouped_recv(handles, alignment=4, host_counts=host_counts)
    check_grouped(group, inputs, got, fp8, 4)
    most = group.grouped[0].worst_case(4)
    assert all(len(d.x) == (int(d.offsets[-1]) if host_counts else most) and d.rounds == 3 for d in got)
    y = expert_outputs(group, [len(d.x) for d in got], 0)
    padded = [rows.masked_fill((d.expert_ids < 0)[:, None], float("nan")) for rows, d in zip(y, got, strict=True)]
    out = group.combine(padded, handles)
    for rank, have in enumerate(out):
        exact = [rows[: int(d.offsets[-1])] for rows, d in zip(y, got, strict=True)]
        want = ref.combine_grouped(sizes_of(group), exact, ids, inputs[rank].topk_weights, rank, 4)
        assert torch.equal(bits(have), bits(want))
    group.check()


def test_steps_of_all_kinds_follow_one_another_in_small_buffers() -> None:
    """Masked steps have room for as many tokens as a round has."""
    group = group_of(2, 2, channels=("one", "two"))
    masked, contiguous = Steps(group), ContiguousSteps(group)
    for tokens in ([2, 1], [0, 2]):
        masked.step(tokens)
        contiguous.step([5, 3], "fp32")
        contiguous.step([1, 4])
        masked.step(tokens, "pow2", weights=False)
    inputs = contiguous.inputs([3, 1])
    with pytest.raises(InputError, match="brings 3 tokens, and a masked step has room for 2 of each rank, because "):
        group.dispatch([i.x for i in inputs], [i.topk_ids for i in inputs])
    group.check()


def test_two_steps_of_a_channel_are_in_flight_at_once() -> None:
    group = group_of(2, 2, channels=("one", "two"))
    steps = ContiguousSteps(group)
    opened = []
    for channel in ("one", "two", "one"):
        inputs = steps.inputs([5, 1])
        opened.append((inputs, steps.dispatch(inputs, channel=channel)))
    with pytest.raises(HandleError, match="still open"):
        group.contiguous[0].dispatch_layout(inputs[0].x, inputs[0].topk_ids, channel="one")
    for inputs, got in opened:
        check_dispatch(group, inputs, got)
        steps.number += 1
        steps.combine(inputs, got)
    group.check()


def test_a_step_may_end_without_a_combine() -> None:
    group = group_of(2, 2)
    steps = ContiguousSteps(group)
    group.discard([d.handle for d in steps.dispatch(steps.inputs([3, 2]))])
    group.discard(steps_sent(steps, steps.inputs([5, 5])))
    for tokens in ([3, 3], [1, 5]):
        steps.step(tokens)


def test_steps_of_a_graph_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured here: the host only believes that it is."""
    group = group_of(2, 2)
    steps = ContiguousSteps(group)
    eager = steps.inputs([5, 3])
    opened = steps.dispatch(eager)
    inputs = steps.inputs([4, 5])
    with monkeypatch.context() as patch:
        patch.setattr(MaskedRank, "_is_capturing", lambda self: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for rank in group.ranks:
            rank._channels[0].captured.calls = 1  # so that its rows take the other block
        got = steps.dispatch(inputs, "fp32")
        steps.combine(inputs, got)
    steps.combine(eager, opened)
    group.check()


def test_the_wait_of_the_first_round_can_be_measured() -> None:
    group = group_of(2, 2, tokens=3)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([3, 2])
    handles = steps_sent(steps, inputs)
    times = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    for rank in range(2):
        add_wait_times(group.ranks[rank], handles[rank], times[rank])
    got = group.contiguous_recv(handles)
    assert all((into > 0).all() for into in times)
    first = [into.clone() for into in times]
    for rank in range(2):
        add_wait_times(group.ranks[rank], handles[rank], times[rank])
    steps.combine(inputs, got)
    assert all((into > before).all() for into, before in zip(times, first, strict=True))


# --------------------------------------------------------------------------------------------------------------- faults


def begin(group: VirtualGroup, inputs: Sequence[Inputs], ranks: Sequence[int]) -> list[ContiguousHandle]:
    """The sending halves of some ranks."""
    handles = [group.contiguous[r].dispatch_layout(inputs[r].x, inputs[r].topk_ids, None) for r in ranks]
    for r, handle in zip(ranks, handles, strict=True):
        group.contiguous[r].dispatch_rows(handle)
    return handles


def advance(launches: Sequence[Launches[Any]], yields: int) -> None:
    for _ in range(yields):
        for one in launches:
            next(one)


def check_void(group: VirtualGroup, rank: int, got: Contiguous, missing: list[int]) -> None:
    """No rows, and it is said who was missing."""
    assert rows_of(got) == 0 and int(got.counts.sum()) == 0
    assert (got.topk_ids == -1).all() and (got.source == -1).all()
    assert group.ranks[rank].missing(got.handle) == missing


def test_a_rank_that_does_not_come_voids_the_step() -> None:
    group = group_of(3, 2, experts=6, timeout_s=0.05)
    inputs = make_inputs(group.config, 3, 0, [3, 5, 2])
    handles = begin(group, inputs, [0, 1])
    got = lockstep([rank_of(group, r).receiving(handles[r]) for r in (0, 1)])
    for r in (0, 1):
        check_void(group, r, got[r], [1 - r, 2])
    outs = lockstep([rank_of(group, r).combining(got[r].x, handles[r]) for r in (0, 1)])
    assert all((out == 0).all() for out in outs)


@pytest.mark.parametrize("yields", [0, 1, 2, 3])
def test_a_rank_that_is_lost_between_rounds_voids_the_step(yields: int) -> None:
    """Rank 2 stops before it takes rows away, or before it sends more; the others wait for it once, and no longer."""
    group = group_of(3, 2, experts=6, top_k=6, timeout_s=0.05)
    ContiguousSteps(group).step([5, 5, 5])
    inputs = make_inputs(group.config, 3, 0, [5, 5, 5])
    handles = begin(group, inputs, [0, 1, 2])
    launches = [rank_of(group, r).receiving(handles[r]) for r in range(3)]
    advance(launches, yields)
    got = lockstep(launches[:2])
    for r in (0, 1):
        missing = group.ranks[r].missing(handles[r])
        assert 2 in missing
        check_void(group, r, got[r], missing)
        waited = [int(word) for word in handles[r].slot.handle[Layout.DEADLINE : Layout.VERDICT]]
        assert waited[Layout.ROUND] == waited[Layout.DRAINED] == 0  # for the next step that waits
    outs = lockstep([rank_of(group, r).combining(got[r].x, handles[r]) for r in (0, 1)])
    assert all((out == 0).all() for out in outs)
    if yields:  # what rank 2 does now concerns nobody; in the last round it may still get all rows
        late = alone(launches[2])
        assert rows_of(late) == (15 if yields == 3 else 0)
        assert group.ranks[2].missing(handles[2]) == ([] if yields == 3 else [0, 1])
        out = alone(rank_of(group, 2).combining(late.x, handles[2]))
        assert yields == 3 or (out == 0).all()
        assert group.ranks[2].missing(handles[2]) == [0, 1]
    again = begin(group, inputs, [0, 1])  # void at once
    got = lockstep([rank_of(group, r).receiving(again[r]) for r in (0, 1)])
    for r in (0, 1):
        check_void(group, r, got[r], [1 - r, 2] if yields else group.ranks[r].missing(again[r]))
        assert again[r].slot.handle[Layout.VIEW_MASK] == 0b011


@pytest.mark.parametrize("yields", [0, 1, 2, 3, 4])
def test_rows_that_do_not_come_back_are_left_out_and_named(yields: int) -> None:
    """Rank 2 stops in the middle of combine. Rows of the rounds before count, and those of the others go on."""
    group = group_of(3, 2, experts=6, top_k=6, timeout_s=0.05)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 5, 5])
    got = steps.dispatch(inputs)
    y, padded = steps.outputs(got)
    launches = [rank_of(group, r).combining(padded[r], got[r].handle) for r in range(3)]
    advance(launches, yields)
    out = lockstep(launches[:2])
    sent = (yields + 1) // 2  # rounds in which rank 2 has sent
    for r in (0, 1):
        first = sum(len(i.x) for i in inputs[:r])
        y[2][first + 2 * sent : first + 5] = 0
        assert group.ranks[r].missing(got[r].handle) == [2]
    check_combine(group, inputs, y, out, [0, 1])
    for r in (0, 1):
        assert int(group.ranks[r]._channels[0].live[Layout.OPEN + 1]) == 0


def test_a_rank_that_voids_the_step_in_the_last_round_gets_nothing_back() -> None:
    """The others have all rows, and are told at combine."""
    group = group_of(3, 3, experts=6, top_k=6, timeout_s=0.05)
    inputs = make_inputs(group.config, 3, 0, [5, 5, 5])
    handles = begin(group, inputs, [0, 1, 2])
    launches = [rank_of(group, r).receiving(handles[r]) for r in range(3)]
    advance(launches, 2)
    phase = group.layout.ROUND + 2  # of the second round
    flag = group.layout.parity_bytes + group.layout.flags + (phase * 3 + 2) * 8  # step 1, of rank 2
    group.ranks[0]._channels[0].region[flag : flag + 8] = 0
    got = lockstep(launches)
    check_void(group, 0, got[0], [2])
    check_dispatch(group, inputs, [None, *got[1:]], weights=False, ranks=[1, 2])
    y = [torch.zeros(len(d.x), 128, dtype=torch.bfloat16) for d in got]
    outs = lockstep([rank_of(group, r).combining(y[r], handles[r]) for r in range(3)])
    assert all((out == 0).all() for out in outs)
    assert [group.ranks[r].missing(handles[r]) for r in (1, 2)] == [[0], [0]]


def test_ranks_that_discard_what_another_combines_are_not_waited_for() -> None:
    from moe_a2a.gpu.discard import discard_recv, discard_send

    group = group_of(2, 2, timeout_s=1000.0)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 5])
    got = steps.dispatch(inputs)
    one = rank_of(group, 0)
    launches = one.combining(got[0].x, got[0].handle)
    next(launches)
    discard_send(group.ranks[1], got[1].handle)
    out = alone(launches)
    discard_recv(group.ranks[1], got[1].handle)
    assert out.isfinite().all()
    assert group.ranks[0].missing(got[0].handle) == [1] and group.ranks[1].missing(got[1].handle) == []


def test_a_step_that_has_ended_is_not_combined_again() -> None:
    """As by a graph that is replayed without its dispatch."""
    group = group_of(2, 2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 3])
    got = steps.dispatch(inputs)
    steps.combine(inputs, got)
    steps.step([2, 2])
    before = [rank._channels[0].region.clone() for rank in group.ranks]
    for d in got:
        d.handle.phase = Phase.RECEIVED  # type: ignore[attr-defined]
    for rank, d in zip(group.ranks, got, strict=True):
        rank._channels[0].eager.open.append(d.handle)  # type: ignore[arg-type]
    lockstep([rank_of(group, r).combining(got[r].x, got[r].handle) for r in range(2)])
    for rank, region in zip(group.ranks, before, strict=True):
        assert torch.equal(rank._channels[0].region, region)
        with pytest.raises(HandleError, match="a step was combined that had ended"):
            rank.check()


def test_what_is_out_of_turn_is_refused() -> None:
    group = group_of(2, 2)
    inputs = make_inputs(group.config, 0, 0, [5, 4])
    one = rank_of(group, 0)
    handle = one.dispatch_layout(inputs[0].x, inputs[0].topk_ids)
    with pytest.raises(HandleError, match="its rows are not sent yet"):
        one.dispatch_recv(handle)
    other = group.contiguous[1].dispatch_layout(inputs[1].x, inputs[1].topk_ids)
    for rank, each in zip(group.contiguous, (handle, other), strict=True):
        rank.dispatch_rows(each)
    with pytest.raises(HandleError, match="its rows are sent already"):
        one.dispatch_rows(handle)
    got = group.contiguous_recv([handle, other])
    with pytest.raises(InputError, match=r"y has shape \[9, 128\]; expected \[10, 128\]"):
        one.combine(got[0].x[:9], handle)
    with pytest.raises(InputError, match="out has shape"):
        one.combine(got[0].x, handle, out=torch.zeros(4, 128, dtype=torch.bfloat16))
    group.discard([handle, other])


# --------------------------------------------------------------------------------------------------------------- sizes


def test_buffers_shrink_with_the_capacity() -> None:
    config = Config(256, 7168, 8, 4096)
    whole, half, eighth = (Layout.of(config, 8, capacity=c).region_bytes for c in (None, 4 * 4096, 4096))
    assert 0.5 < half / whole < 0.501 and 0.125 < eighth / whole < 0.126
    assert Layout.of(config, 8, capacity=10**9).region_bytes == whole


def test_without_a_capacity_there_is_room_for_everything_up_to_a_limit() -> None:
    assert Layout.of(Config(256, 7168, 8, 8192), 8).ROUNDS == 1
    large = Layout.of(Config(256, 7168, 8, 32768), 8)
    assert large.ROUNDS == 2 and 0.99 * ROOM < large.region_bytes < 1.01 * ROOM


@pytest.mark.parametrize("capacity", [0, -1, 2.0, True, "all"])
def test_a_capacity_that_is_no_number_of_rows_is_refused(capacity: Any) -> None:
    with pytest.raises(ConfigError, match="recv_capacity="):
        Options(recv_capacity=capacity)


def test_a_capacity_without_a_row_for_each_rank_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="recv_capacity=3, and 4 ranks bring a token each: allowed are 4 rows or more"
    ):
        Layout.of(Config(8, 128, 2, 5), 4, capacity=3)
