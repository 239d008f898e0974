"""The masked path with virtual ranks on one GPU, at the sizes of DeepSeek-V3."""

from __future__ import annotations

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import triton
from virtual_steps import Steps, bits, check_combine, check_dispatch, expert_outputs, make_inputs

from moe_a2a import Config, InputError
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.layout import Layout
from moe_a2a.virtual import VirtualGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set; run tests/gpu without it"),
]

DEEPSEEK_V3 = {"num_experts": 256, "hidden_size": 7168, "top_k": 8}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("fp8", [None, "fp32", "pow2", "ue8m0"])
def test_steps_match_the_oracle(ranks: int, fp8: ScaleFormat | None) -> None:
    group = VirtualGroup(Config(**DEEPSEEK_V3, max_tokens_per_rank=40), ranks)
    steps = Steps(group)
    for tokens in ([40] * ranks, [(17 * r) % 41 for r in range(ranks)], [0] * (ranks - 1) + [1], [0] * ranks):
        steps.step(tokens, fp8, holes=0.1)


@pytest.mark.parametrize("routing", ["zipf", "k-hot"])
def test_hot_experts_match_the_oracle(routing: str) -> None:
    group = VirtualGroup(Config(**DEEPSEEK_V3, max_tokens_per_rank=128), 2)
    Steps(group).step([128, 100], "fp32", routing=routing, padding=0.1)


def test_the_largest_group_matches_the_oracle() -> None:
    """R*M = 8192 rows for every expert, E = 1024, more tokens than one program takes."""
    group = VirtualGroup(Config(1024, 128, 8, 1024), 8)
    steps = Steps(group)
    steps.step([1024] * 8, "fp32", routing="zipf")
    steps.step([1024, 0, 3, 1000, 128, 129, 1, 512])


def test_random_small_steps_match_the_oracle() -> None:
    """Changing sizes, formats, routing and places of the weights, so that rows of older steps lie everywhere."""
    chance = random.Random(0)
    group = VirtualGroup(Config(64, 256, 6, 24), 4)
    steps = Steps(group)
    for _ in range(60):
        tokens = [chance.choice([0, 1, chance.randint(0, 24), 24]) for _ in range(4)]
        steps.step(
            tokens,
            chance.choice([None, "fp32", "pow2", "ue8m0"]),
            chance.random() < 0.7,
            routing=chance.choice(["uniform", "zipf", "k-hot"]),
            holes=chance.choice([0.0, 0.3]),
            padding=chance.choice([0.0, 0.3]),
        )


