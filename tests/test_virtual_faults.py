"""What becomes of steps when a rank is late or dead, when steps overlap, and when a view changes: virtual ranks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence

# Before anything imports Triton, which decides then how it runs kernels.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
from virtual_steps import Steps, check_combine, check_dispatch, expert_outputs, group_of, make_inputs, send, without

from moe_a2a import HandleError, InputError, NotFinite, RankLost
from moe_a2a.fp8 import quantize
from moe_a2a.gpu.discard import discard_recv, discard_send
from moe_a2a.gpu.handle import GpuHandle, Slot
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.step import Phase
from moe_a2a.virtual import VirtualGroup
from moe_a2a.workload import Inputs

pytestmark = [
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret,
        reason="Triton was imported to compile in this process; run without tests/gpu",
    ),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy's, of NaN and infinity
]


def only(values: dict[int, object], ranks: int) -> list[object | None]:
    return [values.get(r) for r in range(ranks)]


def unreached(inputs: Sequence[Inputs], rank: int, experts: int) -> list[Inputs]:
    """The inputs without the choices of experts on `rank`, each of which has so many."""
    return [type(i)(i.x, i.topk_ids.masked_fill(i.topk_ids // experts == rank, -1), i.topk_weights) for i in inputs]


def step_without(group: VirtualGroup, inputs: list[Inputs], absent: int) -> dict[int, GpuHandle]:
    """A step that one rank does not make; the others' rows and sums are checked."""
    ranks = [r for r in range(len(group.ranks)) if r != absent]
    outs = Steps(group).poisoned(None)
    handles = {r: send(group, inputs, r) for r in ranks}
    got = {r: group.ranks[r].dispatch_recv(handles[r], out=outs[r]) for r in ranks}
    check_dispatch(group, without(inputs, absent), only(got, len(group.ranks)), None, ranks)
    y = expert_outputs(group, 0)
    for r in ranks:
        group.ranks[r].combine_send(y[r], handles[r])
    sums = {r: group.ranks[r].combine_recv(handles[r]) for r in ranks}
    kept = unreached(inputs, absent, group.layout.E_L)
    check_combine(group, without(kept, absent), y, only(sums, len(group.ranks)), ranks)
    return handles


def has_waited(group: VirtualGroup, handle: GpuHandle, phase: int) -> bool:
    """Did a clock run in this phase of the step? It is started by whoever has waited for some time."""
    return int(handle.slot.handle[group.layout.DEADLINE + phase]) != 0


def test_a_dead_rank_takes_no_time_from_one_that_lives_and_is_late() -> None:
    group = group_of(3, timeout_s=1000.0, experts=6)
    layout, inputs = group.layout, make_inputs(group.config, 0, 0, [3, 2, 3])
    handles = {r: send(group, inputs, r) for r in (0, 2)}
    step = handles[0].step
    flags = group.ranks[0]._channels[0].region[step % 2 * layout.parity_bytes + layout.flags :].view(torch.int64)
    late = layout.DISPATCH * layout.R + 2
    assert flags[late] == 2 * step
    flags[late] = 0
    group.alive.fill_(0b101)

    def come() -> None:
        time.sleep(1.0)
        flags[late] = 2 * step

    thread = threading.Thread(target=come)
    began = time.monotonic()
    thread.start()
    got = group.ranks[0].dispatch_recv(handles[0], out=Steps(group).poisoned(None)[0])
    thread.join()
    assert 1.0 <= time.monotonic() - began < 60
    check_dispatch(group, without(inputs, 1), [got, None, None], None, [0])
    assert group.ranks[0].missing(handles[0]) == [1]


def test_a_rank_that_is_missing_costs_one_budget_and_no_more() -> None:
    group = group_of(3, timeout_s=0.05, experts=6)
    layout = group.layout
    Steps(group).step([3, 3, 3])
    inputs = make_inputs(group.config, 1, 0, [3, 2, 3])
    handles = step_without(group, inputs, 2)
    for handle in handles.values():
        assert has_waited(group, handle, layout.DISPATCH)
        assert not has_waited(group, handle, layout.COMBINE)
    assert group.told[0] == 0b100
    for number in range(3):
        for r, handle in step_without(group, make_inputs(group.config, 2 + number, 0, [1, 3, 3]), 2).items():
            assert not has_waited(group, handle, layout.DISPATCH)
            assert not has_waited(group, handle, layout.COMBINE)
            assert group.ranks[r].missing(handle) == [2]
            with pytest.raises(RankLost, match=r"ranks \[2\] were missing"):
                group.ranks[r].check()


