"""The kernels of the contiguous path, with virtual ranks in Triton's interpreter."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

# Before anything imports Triton, which decides then how it runs kernels.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
import virtual_steps
from contiguous_steps import (
    ContiguousSteps,
    check_combine,
    check_dispatch,
    check_grouped,
    check_rows,
    expert_outputs,
    rows_of,
)
from virtual_steps import Steps, bits, make_inputs, sizes_of, without

from moe_a2a import Contiguous, HandleError, InputError, RankLost
from moe_a2a import reference as ref
from moe_a2a.fp8 import ScaleFormat, pack_ue8m0, quantize
from moe_a2a.gpu.contiguous_state import ContiguousHandle
from moe_a2a.gpu.discard import discard_recv, discard_send
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.gpu.wait_times import add_wait_times
from moe_a2a.step import Phase
from moe_a2a.virtual import VirtualGroup
from moe_a2a.workload import Inputs

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton was imported to compile in this process; run without tests/gpu"
)


def group_of(ranks: int, *, tokens: int = 5, **options: Any) -> VirtualGroup:
    return virtual_steps.group_of(ranks, tokens=tokens, **options)


@pytest.mark.parametrize("ranks, fp8", [(1, None), (2, None), (2, "fp32"), (4, None), (4, "ue8m0"), (8, "pow2")])
def test_steps_of_changing_size_match_the_oracle(ranks: int, fp8: ScaleFormat | None) -> None:
    steps = ContiguousSteps(group_of(ranks))
    full, some, few = [5] * ranks, [r % 4 for r in range(ranks)], [0] * (ranks - 1) + [1]
    for tokens in (full, some, few) if ranks < 8 else (full, few):
        steps.step(tokens, fp8, holes=0.2)


@pytest.mark.parametrize("fp8", [None, "fp32", "ue8m0"])
def test_rows_wider_than_a_tile_and_odd_sizes_match_the_oracle(
    fp8: ScaleFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles to a row, no power of two anywhere, more work items than programs."""
    from moe_a2a.kernels import contiguous_combine, contiguous_send

    monkeypatch.setattr(contiguous_send, "_TILE", 512)
    monkeypatch.setattr(contiguous_combine, "_TILE", 512)
    monkeypatch.setattr(contiguous_combine, "_UNIT", 4)
    steps = ContiguousSteps(group_of(3, hidden=1408, top_k=5, tokens=19, experts=39))
    steps.step([19, 7, 13], fp8)