def test_the_same_inputs_give_the_same_bits() -> None:
    outputs = []
    for _ in range(2):
        group = VirtualGroup(Config(**DEEPSEEK_V3, max_tokens_per_rank=128), 4)
        inputs = make_inputs(group.config, 5, 0, [128, 0, 77, 128])
        there = Steps(group).there
        got = group.dispatch(
            there([i.x for i in inputs]), there([i.topk_ids for i in inputs]), there([i.topk_weights for i in inputs])
        )
        rows = [bits(d.x[torch.arange(d.x.shape[1], device="cuda") < d.counts[:, None]]) for d in got]
        out = group.combine(there(expert_outputs(group, 1)), [d.handle for d in got])
        outputs.append([*rows, *[bits(o) for o in out]])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_graphs_of_different_sizes_share_the_buffers() -> None:
    """Two captured sizes, replayed in turns and between eager steps, without a host synchronisation inside."""
    group = VirtualGroup(Config(64, 512, 6, 32), 2)
    steps = Steps(group)
    y = expert_outputs(group, 0)
    on_device = steps.there(y)
    captured = []
    for size in ([32, 32], [3, 7]):
        static = make_inputs(group.config, 0, 0, size)
        x, ids, weights = (
            steps.there([getattr(i, name) for i in static]) for name in ("x", "topk_ids", "topk_weights")
        )
        outs = steps.poisoned(None)
        steps.number += 1
        warm = group.dispatch(x, ids, weights, out=outs)
        group.combine(on_device, [d.handle for d in warm])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = group.dispatch(x, ids, weights, out=outs)
            out = group.combine(on_device, [d.handle for d in got])
        captured.append((graph, size, x, ids, weights, outs, got, out))
    for turn in range(12):
        graph, size, x, ids, weights, outs, got, out = captured[turn % 2 if turn < 8 else turn % 3 // 2]
        inputs = make_inputs(group.config, 3, turn, size, holes=0.2)
        for i, *there in zip(inputs, x, ids, weights, strict=True):
            for tensor, new in zip(there, (i.x, i.topk_ids, i.topk_weights), strict=True):
                tensor.copy_(new)
        for o in outs:
            o.view(torch.uint8).fill_(0x7F)
        graph.replay()
        check_dispatch(group, inputs, got, None)
        check_combine(group, inputs, y, out)
        if turn % 4 == 3:
            steps.step([5, 0], "fp32")
    group.check()


def test_a_wrong_id_is_reported_and_spoils_nothing_else() -> None:
    group = VirtualGroup(Config(**DEEPSEEK_V3, max_tokens_per_rank=128), 2)
    inputs = make_inputs(group.config, 0, 0, [128, 128])
    inputs[1].topk_ids[77, 3] = 256
    inputs[1].topk_ids[78, 3] = -7
    inputs[0].topk_ids[5, 4] = inputs[0].topk_ids[5, 2]
    steps = Steps(group)
    there = steps.there
    handles = group.dispatch_send(
        there([i.x for i in inputs]), there([i.topk_ids for i in inputs]), there([i.topk_weights for i in inputs])
    )
    got = group.dispatch_recv(handles, out=steps.poisoned(None))
    inputs[1].topk_ids[77, 3] = inputs[1].topk_ids[78, 3] = inputs[0].topk_ids[5, 4] = -1
    check_dispatch(group, inputs, got, None)
    y = expert_outputs(group, 0)
    check_combine(group, inputs, y, group.combine(there(y), handles))
    with pytest.raises(InputError, match=r"topk_ids\[5\] names expert \d+ twice"):
        group.ranks[0].check()
    with pytest.raises(InputError, match=r"topk_ids\[77, 3\] = 256; allowed are 0 to 255"):
        group.ranks[1].check()


def test_a_rank_that_does_not_come_is_left_out_by_all_programs_alike() -> None:
    group = VirtualGroup(Config(**DEEPSEEK_V3, max_tokens_per_rank=64), 4, timeout_s=0.2)
    steps = Steps(group)
    steps.step([64] * 4)
    inputs = make_inputs(group.config, 1, 0, [64, 64, 0, 64])
    there = {name: steps.there([getattr(i, name) for i in inputs]) for name in ("x", "topk_ids", "topk_weights")}
    alive = (0, 1, 3)
    handles = {
        r: group.ranks[r].dispatch_send(there["x"][r], there["topk_ids"][r], there["topk_weights"][r]) for r in alive
    }
    outs = steps.poisoned(None)
    got = [group.ranks[r].dispatch_recv(handles[r], out=outs[r]) if r in alive else None for r in range(4)]
    check_dispatch(group, inputs, got, None, alive)
    assert all(group.ranks[r].missing(handles[r]) == [2] for r in alive)


def test_a_membership_change_ends_a_wait_at_once() -> None:
    group = VirtualGroup(Config(**DEEPSEEK_V3, max_tokens_per_rank=64), 2, timeout_s=3600)
    steps = Steps(group)
    steps.step([64, 64])
    inputs = make_inputs(group.config, 1, 0, [64, 0])
    x, ids, weights = (steps.there([getattr(i, name) for i in inputs]) for name in ("x", "topk_ids", "topk_weights"))
    handle = group.ranks[0].dispatch_send(x[0], ids[0], weights[0])
    got = group.ranks[0].dispatch_recv(handle, out=steps.poisoned(None)[0])
    ended = torch.cuda.Event()
    ended.record()
    assert not ended.query()
    group.alive.fill_(0b01)
    ended.synchronize()
    check_dispatch(group, inputs, [got, None], None, [0])
    assert group.ranks[0].missing(handle) == [1]


def test_buffers_are_as_large_as_the_layout_says() -> None:
    config = Config(**DEEPSEEK_V3, max_tokens_per_rank=128, channels=("a", "b"))
    group = VirtualGroup(config, 2, fp8_only=True)
    assert group.buffer_bytes == 2 * Layout.of(config, 2, True).region_bytes <= 24e6
