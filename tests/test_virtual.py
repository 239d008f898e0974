"""The kernels of the masked path, with virtual ranks in Triton's interpreter."""

from __future__ import annotations

import os
import sys
import time

# Before anything imports Triton, which decides then how it runs kernels.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
from virtual_steps import (
    Steps,
    bits,
    check_combine,
    check_dispatch,
    check_rows,
    expert_outputs,
    group_of,
    make_inputs,
    poison,
    send,
    sizes_of,
    without,
)

from moe_a2a import Config, ConfigError, HandleError, InputError, RankLost
from moe_a2a import reference as ref
from moe_a2a.fp8 import ScaleFormat, pack_ue8m0, quantize
from moe_a2a.gpu.wait_times import add_wait_times
from moe_a2a.virtual import VirtualGroup

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton was imported to compile in this process; run without tests/gpu"
)


@pytest.mark.parametrize("ranks, fp8", [(2, None), (2, "fp32"), (4, None), (4, "ue8m0"), (8, "fp32")])
def test_steps_of_changing_size_match_the_oracle(ranks: int, fp8: ScaleFormat | None) -> None:
    steps = Steps(group_of(ranks))
    full, some, few = [3] * ranks, [r % 3 for r in range(ranks)], [0] * (ranks - 1) + [1]
    for tokens in (full, some, few) if ranks < 8 else (full, few):
        steps.step(tokens, fp8, holes=0.2)