def test_batches_longer_than_a_block_match_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 tokens are counted apart and added up so many at a time (64; 2 here, to be done sooner)."""
    from moe_a2a.kernels import contiguous_layout

    monkeypatch.setattr(contiguous_layout, "_SCAN", 2)
    steps = ContiguousSteps(group_of(2, top_k=1, tokens=700, experts=4))
    steps.step([700, 256], padding=0.3)
    steps.step([128, 129])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_payload_dtypes_match_the_oracle(dtype: torch.dtype) -> None:
    steps = ContiguousSteps(group_of(2, hidden=256, dtype=dtype))
    steps.step([5, 2])
    steps.step([3, 2], "fp32")


def test_hot_experts_and_tokens_without_experts_match_the_oracle() -> None:
    steps = ContiguousSteps(group_of(2, top_k=3, tokens=6, experts=6))
    steps.step([6, 5], routing="zipf", padding=0.3)
    steps.step([4, 6], routing="k-hot", padding=1.0)
    steps.step([0, 0])


def test_weights_may_stay_at_home() -> None:
    steps = ContiguousSteps(group_of(2))
    steps.step([5, 3], weights=False)
    steps.step([5, 3])


def test_int32_ids_and_rows_that_are_fp8_already() -> None:
    group = group_of(2, hidden=640)
    inputs = make_inputs(group.config, 0, 0, [5, 4])
    quantised = [quantize(i.x, power_of_two=True) for i in inputs]
    steps = ContiguousSteps(group)
    for fp8 in ("fp32", "ue8m0"):
        steps.poison()
        got = group.dispatch(
            [q for q, _ in quantised],
            [i.topk_ids.int() for i in inputs],
            [i.topk_weights for i in inputs],
            layout="contiguous",
            scales=[s for _, s in quantised],
            fp8=fp8,
        )
        scales = [pack_ue8m0(s) if fp8 == "ue8m0" else s for _, s in quantised]
        check_rows(group, inputs, [q for q, _ in quantised], scales, got)
        steps.combine(inputs, got)


def test_counts_come_to_the_host_if_asked_for() -> None:
    group = group_of(3, experts=6, hidden=256)
    steps = ContiguousSteps(group)
    for fp8 in (None, "ue8m0"):
        inputs = steps.inputs([5, 0, 3])
        got = steps.dispatch(inputs, fp8, host_counts=True)
        for d in got:
            assert len(d.x) == len(d.topk_ids) == len(d.source) == rows_of(d)
            assert d.counts_list == [-(-n // 128) * 128 for n in d.counts.tolist()]
        steps.combine(inputs, got)
    got = steps.dispatch(steps.inputs([5, 4, 4]))
    assert all(len(d.x) == 15 and d.counts_list is None for d in got)


def test_rows_may_be_copied_out() -> None:
    group = group_of(2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 4])
    outs = [torch.zeros(12, 128, dtype=torch.bfloat16) for _ in range(2)]
    got = steps.dispatch(inputs, out=outs)
    assert [d.x.data_ptr() for d in got] == [o.data_ptr() for o in outs]
    steps.combine(inputs, got)
    with pytest.raises(InputError, match="out has 9 rows and this step needs 10"):
        steps.dispatch(steps.inputs([5, 5]), out=[o[:9] for o in outs])


def test_the_halves_of_a_combine_may_be_called_apart() -> None:
    steps = ContiguousSteps(group_of(3, experts=6))
    steps.step([5, 3, 4], apart=True)
    steps.step([0, 5, 1], apart=True)


def test_the_same_inputs_give_the_same_bits() -> None:
    outputs = []
    for _ in range(2):
        group = group_of(4, top_k=4)
        steps = ContiguousSteps(group, 5)
        inputs = steps.inputs([5, 0, 2, 5])
        got = steps.dispatch(inputs)
        rows = [bits(t[: rows_of(d)]) for d in got for t in (d.x, d.topk_ids, d.topk_weights, d.source)]
        outputs.append([*rows, *map(bits, steps.combine(inputs, got))])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_masked_and_contiguous_steps_follow_one_another() -> None:
    group = group_of(2, channels=("one", "two"))
    masked, contiguous = Steps(group), ContiguousSteps(group)
    for tokens in ([5, 3], [1, 5], [4, 0]):
        masked.step(tokens)
        contiguous.step(tokens, "fp32")
        contiguous.step(tokens)


def test_two_channels_and_two_steps_of_a_channel_are_in_flight_at_once() -> None:
    group = group_of(2, channels=("one", "two"))
    steps, masked = ContiguousSteps(group), Steps(group)
    opened = []
    for channel in ("one", "two", "one"):
        inputs = steps.inputs([5, 1])
        opened.append((inputs, steps.dispatch(inputs, channel=channel)))
    other = masked.inputs([2, 2])
    also = masked.dispatch(other, channel="two")
    with pytest.raises(HandleError, match="still open"):
        group.contiguous[0].dispatch_layout(inputs[0].x, inputs[0].topk_ids, channel="one")
    for inputs, got in opened:
        check_dispatch(group, inputs, got)
        steps.number += 1
        steps.combine(inputs, got)
    masked.combine(other, [d.handle for d in also])
    group.check()


def test_a_step_may_end_without_a_combine() -> None:
    group = group_of(2)
    steps = ContiguousSteps(group)
    got = steps.dispatch(steps.inputs([3, 2]))
    group.discard([d.handle for d in got])
    inputs = steps.inputs([5, 5])
    group.discard(group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs], layout="contiguous"))
    with pytest.raises(HandleError, match="finished>; this call needs"):
        group.discard([d.handle for d in got])
    for tokens in ([3, 3], [1, 2], [0, 3]):
        steps.step(tokens)


# ------------------------------------------------------------------------------------------------------- known routing


def follow(steps: ContiguousSteps, got: Sequence[Contiguous], inputs: list[Inputs]) -> list[Contiguous]:
    """A step of new rows with the routing of an earlier one."""
    steps.number += 1
    return steps.group.dispatch(
        steps.there([i.x for i in inputs]), layout="contiguous", like=[d.handle for d in got], fp8=None
    )


def test_a_routing_serves_several_dispatches() -> None:
    group = group_of(3, experts=6)
    steps = ContiguousSteps(group)
    first = steps.inputs([5, 3, 4], holes=0.2)
    got = steps.dispatch(first)
    steps.combine(first, got)
    for seed in range(4):
        fresh = make_inputs(group.config, 100 + seed, 0, [5, 3, 4])
        inputs = [Inputs(f.x, i.topk_ids, i.topk_weights) for f, i in zip(fresh, first, strict=True)]
        again = follow(steps, got, inputs)
        check_dispatch(group, inputs, again)
        steps.combine(inputs, again)
    group.check()


def test_a_routing_that_was_overwritten_is_refused() -> None:
    group = group_of(2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 3])
    got = steps.dispatch(inputs)
    steps.combine(inputs, got)
    steps.step([2, 2])
    steps.combine(inputs, follow(steps, got, inputs))  # a later dispatch in the other block does no harm
    steps.step([3, 2])
    steps.step([1, 2])
    with pytest.raises(HandleError, match="the routing of dispatch 1 has been overwritten"):
        follow(steps, got, inputs)
    with pytest.raises(HandleError, match="give the handle of a contiguous step of channel 'default'"):
        group.contiguous[0].dispatch_layout(inputs[0].x, None, like=Steps(group).dispatch(inputs)[0].handle)


def test_what_does_not_go_with_a_known_routing_is_refused() -> None:
    group = group_of(2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 3])
    got = steps.dispatch(inputs)
    steps.combine(inputs, got)
    rank, one = group.contiguous[0], inputs[0]
    with pytest.raises(InputError, match="leave topk_ids and topk_weights out"):
        rank.dispatch_layout(one.x, one.topk_ids, like=got[0].handle)
    with pytest.raises(InputError, match="x has 4 tokens, and the step that like= names had 5"):
        rank.dispatch_layout(one.x[:4], None, like=got[0].handle)
    with pytest.raises(InputError, match="topk_ids is None"):
        rank.dispatch_layout(one.x, None)


def test_a_routing_of_an_older_view_voids_the_step() -> None:
    group = group_of(2, timeout_s=0.05)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 3])
    got = steps.dispatch(inputs)
    steps.combine(inputs, got)
    group.ranks[0].control[group.layout.MASK] = 0b01
    again = group.contiguous[0].dispatch_layout(inputs[0].x, None, like=got[0].handle)
    group.contiguous[0].dispatch_rows(again)
    assert rows_of(group.contiguous[0].dispatch_recv(again)) == 0
    assert group.ranks[0].missing(again) == [1]


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    "ids, message, instead",
    [
        ([3, 8], r"rank 1: topk_ids\[1, 1\] = 8; allowed are 0 to 7", [3, -1]),
        ([-2, 3], r"rank 1: topk_ids\[1, 0\] = -2; ", [-1, 3]),
        ([1 << 40, 3], r"topk_ids\[1, 0\] = 2147483647; ", [-1, 3]),
        ([5, 5], r"topk_ids\[1\] names expert 5 twice", [5, -1]),
    ],
)
def test_a_wrong_id_is_reported_and_spoils_nothing_else(ids: list[int], message: str, instead: list[int]) -> None:
    group = group_of(2)
    inputs = make_inputs(group.config, 0, 0, [5, 5])
    inputs[1].topk_ids[1] = torch.tensor(ids)
    got = group.dispatch(
        [i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs], layout="contiguous"
    )
    inputs[1].topk_ids[1] = torch.tensor(instead)
    check_dispatch(group, inputs, got)
    ContiguousSteps(group).combine(inputs, got)
    with pytest.raises(InputError, match=message):
        group.check()
    group.check()  # said once


def test_scales_that_cannot_be_used_are_reported() -> None:
    group = group_of(2)
    inputs = make_inputs(group.config, 0, 0, [2, 1])
    q, scales = zip(*[quantize(i.x, power_of_two=True) for i in inputs], strict=True)
    scales[0][1, 0] = 3.0
    group.dispatch(q, [i.topk_ids for i in inputs], layout="contiguous", scales=scales, fp8="ue8m0")
    with pytest.raises(InputError, match=r"rank 0: scales: token 1, columns 0 to 127 has scale 3; .* powers of two"):
        group.check()


def test_arguments_are_checked_without_reading_them() -> None:
    group = group_of(2)
    (one, two) = make_inputs(group.config, 0, 0, [5, 4])
    rank = group.contiguous[0]
    with pytest.raises(InputError, match=r"max_tokens_per_rank=5, but this call brings 6 tokens"):
        rank.dispatch_layout(torch.zeros(6, 128, dtype=torch.bfloat16), one.topk_ids)
    with pytest.raises(InputError, match=r"topk_ids has shape \[4, 2\]; expected \[5, 2\]"):
        rank.dispatch_layout(one.x, two.topk_ids)
    handles = group.dispatch_send([one.x, two.x], [one.topk_ids, two.topk_ids], layout="contiguous")
    with pytest.raises(HandleError, match="needs a step that is received"):
        rank.combine(torch.zeros(10, 128, dtype=torch.bfloat16), handles[0])
    with pytest.raises(HandleError, match="belongs to another rank"):
        rank.dispatch_recv(handles[1])
    group.contiguous_recv(handles)
    with pytest.raises(InputError, match=r"y has shape \[9, 128\]; expected \[10, 128\]"):
        rank.combine(torch.zeros(9, 128, dtype=torch.bfloat16), handles[0])
    with pytest.raises(InputError, match="y has strides"):
        rank.combine(torch.zeros(128, 10, dtype=torch.bfloat16).t(), handles[0])
    with pytest.raises(InputError, match="leave topk_weights out"):
        group.combine([torch.zeros(10, 128)] * 2, handles, [one.topk_weights, two.topk_weights])


# -------------------------------------------------------------------------------------------------------------- faults


def begin(group: VirtualGroup, inputs: Sequence[Inputs], rank: int) -> ContiguousHandle:
    i = inputs[rank]
    return group.contiguous[rank].dispatch_layout(i.x, i.topk_ids, i.topk_weights)


def check_void(group: VirtualGroup, handle: ContiguousHandle, got: Contiguous, missing: list[int]) -> None:
    """No rows, and it is said who was missing."""
    rank = handle._owner
    assert rows_of(got) == 0 and int(got.counts.sum()) == 0
    assert (got.topk_ids == -1).all() and (got.source == -1).all()
    assert group.ranks[rank.rank].missing(handle) == missing  # type: ignore[attr-defined]


def test_a_rank_that_does_not_come_is_named_and_no_rows_are_handed_out() -> None:
    """Nobody can know where the rows behind those of a missing rank belong."""
    group = group_of(3, experts=6, timeout_s=0.05)
    ContiguousSteps(group).step([5, 5, 5])  # leaves rows that nobody may take for those of the next step
    inputs = make_inputs(group.config, 3, 0, [3, 5, 2])
    handles = {r: begin(group, inputs, r) for r in (0, 1)}
    for r, handle in handles.items():
        group.contiguous[r].dispatch_rows(handle)
    got = {r: group.contiguous[r].dispatch_recv(handle) for r, handle in handles.items()}
    for r in handles:
        check_void(group, handles[r], got[r], [1 - r, 2])  # for want of rank 2, the other sent nothing
        out = group.contiguous[r].combine(got[r].x, handles[r])
        assert (out == 0).all()
        with pytest.raises(RankLost, match="were missing from a step"):
            group.ranks[r].check()


def test_a_rank_that_came_too_late_for_one_peer_spoils_no_rows() -> None:
    """Rank 0 gave up on rank 2 and cannot place its rows, so that nobody gets rank 0's."""
    group = group_of(3, experts=6, timeout_s=0.05)
    ContiguousSteps(group).step([5, 5, 5])
    inputs = make_inputs(group.config, 3, 0, [3, 5, 2])
    handles = [begin(group, inputs, r) for r in (0, 1)]
    group.contiguous[0].dispatch_rows(handles[0])
    handles.append(begin(group, inputs, 2))
    for r in (1, 2):
        group.contiguous[r].dispatch_rows(handles[r])
    got = [group.contiguous[r].dispatch_recv(handles[r]) for r in range(3)]
    for r, missing in enumerate(([2], [0], [0])):
        check_void(group, handles[r], got[r], missing)
    y = expert_outputs(group, [len(d.x) for d in got], 0)
    for r in range(3):
        group.contiguous[r].combine_apart(y[r], handles[r])
    out = [group.contiguous[r].combine_sums(y[r], handles[r]) for r in range(3)]
    assert all((o == 0).all() for o in out)
    assert [group.ranks[r].missing(handles[r]) for r in range(3)] == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("damage", ["one row too few", "more rows than tokens"])
