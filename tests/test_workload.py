"""Generated inputs: reproducible by anyone, valid for any router, skewed as promised."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from moe_a2a.workload import ROUTINGS, Routing, Trace, make_inputs, make_routing


def distinct(ids: torch.Tensor) -> bool:
    ordered = ids.sort(dim=1).values
    return not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def load(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Share of all choices by expert, the largest first."""
    counts = torch.bincount(ids[ids >= 0], minlength=experts).float()
    return (counts / counts.sum()).sort(descending=True).values


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens, experts, top_k", [(64, 256, 8), (5, 8, 8), (1, 1, 1), (0, 32, 4), (33, 40, 32)])
def test_ids_are_valid_and_distinct(routing: Routing, tokens: int, experts: int, top_k: int) -> None:
    ids = make_routing(3, 0, 0, tokens, experts, top_k, routing)
    assert ids.shape == (tokens, top_k) and ids.dtype == torch.int64
    assert ((ids >= 0) & (ids < experts)).all() and distinct(ids)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_inputs_depend_on_seed_rank_and_step_and_on_nothing_else(routing: Routing) -> None:
    def inputs(seed: int, rank: int, step: int) -> list[torch.Tensor]:
        got = make_inputs(
            seed, rank, step, 12, hidden=128, experts=64, top_k=4, routing=routing, padding=0.1, holes=0.1
        )
        return [got.x, got.topk_ids, got.topk_weights]

    first = inputs(0, 1, 2)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    inputs(7, 7, 7)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, inputs(0, 1, 2), strict=True))
    for other in (inputs(1, 1, 2), inputs(0, 2, 2), inputs(0, 1, 3), inputs(0, 2, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_padding_has_no_expert_and_no_weight_and_other_weights_sum_to_one() -> None:
    got = make_inputs(0, 0, 0, 400, hidden=128, experts=32, top_k=4, dtype=torch.float16, padding=0.25, holes=0.1)
    assert got.x.dtype == torch.float16 and got.topk_weights.dtype == torch.float32
    none = (got.topk_ids < 0).all(dim=1)
    assert 0.15 < none.float().mean() < 0.35
    assert ((got.topk_weights > 0) == (got.topk_ids >= 0)).all()
    torch.testing.assert_close(got.topk_weights.sum(dim=1), (~none).float())
    assert (make_inputs(0, 0, 0, 400, hidden=128, experts=32, top_k=4).topk_ids >= 0).all()


def test_routings_are_skewed_as_promised() -> None:
    ids = {kind: make_routing(0, 0, 0, 4096, 256, 8, kind) for kind in ROUTINGS}
    assert load(ids["uniform"], 256)[0] < 1.5 / 256
    zipf = load(ids["zipf"], 256)
    assert zipf[:8].sum() > 0.3 and zipf[0] / zipf[3] > 1.5 and zipf[-1] < 0.3 / 256
    assert load(ids["k-hot"], 256)[:8].sum() == pytest.approx(0.75)


def test_exponent_and_share_may_be_given() -> None:
    def hottest(kind: str) -> float:
        return float(load(make_routing(0, 0, 0, 2048, 256, 8, kind), 256)[:8].sum())

    assert hottest("zipf:0.5") < hottest("zipf") == hottest("zipf:1") < hottest("zipf:1.5")
    assert hottest("k-hot:0.5") == pytest.approx(0.5, abs=0.03)
    assert hottest("k-hot:1") == 1
    assert torch.equal(make_routing(0, 0, 0, 64, 64, 4, "k-hot"), make_routing(0, 0, 0, 64, 64, 4, "k-hot:0.75"))


@pytest.mark.parametrize("kind", ["zipf-packed", "k-hot-packed:0.9", "zipf-packed:1.5"])
def test_packed_experts_load_the_first_rank_the_most(kind: str) -> None:
    counts = torch.bincount(make_routing(0, 0, 0, 2048, 64, 4, kind).flatten(), minlength=64)
    by_rank = counts.view(4, 16).sum(dim=1)
    assert by_rank[0] > 2 * by_rank[1:].max()
    assert set(counts.topk(4).indices.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "text",
    ["", "zipf:", "zipf:-1", "zipf:inf", "zipf:nan", "k-hot:0", "k-hot:1.1", "uniform:1", "uniform-packed", "hot"],
)
def test_a_routing_that_is_not_known_says_which_are(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: uniform, zipf, k-hot, zipf-packed, k-hot-packed"):
        make_routing(0, 0, 0, 4, 8, 2, text)


def test_ids_and_weights_are_the_same_whatever_device_makes_the_rows() -> None:
    here = make_inputs(0, 1, 2, 12, hidden=128, experts=64, top_k=4)
    there = make_inputs(0, 1, 2, 12, hidden=256, experts=64, top_k=4, device=torch.device("cpu"))
    assert torch.equal(here.topk_ids, there.topk_ids) and torch.equal(here.topk_weights, there.topk_weights)


def test_ranks_and_steps_agree_on_the_hot_experts_and_seeds_do_not() -> None:
    def hottest(seed: int, rank: int, step: int) -> set[int]:
        ids = make_routing(seed, rank, step, 512, 64, 4, "k-hot")
        return set(torch.bincount(ids.flatten(), minlength=64).topk(4).indices.tolist())

    assert hottest(0, 0, 0) == hottest(0, 3, 5)
    assert hottest(0, 0, 0) != hottest(1, 0, 0)


@pytest.mark.alone
def test_a_large_batch_is_generated_fast() -> None:
    make_routing(0, 0, 0, 8, 256, 8, "zipf")
    start = time.perf_counter()
    make_routing(0, 0, 1, 1024, 256, 8, "zipf")
    assert time.perf_counter() - start < 1.0


def test_a_trace_is_shared_out_among_ranks_and_begins_again(tmp_path) -> None:
    file = tmp_path / "trace.npy"
    ids = np.arange(12, dtype=np.int32).reshape(2, 3, 2)
    np.save(file, ids)
    trace = Trace.load(file, experts=12, top_k=2)
    assert trace.rows(rank=0, step=0, tokens=2).tolist() == [[0, 1], [2, 3]]
    assert trace.rows(rank=1, step=0, tokens=2).tolist() == [[4, 5], [0, 1]]
    assert trace.rows(rank=0, step=3, tokens=1).tolist() == [[6, 7]]
    got = make_inputs(0, 1, 0, 2, hidden=128, experts=12, top_k=2, routing=trace)
    assert got.topk_ids.tolist() == [[4, 5], [0, 1]] and got.topk_ids.dtype == torch.int64
    np.save(file, ids[0])
    assert len(Trace.load(file, experts=12, top_k=2).steps) == 1


def test_a_trace_may_be_json_lines(tmp_path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps([[0, 1], [-1, -1]]) + "\n\n" + json.dumps({"topk_ids": [[3, 2]]}) + "\n")
    trace = Trace.load(file, experts=4, top_k=2)
    assert [step.tolist() for step in trace.steps] == [[[0, 1], [-1, -1]], [[3, 2]]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[[0, 4]]", "step 0, token 0: expert id 4; allowed: -1 .*none.* .. 3"),
        ("[[0, 1], [2, -2]]", "step 0, token 1: expert id -2"),
        ("[[0, 1]]\n[[1, 2], [3, 3]]", "step 1, token 1: expert id 3 is there twice"),
        ("[[0, 1, 2]]", "K = top_k = 2"),
        ("[[0, 1], [2]]", "line 1"),
        ("[[0.5, 1.0]]", "allowed: integers"),
        ("[]", "allowed: integers"),
        ("", "empty"),
        ("not json", "line 1"),
        ('{"ids": [[0, 1]]}', "topk_ids"),
    ],
)
def test_a_bad_trace_says_where_and_what_is_allowed(tmp_path, content: str, message: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Trace.load(file, experts=4, top_k=2)


def test_bad_arguments_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="allowed: uniform, zipf, k-hot"):
        make_routing(0, 0, 0, 4, 8, 2, "round-robin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k=9 distinct experts out of experts=8"):
        make_routing(0, 0, 0, 4, 8, 9, "uniform")