def test_a_late_rank_finds_its_step_as_it_was_and_is_told_that_nobody_waited() -> None:
    """The others have gone on by two steps, whose buffers are those of the step that the late rank still makes."""
    group = group_of(3, timeout_s=0.05, experts=6)
    steps = Steps(group)
    steps.step([3, 3, 3])
    inputs = make_inputs(group.config, 1, 0, [3, 2, 3])
    step_without(group, inputs, 2)
    before = group.ranks[2]._channels[0].region.clone()
    for number in range(3):
        step_without(group, make_inputs(group.config, 2 + number, 0, [3, 3, 3]), 2)
    assert torch.equal(group.ranks[2]._channels[0].region, before)
    late = group.ranks[2]
    handle = send(group, inputs, 2)
    got = late.dispatch_recv(handle, out=steps.poisoned(None)[2])
    check_dispatch(group, inputs, [None, None, got], None, [2])
    assert late.missing(handle) == []
    y = expert_outputs(group, 0)
    late.combine_send(y[2], handle)
    out = late.combine_recv(handle)
    assert late.missing(handle) == [0, 1]
    own = unreached(unreached(inputs, 0, 2), 1, 2)
    check_combine(group, own, y, [None, None, out], [2])
    step_without(group, make_inputs(group.config, 9, 0, [3, 1, 3]), 2)  # and spoils nothing by it


def test_a_new_view_may_bring_back_a_rank_that_was_given_up() -> None:
    group = group_of(3, timeout_s=0.05, experts=6)
    layout = group.layout
    steps = Steps(group)
    steps.step([3, 3, 3])
    for number in range(2):
        step_without(group, make_inputs(group.config, 1 + number, 0, [3, 2, 3]), 2)
    for rank in group.ranks:
        rank._channels[0].live[layout.GIVEN_UP] = 0  # the word of epoch 2
        rank.control[layout.NEXT_EPOCH], rank.control[layout.NEXT_MASK], rank.control[layout.NEXT_STEP] = 2, 0b111, 4
        rank.report[layout.LOST] = 0
    live = group.ranks[2]._channels[0].live
    live[layout.LIVE_STEP] = 3  # it joins at the others' step
    for tokens in ([3, 3, 3], [0, 2, 1], [3, 1, 2]):
        steps.step(tokens)


def test_a_discard_by_all_is_no_fault_and_a_rank_that_does_not_come_to_it_is_missing() -> None:
    group = group_of(3, timeout_s=0.05, experts=6)
    steps = Steps(group)
    inputs = steps.inputs([3, 2, 3])
    for receive in (True, False, True):
        handles = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs])
        if receive:
            group.dispatch_recv(handles)
        group.discard(handles)
        group.check()
    steps.step([3, 3, 2])
    handles = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs])
    for r in (0, 1):
        discard_send(group.ranks[r], handles[r])
    for r in (0, 1):
        discard_recv(group.ranks[r], handles[r])
        assert group.ranks[r].missing(handles[r]) == [2]
    step_without(group, make_inputs(group.config, 2, 0, [3, 2, 3]), 2)


def test_who_combines_what_another_discards_hears_of_it_and_sums_nothing_old() -> None:
    group = group_of(2)
    Steps(group).step([3, 3])
    Steps(group).step([3, 3])
    inputs = make_inputs(group.config, 3, 0, [3, 2])
    got = group.dispatch([i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs])
    y = expert_outputs(group, 0)
    discard_send(group.ranks[0], got[0].handle)
    group.ranks[1].combine_send(y[1], got[1].handle)
    discard_recv(group.ranks[0], got[0].handle)
    out = group.ranks[1].combine_recv(got[1].handle)
    check_combine(group, unreached(inputs, 0, 4), y, [None, out], [1])
    group.ranks[0].check()
    with pytest.raises(RankLost, match=r"ranks \[0\] were missing"):
        group.ranks[1].check()


# ----------------------------------------------------------------------------------------------- steps in a wrong order


def test_a_step_needs_nothing_of_what_its_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's steps get memory that nobody has cleared."""

    def spoil(group: VirtualGroup) -> None:
        for rank in group.ranks:
            for slot in rank._channels[0].slots:
                for tensor in (slot.handle, slot.hits, slot.places):
                    tensor.view(torch.uint8).fill_(0x5A)

    group = group_of(3, timeout_s=1000.0, experts=6, top_k=3)
    steps = Steps(group)
    for number, tokens in enumerate(([3, 3, 3], [0, 1, 0], [2, 0, 3], [0, 0, 0])):
        spoil(group)
        steps.step(tokens, weights=number % 2 == 0, holes=0.3)
    spoil(group)
    inputs = steps.inputs([3, 1, 2])
    group.discard(group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs]))
    group.check()


def as_graphs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps overlap as those of replayed graphs do: in memory of their own, and without the host's count."""
    monkeypatch.setattr(MaskedRank, "_check_free", lambda self, turns: None)
    send_it = MaskedRank.dispatch_send

    def dispatch_send(self: MaskedRank, *args: object, **options: object) -> GpuHandle:
        for state in self._channels:
            state.slots = [Slot.empty(self.layout, self.device) for _ in state.slots]
        return send_it(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MaskedRank, "dispatch_send", dispatch_send)