def test_ranks_that_were_told_different_counts_hand_out_nothing(damage: str) -> None:
    """Rank 2 computes other places than everybody else, because its copy of rank 0's counts is damaged."""
    group = group_of(3, experts=6, top_k=6, timeout_s=0.05)
    layout = group.layout
    inputs = make_inputs(group.config, 3, 0, [3, 5, 2])
    handles = [begin(group, inputs, r) for r in range(3)]
    at = layout.parity_bytes + layout.matrix  # step 1
    matrix = group.ranks[2]._channels[0].region[at : at + 4 * 3 * 4].view(torch.int32).view(3, 4)
    assert matrix[0, :3].tolist() == [3, 3, 3]
    matrix[0, 1] = 2 if damage == "one row too few" else 4
    for r in range(3):
        group.contiguous[r].dispatch_rows(handles[r])
    got = [group.contiguous[r].dispatch_recv(handles[r]) for r in range(3)]
    if damage == "one row too few":  # only rank 1's rows are concerned
        check_void(group, handles[1], got[1], [2])
        check_dispatch(group, inputs, got, ranks=[0, 2])
    else:
        for r, missing in enumerate(([2], [2], [0])):
            check_void(group, handles[r], got[r], missing)


def test_a_rank_that_makes_a_masked_step_instead_is_named() -> None:
    group = group_of(2, timeout_s=0.05)
    inputs = make_inputs(group.config, 0, 0, [3, 3])
    handle = begin(group, inputs, 0)
    other = group.ranks[1].dispatch_send(inputs[1].x, inputs[1].topk_ids, inputs[1].topk_weights)
    group.contiguous[0].dispatch_rows(handle)
    check_void(group, handle, group.contiguous[0].dispatch_recv(handle), [1])
    group.ranks[1].dispatch_recv(other)
    assert group.ranks[1].missing(other) == [0]