@pytest.mark.parametrize("fp8", [None, "fp32", "pow2", "ue8m0"])
def test_rows_wider_than_a_block_and_odd_sizes_match_the_oracle(fp8: ScaleFormat | None) -> None:
    """More columns than one work item, no power of two anywhere, more experts than one program counts."""
    steps = Steps(group_of(3, hidden=1408, top_k=5, tokens=3, experts=39))
    steps.step([3, 1, 2], fp8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_payload_dtypes_match_the_oracle(dtype: torch.dtype) -> None:
    steps = Steps(group_of(2, hidden=256, dtype=dtype))
    steps.step([3, 2])
    steps.step([3, 2], "fp32")


def test_hot_experts_and_tokens_without_experts_match_the_oracle() -> None:
    steps = Steps(group_of(2, top_k=3, tokens=6, experts=6))
    steps.step([6, 5], routing="zipf", padding=0.3)
    steps.step([4, 6], routing="k-hot", padding=1.0)
    steps.step([0, 0])


def test_a_batch_longer_than_one_scan_matches_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots follow from counting the tokens before, so many at once (128; 4 here, to be done sooner)."""
    from moe_a2a.kernels import dispatch_send

    monkeypatch.setattr(dispatch_send, "_SCAN", 4)
    steps = Steps(group_of(2, top_k=1, tokens=13, experts=2))
    steps.step([13, 5])
    steps.step([4, 12])


def test_weights_may_come_at_combine() -> None:
    steps = Steps(group_of(2, tokens=17))
    steps.step([17, 2], weights=False)
    steps.step([1, 3], weights=True)


def test_int32_ids_and_rows_that_are_fp8_already() -> None:
    group = group_of(2, hidden=256)
    inputs = make_inputs(group.config, 0, 0, [3, 2])
    quantised = [quantize(i.x, power_of_two=True) for i in inputs]
    steps = Steps(group)
    for fp8 in ("fp32", "ue8m0"):
        got = group.dispatch_recv(
            group.dispatch_send(
                [q for q, _ in quantised],
                [i.topk_ids.int() for i in inputs],
                [i.topk_weights for i in inputs],
                scales=[s for _, s in quantised],
                fp8=fp8,
            ),
            out=steps.poisoned(fp8),
        )
        scales = [pack_ue8m0(s) if fp8 == "ue8m0" else s for _, s in quantised]
        check_rows(group, inputs, [q for q, _ in quantised], scales, got)
        steps.combine(inputs, [d.handle for d in got])


def test_the_same_inputs_give_the_same_bits() -> None:
    outputs = []
    for _ in range(2):
        group = group_of(4, top_k=4)
        inputs = make_inputs(group.config, 5, 0, [3, 0, 2, 3])
        got = group.dispatch([i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs])
        out = group.combine(expert_outputs(group, 1), [d.handle for d in got])
        outputs.append([bits(o) for o in out] + [d.counts for d in got])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_two_channels_and_two_steps_of_a_channel_are_in_flight_at_once() -> None:
    group = group_of(2, channels=("one", "two"))
    steps = Steps(group)
    opened = []
    for channel in ("one", "two", "one"):
        inputs = steps.inputs([3, 1])
        opened.append((inputs, steps.dispatch(inputs, channel=channel)))
    with pytest.raises(HandleError, match="still open"):
        steps.dispatch(inputs, channel="one")
    for inputs, got in opened:
        steps.combine(inputs, [d.handle for d in got])
    group.check()


def test_a_step_may_end_without_a_combine() -> None:
    group = group_of(2)
    steps = Steps(group)
    inputs = steps.inputs([3, 2])
    got = steps.dispatch(inputs)
    group.discard([d.handle for d in got])
    sent = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs])
    group.discard(sent)
    group.check()
    with pytest.raises(HandleError, match="finished>; this call needs"):
        group.discard(sent)
    for tokens in ([3, 3], [1, 2], [0, 3]):
        steps.step(tokens)


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
    inputs = make_inputs(group.config, 0, 0, [3, 3])
    inputs[1].topk_ids[1] = torch.tensor(ids)
    handles = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs])
    got = group.dispatch_recv(handles, out=Steps(group).poisoned(None))
    inputs[1].topk_ids[1] = torch.tensor(instead)
    check_dispatch(group, inputs, got, None)
    y = expert_outputs(group, 0)
    check_combine(group, inputs, y, group.combine(y, handles))
    with pytest.raises(InputError, match=message):
        group.check()
    group.check()  # said once


def test_scales_that_cannot_be_used_are_reported() -> None:
    group = group_of(2)
    inputs = make_inputs(group.config, 0, 0, [2, 1])
    q, scales = zip(*[quantize(i.x, power_of_two=True) for i in inputs], strict=True)
    scales[0][1, 0] = 3.0
    group.dispatch(q, [i.topk_ids for i in inputs], [i.topk_weights for i in inputs], scales=scales, fp8="ue8m0")
    with pytest.raises(InputError, match=r"rank 0: scales: token 1, columns 0 to 127 has scale 3; .* powers of two"):
        group.check()


def test_arguments_are_checked_without_reading_them() -> None:
    group = group_of(2, fp8_only=True)
    (one, two) = make_inputs(group.config, 0, 0, [2, 1])
    rank = group.ranks[0]
    with pytest.raises(InputError, match=r"max_tokens_per_rank=3, but this call brings 4 tokens"):
        rank.dispatch_send(torch.zeros(4, 128, dtype=torch.bfloat16), one.topk_ids, one.topk_weights, fp8="fp32")
    with pytest.raises(InputError, match=r"topk_ids has shape \[1, 2\]; expected \[2, 2\]"):
        rank.dispatch_send(one.x, two.topk_ids, one.topk_weights, fp8="fp32")
    with pytest.raises(InputError, match="buffers hold FP8 rows only"):
        rank.dispatch_send(one.x, one.topk_ids, one.topk_weights)
    with pytest.raises(InputError, match="give one for each of the 2 ranks"):
        group.dispatch([one.x], [one.topk_ids], [one.topk_weights], fp8="fp32")
    handles = group.dispatch_send([one.x, two.x], [one.topk_ids, two.topk_ids], fp8="fp32")
    with pytest.raises(HandleError, match="needs a step that is received"):
        rank.combine_send(torch.zeros(4, 6, 128, dtype=torch.bfloat16), handles[0])
    with pytest.raises(HandleError, match="belongs to another rank"):
        rank.dispatch_recv(handles[1])
    group.dispatch_recv(handles)
    with pytest.raises(InputError, match="were not given at dispatch"):
        rank.combine_send(torch.zeros(4, 6, 128, dtype=torch.bfloat16), handles[0])


def test_a_group_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts=8 does not divide by 3 ranks"):
        group_of(3)
    with pytest.raises(ConfigError, match="allowed: 'cpu', 'cuda'"):
        VirtualGroup(Config(8, 128, 2, 3), 2, "meta")


@pytest.mark.parametrize("ranks, fp8", [(2, "ue8m0"), (4, None)])
def test_origins_by_source_are_a_range_of_rows_for_each_rank(ranks: int, fp8: ScaleFormat | None) -> None:
    """As DeepEP's handles hold them; the result's tensors are known before the receive."""
    group = group_of(ranks, top_k=3)
    steps = Steps(group)
    for tokens in ([3, 1, 2, 3][:ranks], [0, 3, 3, 1][:ranks], [0] * ranks):
        inputs = steps.inputs(tokens, holes=0.2)
        handles = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs], fp8=fp8)
        outs = steps.poisoned(fp8)
        known = [r.reserve(h, by_source=True, out=o) for r, h, o in zip(group.ranks, handles, outs, strict=True)]
        got = group.dispatch_recv(handles)
        assert all(a is b for a, b in zip(known, got, strict=True))
        for rank, have in enumerate(got):
            want = ref.dispatch_masked(sizes_of(group), [i.x for i in inputs], [i.topk_ids for i in inputs], rank)
            assert have.ranges is not None and torch.equal(have.counts, want.counts)
            for expert, count in enumerate(want.counts.tolist()):
                source = want.source[expert, :count]
                assert torch.equal(have.source[expert, :count], source % 3)
                rows = torch.bincount(source // 3, minlength=ranks)
                assert torch.equal(have.ranges[expert], (rows.cumsum(0) - rows << 32) | rows)
        steps.combine(inputs, handles, weights=True)
        poison(got)
        steps.number += 1


@pytest.mark.alone
def test_wait_times_name_the_rank_that_is_slow() -> None:
    group = group_of(3, timeout_s=1.0, experts=6)
    (one, two, _), inputs = group.ranks, make_inputs(group.config, 0, 0, [3, 2, 1])
    handles = [rank.dispatch_send(i.x, i.topk_ids) for rank, i in zip((one, two), inputs, strict=False)]
    times = torch.zeros(3, dtype=torch.int64)
    began = time.monotonic()
    add_wait_times(one, handles[0], times)
    one.dispatch_recv(handles[0])  # rank 2 never comes
    assert times[2] >= 1_000_000_000 > 3 * times[:2].max()
    assert time.monotonic() - began < 1.9  # the receive goes by the same clock: one budget, not two
    assert one.missing(handles[0]) == [2]
    group.alive.fill_(0b011)
    two.control[group.layout.BUDGET_NS] = 1000 * 10**9
    add_wait_times(two, handles[1], torch.zeros(3, dtype=torch.int64))
    two.dispatch_recv(handles[1])  # ends: rank 2 is known to be dead
    for rank, handle, i in zip((one, two), handles, inputs, strict=False):
        rank.weights_push(handle, i.topk_weights)
    times.zero_()
    add_wait_times(one, handles[0], times)
    one.combine_send(expert_outputs(group, 0)[0], handles[0])
    assert times[2] == 0 and times[:2].min() > 0  # rank 2 sent no tokens, and owes no weights
    one.combine_recv(handles[0])  # rank 1 does not come to it
    assert times[1] >= 1_000_000_000 and times[2] == 0  # nor any sums
    with pytest.raises(HandleError, match="has still to wait"):
        add_wait_times(one, handles[0], times)


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_rank_that_does_not_come_is_left_out_and_named() -> None:
    group = group_of(4, timeout_s=0.05)
    inputs = make_inputs(group.config, 0, 0, [3, 3, 2, 3])
    steps = Steps(group)
    steps.step([3, 3, 3, 3])  # leaves rows that nobody may take for rank 2's of the next step
    handles = {r: send(group, inputs, r) for r in (0, 1, 3)}
    outs = steps.poisoned(None)
    got = {r: group.ranks[r].dispatch_recv(handles[r], out=outs[r]) for r in handles}
    check_dispatch(group, without(inputs, 2), [got.get(r) for r in range(4)], None, [0, 1, 3])
    y = expert_outputs(group, 0)
    for r in handles:
        group.ranks[r].combine_send(y[r], handles[r])
    out = {r: group.ranks[r].combine_recv(handles[r]) for r in handles}
    # What rank 2's experts would have added is missing too.
    reached = [i.topk_ids.masked_fill(i.topk_ids // 2 == 2, -1) for i in inputs]
    survivors = [type(i)(i.x, ids, i.topk_weights) for i, ids in zip(inputs, reached, strict=True)]
    check_combine(group, without(survivors, 2), y, [out.get(r) for r in range(4)], [0, 1, 3])
    for r in handles:
        assert group.ranks[r].missing(handles[r]) == [2]
        with pytest.raises(RankLost, match=r"ranks \[2\] were missing") as lost:
            group.ranks[r].check()
        assert lost.value.ranks == (2,)


def test_a_rank_that_came_too_late_for_one_peer_is_told_so() -> None:
    """Rank 0 gave up on rank 2, and must not let it sum the rows that an older step left."""
    group = group_of(3, timeout_s=0.05, top_k=3, experts=3)
    Steps(group).step([3, 3, 3])
    Steps(group).step([3, 3, 3])
    inputs = make_inputs(group.config, 7, 0, [2, 2, 3])
    handles = [send(group, inputs, r) for r in (0, 1)]
    group.ranks[0].dispatch_recv(handles[0])
    handles.append(send(group, inputs, 2))
    for r in (1, 2):
        group.ranks[r].dispatch_recv(handles[r])
    y = expert_outputs(group, 0)
    for r in range(3):
        group.ranks[r].combine_send(y[r], handles[r])
    out = [group.ranks[r].combine_recv(handles[r]) for r in range(3)]
    assert [group.ranks[r].missing(handles[r]) for r in range(3)] == [[2], [], [0]]
    check_combine(group, inputs, y, out, [1])
    for rank, other in ((0, 2), (2, 0)):  # neither has anything from the other: there is one expert on a rank
        kept = [type(i)(i.x, i.topk_ids.masked_fill(i.topk_ids == other, -1), i.topk_weights) for i in inputs]
        check_combine(group, kept, y, out, [rank])


def test_a_membership_change_ends_a_wait_at_once() -> None:
    group = group_of(2, timeout_s=1000.0)
    inputs = make_inputs(group.config, 0, 0, [2, 2])
    handle = send(group, inputs, 0)
    group.alive.fill_(0b01)
    began = time.monotonic()
    group.ranks[0].dispatch_recv(handle)
    assert time.monotonic() - began < 20
    assert group.ranks[0].missing(handle) == [1]


def test_a_new_view_begins_at_its_step_and_older_lives_are_ignored() -> None:
    group = group_of(2, timeout_s=0.05)
    steps = Steps(group)
    steps.step([2, 2])
    layout = group.layout
    for rank in group.ranks:
        rank.control[layout.NEXT_EPOCH], rank.control[layout.NEXT_MASK], rank.control[layout.NEXT_STEP] = 2, 0b11, 3
    steps.step([2, 3])
    steps.step([3, 1])  # the step of the new view
    group.ranks[1].control[layout.NEXT_EPOCH] = 1  # a zombie that missed the change
    inputs = make_inputs(group.config, 9, 0, [2, 2])
    handles = [send(group, inputs, r) for r in range(2)]
    got = group.ranks[0].dispatch_recv(handles[0], out=steps.poisoned(None)[0])
    assert group.ranks[0].missing(handles[0]) == [1]
    check_dispatch(group, without(inputs, 1), [got], None, [0])


def test_a_rank_outside_the_view_gets_nothing_and_is_not_waited_for() -> None:
    group = group_of(2, timeout_s=1000.0)
    for rank in group.ranks:
        rank.control[group.layout.MASK] = 0b01
    inputs = make_inputs(group.config, 0, 0, [3, 3])
    before = group.ranks[1]._channels[0].region.clone()
    handle = send(group, inputs, 0)
    got = group.ranks[0].dispatch_recv(handle, out=Steps(group).poisoned(None)[0])
    check_dispatch(group, without(inputs, 1), [got], None, [0])
    assert torch.equal(group.ranks[1]._channels[0].region, before)
    assert group.ranks[0].missing(handle) == []


@pytest.mark.parametrize("fp8", [None, "fp32", "ue8m0"])
def test_both_halves_in_one_launch_match_the_oracle(fp8: ScaleFormat | None) -> None:
    """As eager steps of GPU ranks are launched. One rank: in the interpreter, others could not send meanwhile."""
    group = group_of(1, hidden=256, top_k=3, tokens=5)
    rank = group.ranks[0]
    for number, tokens in enumerate((5, 0, 3)):
        inputs = make_inputs(group.config, number, 0, [tokens], holes=0.2)
        mine, y = inputs[0], expert_outputs(group, number)
        weights = mine.topk_weights if number != 2 else None
        storage = Steps(group).poisoned(fp8)[0]
        got = rank.dispatch(mine.x, mine.topk_ids, weights, fp8=fp8, out=storage, by_source=number == 2)
        assert got.x is storage
        assert number != 2 or (got.ranges is not None and torch.equal(got.ranges[:, 0], got.counts.long()))
        check_dispatch(group, inputs, [got], fp8)
        out = torch.full_like(mine.x, float("nan"))
        times = torch.zeros(1, dtype=torch.int64)
        if number == 2:
            add_wait_times(rank, got.handle, times)
        assert rank.combine(y[0], got.handle, mine.topk_weights if weights is None else None, out=out) is out
        check_combine(group, inputs, y, [out])
        assert (times[0] > 0) == (number == 2)
        with pytest.raises(HandleError, match="finished"):
            rank.combine(y[0], got.handle)
    group.check()