def test_a_step_that_begins_while_the_one_before_the_last_is_open_sends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_graphs_do(monkeypatch)
    group = group_of(2)
    steps = Steps(group)
    steps.step([3, 3])
    inputs = steps.inputs([3, 2])
    opened = steps.dispatch(inputs)
    steps.step([2, 3])  # works: two steps may be open
    before = [rank._channels[0].region.clone() for rank in group.ranks]
    third = make_inputs(group.config, 5, 0, [3, 3])
    handles = group.dispatch_send(*([getattr(i, name) for i in third] for name in ("x", "topk_ids", "topk_weights")))
    got = group.dispatch_recv(handles)
    out = group.combine(expert_outputs(group, 0), handles)
    assert all(torch.equal(r._channels[0].region, b) for r, b in zip(group.ranks, before, strict=True))
    assert all((d.counts == 0).all() for d in got) and all((o == 0).all() for o in out)
    for rank, handle in zip(group.ranks, handles, strict=True):
        assert rank.missing(handle) == [0, 1]
        with pytest.raises(HandleError, match="while the one before the last was open: it sent nothing"):
            rank.check()
    steps.combine(inputs, [d.handle for d in opened])  # the one that was open is as it should be
    group.check()
    for tokens in ([3, 1], [2, 2], [0, 3]):
        steps.step(tokens)


def test_a_step_that_has_ended_cannot_be_combined_again() -> None:
    """As by a graph that holds a combine and is replayed without its dispatch."""
    group = group_of(2)
    steps = Steps(group)
    for tokens in ([3, 3], [2, 2]):
        steps.step(tokens)
    inputs = steps.inputs([3, 2])
    got = steps.dispatch(inputs)
    steps.combine(inputs, [d.handle for d in got])
    handles: list[GpuHandle] = [d.handle for d in got]  # type: ignore[misc]
    before = [rank._channels[0].region.clone() for rank in group.ranks]
    y = expert_outputs(group, 5)
    for rank, handle, rows in zip(group.ranks, handles, y, strict=True):
        handle.phase = Phase.RECEIVED
        rank.combine_send(rows, handle)
        handle.turns.open.append(handle)
        assert (rank.combine_recv(handle) == 0).all()
        with pytest.raises(HandleError, match="a step was combined that had ended"):
            rank.check()
    assert all(torch.equal(r._channels[0].region, b) for r, b in zip(group.ranks, before, strict=True))
    for tokens in ([3, 1], [2, 2]):
        steps.step(tokens)


def test_a_handle_can_be_asked_who_is_missing_until_its_memory_is_used_again() -> None:
    group = group_of(2)
    handles = []
    for number in range(2):
        inputs = make_inputs(group.config, number, 0, [3, 2])
        got = group.dispatch([i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs])
        group.combine(expert_outputs(group, 0), [d.handle for d in got])
        handles.append(got[0].handle)
        assert group.ranks[0].missing(handles[0]) == [] and handles[0].step == 1
    send(group, inputs, 0)
    for ask in (lambda: group.ranks[0].missing(handles[0]), lambda: handles[0].step):
        with pytest.raises(HandleError, match="too old to be asked"):
            ask()
    assert group.ranks[0].missing(handles[1]) == []
    with pytest.raises(HandleError, match="belongs to another rank"):
        group.ranks[1].missing(handles[1])


# ----------------------------------------------------------------------------------------------------------- views


def test_a_new_view_takes_effect_in_all_kernels_of_the_step_it_names_and_in_none_before() -> None:
    """Rank 2 leaves at step 3. Step 2, under the old view, is open across the change; weights come at combine."""
    group = group_of(3, timeout_s=1000.0, experts=6, top_k=3)
    layout, stays = group.layout, (0, 1)
    steps = Steps(group)
    steps.step([3, 3, 3], weights=False)
    for rank in group.ranks:
        rank.control[layout.NEXT_EPOCH], rank.control[layout.NEXT_MASK] = 2, 0b011
        rank.control[layout.NEXT_STEP] = 3
    old = steps.inputs([3, 2, 3])
    opened = steps.dispatch(old, weights=False)  # step 2
    new = make_inputs(group.config, 7, 0, [3, 3, 3])
    before = group.ranks[2]._channels[0].region[layout.parity_bytes :].clone()  # of step 3's parity
    outs = steps.poisoned(None)
    handles = {r: group.ranks[r].dispatch_send(new[r].x, new[r].topk_ids) for r in stays}
    got = {r: group.ranks[r].dispatch_recv(handles[r], out=outs[r]) for r in stays}
    check_dispatch(group, without(new, 2), only(got, 3), None, stays)
    steps.combine(old, [d.handle for d in opened], weights=True)  # with all three
    y = expert_outputs(group, 3)
    for r in stays:
        group.ranks[r].weights_push(handles[r], new[r].topk_weights)
    for r in stays:
        group.ranks[r].combine_send(y[r], handles[r])
    sums = {r: group.ranks[r].combine_recv(handles[r]) for r in stays}
    check_combine(group, without(unreached(new, 2, 2), 2), y, only(sums, 3), stays)
    assert torch.equal(group.ranks[2]._channels[0].region[layout.parity_bytes :], before)
    assert all(group.ranks[r].missing(handles[r]) == [] for r in stays)
    group.check()