def test_rows_that_do_not_come_back_are_left_out_and_named() -> None:
    group = group_of(3, experts=6, timeout_s=0.05)
    steps = ContiguousSteps(group)
    steps.step([5, 5, 5])
    inputs = steps.inputs([5, 3, 4])
    got = steps.dispatch(inputs)
    y, padded = steps.outputs(got)
    for r in (0, 1):
        group.contiguous[r].combine_apart(padded[r], got[r].handle)
    out = [group.contiguous[r].combine_sums(padded[r], got[r].handle) for r in (0, 1)]
    y[2].zero_()
    check_combine(group, inputs, y, out, [0, 1])
    assert all(group.ranks[r].missing(got[r].handle) == [2] for r in (0, 1))


def test_a_membership_change_ends_a_wait_at_once() -> None:
    group = group_of(2, timeout_s=1000.0)
    inputs = make_inputs(group.config, 0, 0, [2, 2])
    handle = begin(group, inputs, 0)
    group.alive.fill_(0b01)
    began = time.monotonic()
    group.contiguous[0].dispatch_rows(handle)
    got = group.contiguous[0].dispatch_recv(handle)
    check_void(group, handle, got, [1])
    group.contiguous[0].combine(got.x, handle)
    assert time.monotonic() - began < 20


def test_a_rank_outside_the_view_gets_nothing_and_is_not_waited_for() -> None:
    group = group_of(2, timeout_s=1000.0)
    for rank in group.ranks:
        rank.control[group.layout.MASK] = 0b01
    inputs = make_inputs(group.config, 0, 0, [3, 3])
    before = group.ranks[1]._channels[0].region.clone()
    handle = begin(group, inputs, 0)
    group.contiguous[0].dispatch_rows(handle)
    got = group.contiguous[0].dispatch_recv(handle)
    gone = inputs[1]
    left = [inputs[0], Inputs(gone.x[:0], gone.topk_ids[:0], gone.topk_weights[:0])]
    check_dispatch(group, left, [got], ranks=[0])
    assert torch.equal(group.ranks[1]._channels[0].region, before)
    assert group.ranks[0].missing(handle) == []


def test_survivors_of_a_contiguous_step_go_on_with_masked_ones() -> None:
    """Who did not come is out of the view's later steps; who came and could send nothing is not. Contiguous steps need
    everybody, and are void at once."""
    group = group_of(3, experts=6, timeout_s=0.05)
    layout = group.layout
    inputs = make_inputs(group.config, 3, 0, [3, 5, 2])
    for turn in range(2):
        handles = {r: begin(group, inputs, r) for r in (0, 1)}
        if turn == 1:
            group.alive.fill_(0b111)
        for r, handle in handles.items():
            group.contiguous[r].dispatch_rows(handle)
        got = {r: group.contiguous[r].dispatch_recv(handle) for r, handle in handles.items()}
        for r, handle in handles.items():
            check_void(group, handle, got[r], [1 - r, 2])
            if turn == 1:
                words = handle.slot.handle
                assert words[layout.VIEW_MASK] == 0b011 and words[layout.DEADLINE + layout.LAYOUT] == 0
            group.contiguous[r].combine_apart(got[r].x, handle)
        for r, handle in handles.items():
            group.contiguous[r].combine_sums(got[r].x, handle)
    assert [int(group.ranks[r]._channels[0].live[layout.GIVEN_UP + 1]) for r in (0, 1)] == [0b100, 0b100]
    sent = {r: group.ranks[r].dispatch_send(inputs[r].x, inputs[r].topk_ids, inputs[r].topk_weights) for r in (0, 1)}
    masked = {r: group.ranks[r].dispatch_recv(handle) for r, handle in sent.items()}
    left = without(inputs, 2)
    for r in (0, 1):
        want = ref.dispatch_masked(sizes_of(group), [i.x for i in left], [i.topk_ids for i in left], r)
        assert torch.equal(masked[r].counts, want.counts)
    for r in (0, 1):
        discard_send(group.ranks[r], sent[r])
    for r in (0, 1):
        discard_recv(group.ranks[r], sent[r])
        assert group.ranks[r].missing(sent[r]) == [2]