# ------------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize("fp8", ["fp32", "pow2", "ue8m0"])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_hidden_states_that_are_not_finite_are_reported_where_they_are_quantised(fp8: str, value: float) -> None:
    group = group_of(2, hidden=256)
    inputs = make_inputs(group.config, 0, 0, [3, 2])
    inputs[0].x[1, 200] = inputs[0].x[2, 5] = value
    _, scales = quantize(inputs[0].x)
    handles = group.dispatch_send(
        [i.x for i in inputs], [i.topk_ids for i in inputs], [i.topk_weights for i in inputs], fp8=fp8
    )
    got = group.dispatch_recv(handles)
    group.ranks[1].check()
    given = "nan" if value != value else "inf"
    with pytest.raises(NotFinite, match=rf"x: token 1, columns 128 to 255 has scale {given}; scales must be finite"):
        group.ranks[0].check()
    assert scales.isfinite().sum() == 4  # of six, as for CPU ranks
    if fp8 == "fp32":
        for d in got:
            for e, count in enumerate(d.counts.tolist()):
                rows = d.source[e, :count].tolist()
                own = [(i, row) for i, row in enumerate(rows) if row < 3]
                for i, row in own:
                    assert d.scales is not None
                    assert d.scales[e, i].isfinite().tolist() == scales[row].isfinite().tolist()


def test_what_padding_holds_does_not_matter() -> None:
    """Tokens without experts are what fills a captured batch up."""
    group = group_of(2, hidden=256)
    inputs = make_inputs(group.config, 0, 0, [3, 2])
    inputs[0].x[1] = torch.nan
    inputs[0].topk_ids[1] = -1
    steps = Steps(group)
    steps.combine(inputs, [d.handle for d in steps.dispatch(inputs, "fp32")])
    group.check()


def test_what_is_not_finite_goes_as_it_is_without_fp8() -> None:
    """As for CPU ranks: nobody reads rows that are not quantised."""
    group = group_of(2)
    inputs = make_inputs(group.config, 0, 0, [3, 2])
    inputs[0].x[1, 3] = torch.nan
    got = group.dispatch_recv(
        group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs]), out=Steps(group).poisoned(None)
    )
    check_dispatch(group, inputs, got, None)
    group.check()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "dtype, value, says",
    [
        (torch.bfloat16, torch.nan, r"nan; router weights must be finite and within 3.38953e\+38 for torch.bfloat16"),
        (torch.bfloat16, -torch.inf, "-inf; router weights must be finite"),
        (torch.float16, 7e4, "70000; router weights must be finite and within 65504 for torch.float16"),
    ],
)
def test_weights_that_cannot_be_used_are_reported(dtype: torch.dtype, value: float, says: str, late: bool) -> None:
    group = group_of(2, dtype=dtype, tokens=17)
    inputs = make_inputs(group.config, 0, 0, [17, 2])
    weights = [i.topk_weights for i in inputs]
    weights[0][16, 1] = value
    weights[1][0, 0] = torch.finfo(dtype).max  # is allowed
    got = group.dispatch([i.x for i in inputs], [i.topk_ids for i in inputs], None if late else weights)
    group.combine([torch.zeros_like(d.x) for d in got], [d.handle for d in got], weights if late else None)
    group.ranks[1].check()
    with pytest.raises(NotFinite, match=rf"topk_weights\[16, 1\] = {says}"):
        group.ranks[0].check()


def test_a_wrong_scale_far_to_the_right_is_named_with_its_token() -> None:
    group = group_of(2, hidden=130 * 128, tokens=2)
    inputs = make_inputs(group.config, 0, 0, [2, 1])
    for column, says in ((127 * 128, "16256 or later"), (70 * 128, "8960 to 9087")):
        inputs[0].x[1, column] = torch.inf
        handles = group.dispatch_send([i.x for i in inputs], [i.topk_ids for i in inputs], fp8="fp32")
        group.discard(handles)
        with pytest.raises(InputError, match=f"x: token 1, columns {says} has scale inf"):
            group.check()