def test_rows_of_an_open_step_are_not_written_over_by_one_that_thinks_itself_elsewhere() -> None:
    """Replayed graphs move the numbers of steps, by which masked ones lie, and not the host's, by which contiguous ones
    do."""
    group = group_of(2)
    steps = ContiguousSteps(group)
    for rank in group.ranks:
        rank._channels[0].live[group.layout.LIVE_STEP] = 1
    inputs = steps.inputs([5, 3])
    got = steps.dispatch(inputs)  # step 2, in block 1
    late = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs])  # step 3
    with pytest.raises(HandleError, match=r"a step was dispatched, .* while the one before the last was open"):
        group.check()
    check_dispatch(group, inputs, got)
    steps.combine(inputs, got)
    group.dispatch_recv(late)
    group.discard(late)
    group = group_of(2)
    for rank in group.ranks:
        rank._channels[0].live[group.layout.LIVE_STEP] = 1
    handles = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs])  # step 2, in block 0
    masked = group.dispatch_recv(handles, out=Steps(group).poisoned(None))
    late = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs], layout="contiguous")  # in block 0
    assert all(rows_of(d) == 0 for d in group.contiguous_recv(late))
    with pytest.raises(HandleError, match="a step was dispatched"):
        group.check()
    group.discard([d.handle for d in masked])


def test_a_step_that_has_ended_is_not_combined_again() -> None:
    """As by a graph that is replayed without its dispatch."""
    group = group_of(2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 3])
    got = steps.dispatch(inputs)
    steps.combine(inputs, got)
    steps.step([2, 2])
    before = [rank._channels[0].region.clone() for rank in group.ranks]
    for rank, d in zip(group.contiguous, got, strict=True):
        handle = rank.base._channels[0].eager
        d.handle.phase = Phase.RECEIVED  # type: ignore[attr-defined]
        handle.open.append(d.handle)  # type: ignore[arg-type]
        rank.combine_apart(d.x, d.handle)
    for rank, region in zip(group.ranks, before, strict=True):
        assert torch.equal(rank._channels[0].region, region)
        with pytest.raises(HandleError, match="a step was combined that had ended"):
            rank.check()


def test_a_routing_whose_tables_are_gone_voids_the_step() -> None:
    """What a graph may find at a replay; outside of graphs the host sees it first."""
    group = group_of(2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 3])
    got = steps.dispatch(inputs)
    steps.combine(inputs, got)
    group.ranks[0]._channels[0].live[group.layout.TABLES + 1] = 77
    steps.number += 1
    x, handles = [i.x for i in inputs], [d.handle for d in got]
    again = group.dispatch(x, layout="contiguous", like=handles)
    assert [rows_of(d) for d in again] == [0, 0]
    assert [group.ranks[r].missing(again[r].handle) for r in (0, 1)] == [[0, 1], [0]]
    with pytest.raises(HandleError, match=r"a step followed \(like=\) a routing that a later step"):
        group.ranks[0].check()
    group.discard([d.handle for d in again])
    for d in got:
        d.handle.captured = True  # type: ignore[attr-defined]
    with pytest.raises(HandleError, match="both belong into the same graph, or outside of graphs"):
        group.dispatch(x, layout="contiguous", like=handles)


def test_steps_of_a_graph_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured here: the host only believes that it is."""
    group = group_of(2, hidden=640)
    steps = ContiguousSteps(group)
    eager = steps.inputs([5, 3])
    opened = steps.dispatch(eager)  # step 1, in block 1

    def capturing(yes: bool) -> None:
        monkeypatch.setattr(MaskedRank, "_is_capturing", lambda self: yes)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: yes)

    capturing(True)
    for rank in group.ranks:
        rank._channels[0].captured.calls = 1
    inputs = make_inputs(group.config, 9, 0, [4, 5])
    x, ids, weights = [i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]
    got = group.dispatch(x, ids, weights, layout="contiguous", fp8="ue8m0")  # step 2, in block 0
    check_dispatch(group, inputs, got, "ue8m0")
    with pytest.raises(InputError, match="waits for counts, which a CUDA graph's capture cannot"):
        group.contiguous[0].counts_on_host(got[0].handle)  # type: ignore[arg-type]
    with pytest.raises(HandleError, match="this call is in a CUDA graph's capture; both belong into the same graph"):
        group.dispatch(x, layout="contiguous", like=[d.handle for d in opened])
    steps.combine(inputs, got)
    capturing(False)
    check_dispatch(group, eager, opened)
    steps.number = 1
    steps.combine(eager, opened)
    capturing(True)
    again = group.dispatch(x, layout="contiguous", like=[d.handle for d in got])
    check_dispatch(group, inputs, again)
    capturing(False)
    with pytest.raises(HandleError, match="in a CUDA graph's capture; its other calls belong into a capture too"):
        group.contiguous[0].combine(x[0], again[0].handle)
    capturing(True)
    steps.combine(inputs, again)
    capturing(False)
    steps.step([2, 5])
    group.check()


def test_waits_of_contiguous_steps_can_be_measured() -> None:
    group = group_of(2, timeout_s=0.2)
    steps = ContiguousSteps(group)
    inputs = steps.inputs([5, 3])
    x, ids = [i.x for i in inputs], [i.topk_ids for i in inputs]
    handles = group.dispatch_send(x, ids, layout="contiguous")
    times = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    for rank, handle, into in zip(group.ranks, handles, times, strict=True):
        add_wait_times(rank, handle, into)
    got = group.contiguous_recv(handles)
    assert all((into > 0).all() and (into < 200_000_000).all() for into in times)
    first = [into.clone() for into in times]
    add_wait_times(group.ranks[0], handles[0], times[0])
    group.contiguous[0].combine(got[0].x, handles[0])  # rank 1 does not combine
    assert times[0][0] > first[0][0] and times[0][1] - first[0][1] >= 200_000_000
    assert group.ranks[0].missing(handles[0]) == [1]


def test_weights_and_hidden_states_that_cannot_be_used_are_reported() -> None:
    group = group_of(2, hidden=256)
    inputs = make_inputs(group.config, 0, 0, [3, 2])
    inputs[0].topk_weights[2, 1] = torch.nan
    inputs[1].x[1, 200] = torch.inf
    group.dispatch(
        [i.x for i in inputs],
        [i.topk_ids for i in inputs],
        [i.topk_weights for i in inputs],
        layout="contiguous",
        fp8="fp32",
    )
    with pytest.raises(InputError, match=r"topk_weights\[2, 1\] = nan"):
        group.ranks[0].check()
    with pytest.raises(InputError, match="x: token 1, columns 128 to 255 has scale inf"):
        group.ranks[1].check()


# ------------------------------------------------------------------------------------------------------------- grouped


@pytest.mark.parametrize("fp8", [None, "fp32", "ue8m0"])
@pytest.mark.parametrize("host_counts", [False, True])
def test_rows_may_be_grouped_by_expert(fp8: ScaleFormat | None, host_counts: bool) -> None:
    group = group_of(3, experts=6, top_k=3, hidden=640)
    steps = ContiguousSteps(group)
    for number, tokens in enumerate(([5, 3, 4], [0, 5, 1], [0, 0, 0])):
        inputs = steps.inputs(tokens, holes=0.2)
        steps.number += 1
        steps.poison()
        handles = group.dispatch_send(
            [i.x for i in inputs],
            [i.topk_ids for i in inputs],
            [i.topk_weights for i in inputs],
            layout="contiguous",
            fp8=fp8,
        )
        alignment = (1, 4, 128)[number]
        got = group.grouped_recv(handles, alignment=alignment, host_counts=host_counts)
        check_grouped(group, inputs, got, fp8, alignment)
        most = group.grouped[0].worst_case(alignment)
        assert all(len(d.x) == (int(d.offsets[-1]) if host_counts else most) for d in got)
        y = expert_outputs(group, [len(d.x) for d in got], number)
        padded = [rows.masked_fill((d.expert_ids < 0)[:, None], float("nan")) for rows, d in zip(y, got, strict=True)]
        out = group.combine(padded, handles)
        for rank, have in enumerate(out):
            ids = [i.topk_ids for i in inputs]
            exact = [rows[: int(d.offsets[-1])] for rows, d in zip(y, got, strict=True)]
            want = ref.combine_grouped(sizes_of(group), exact, ids, inputs[rank].topk_weights, rank, alignment)
            assert torch.equal(bits(have), bits(want))
    group.check()


def test_what_does_not_fit_the_grouped_layout_is_refused() -> None:
    group = group_of(2)
    inputs = make_inputs(group.config, 0, 0, [5, 4])
    handles = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs], layout="contiguous")
    with pytest.raises(InputError, match="out has 31 rows and this step needs 32"):
        group.grouped_recv(handles, alignment=4, out=[torch.zeros(31, 128, dtype=torch.bfloat16)] * 2)
    got = group.grouped_recv(handles, alignment=4)
    with pytest.raises(InputError, match=r"y has shape \[31, 128\]; expected \[32, 128\]"):
        group.combine([d.x[:31] for d in got], handles)
    with pytest.raises(InputError, match="topk_weights were not given at dispatch, which is where GPU ranks take them"):
        group.combine([d.x for d in got], handles)
