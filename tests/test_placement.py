"""Where experts are placed, and where tokens go when ranks are gone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_a2a import ConfigError, InputError
from moe_a2a.placement import balance, lost_experts, rank_load, redundant_experts, routable, route


def zipf(layers: int, experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    load = 1000 / torch.arange(1, experts + 1).double()
    return torch.stack([load[torch.randperm(experts, generator=generator)] for _ in range(layers)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    ranks = draw(st.integers(1, 8))
    experts = draw(st.integers(1, 24))
    least = -(-experts // ranks)
    physical = ranks * draw(st.integers(least, least + 4))
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return torch.tensor([loads]), physical, ranks


@settings(deadline=None)
@given(cases())
def test_every_expert_has_a_place_and_every_rank_equally_many(case: tuple[torch.Tensor, int, int]) -> None:
    load, physical, ranks = case
    placed = balance(load, physical, ranks)
    assert placed.shape == (1, physical)
    assert set(placed[0].tolist()) == set(range(load.shape[1]))
    assert torch.allclose(rank_load(load, placed, ranks).sum(), load.double().sum())
    assert torch.equal(placed, balance(load.clone(), physical, ranks))


@settings(deadline=None)
@given(cases())
def test_the_busiest_replica_is_as_good_as_it_can_be(case: tuple[torch.Tensor, int, int]) -> None:
    """Greedy replication is optimal: no other numbers of replicas give a smaller largest share."""
    load, physical, ranks = case
    experts = load.shape[1]
    counts = torch.bincount(balance(load, physical, ranks)[0], minlength=experts)
    largest = float((load[0].double() / counts).max())
    needed = torch.ceil(load[0].double() / max(largest * (1 - 1e-9), 1e-12)).clamp(min=1).sum()
    assert largest == 0 or float(needed) > physical, "fewer replicas elsewhere would have made room"


def test_redundant_experts_even_out_a_skewed_load() -> None:
    load = zipf(4, 64)
    plain = rank_load(load, torch.arange(64).expand(4, 64).contiguous(), 8)
    balanced = rank_load(load, balance(load, 80, 8), 8)
    mean = load.sum(1) / 8
    assert float((balanced.max(1).values / mean).max()) < 1.10
    assert float((plain.max(1).values / mean).min()) > 1.25


def test_replicas_are_on_different_ranks_so_that_no_single_death_takes_a_replicated_expert() -> None:
    load = torch.ones(1, 32)
    placed = balance(load, 64, 8)[0]
    for dead in range(8):
        active = torch.ones(8, dtype=torch.bool)
        active[dead] = False
        _, counts = routable(placed, 32, active)
        assert lost_experts(counts).numel() == 0


def test_groups_stay_together_on_a_host() -> None:
    load = zipf(2, 32)
    placed = balance(load, 48, 8, hosts=2, groups=8)
    for layer in placed:
        hosts = layer.view(2, -1)
        groups = [set((half // 4).tolist()) for half in hosts]
        assert not groups[0] & groups[1] and len(groups[0]) == len(groups[1]) == 4


def test_dead_replicas_are_avoided_and_lost_experts_named() -> None:
    placed = torch.tensor([0, 1, 2, 0, 1, 3])  # three ranks with two each
    replicas, counts = routable(placed, 4, torch.tensor([True, True, True]))
    assert counts.tolist() == [2, 2, 1, 1]
    assert replicas.tolist() == [[0, 3], [1, 4], [2, -1], [5, -1]]
    replicas, counts = routable(placed, 4, torch.tensor([True, True, False]))
    assert counts.tolist() == [2, 1, 1, 0] and lost_experts(counts).tolist() == [3]
    ids, lost = route(torch.tensor([[0, 3], [1, 2], [0, -1], [1, 0]]), replicas, counts)
    assert ids.tolist() == [[0, -1], [1, 2], [0, -1], [1, 3]]
    assert lost.tolist() == [[False, True], [False, False], [False, False], [False, False]]


def test_with_nobody_left_everything_is_lost() -> None:
    replicas, counts = routable(torch.tensor([0, 1]), 2, torch.tensor([False, False]))
    ids, lost = route(torch.tensor([[0, 1], [1, -1]]), replicas, counts)
    assert ids.tolist() == [[-1, -1], [-1, -1]] and lost.tolist() == [[True, True], [True, False]]


@settings(deadline=None)
@given(cases(), st.data())
def test_routing_goes_to_live_replicas_of_the_right_expert_only(
    case: tuple[torch.Tensor, int, int], data: st.DataObject
) -> None:
    load, physical, ranks = case
    experts = load.shape[1]
    placed = balance(load, physical, ranks)[0]
    active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks)))
    replicas, counts = routable(placed, experts, active)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    topk = torch.randint(-1, experts, (40, 3), generator=generator)
    ids, lost = route(topk, replicas, counts, first_token=7)
    gone = set(lost_experts(counts).tolist())
    for wanted, got, missing in zip(
        topk.flatten().tolist(), ids.flatten().tolist(), lost.flatten().tolist(), strict=True
    ):
        if wanted < 0 or wanted in gone:
            assert got == -1 and missing == (wanted >= 0)
        else:
            assert not missing and int(placed[got]) == wanted and bool(active[got // (physical // ranks)])
    again, _ = route(topk[5:], replicas, counts, first_token=12)
    assert torch.equal(again, ids[5:]), "a token's choice depends on more than its number"


def test_tokens_spread_over_replicas() -> None:
    replicas, counts = routable(torch.tensor([0, 0, 0, 0]), 1, torch.ones(4, dtype=torch.bool))
    ids, _ = route(torch.zeros(100, 1, dtype=torch.int64), replicas, counts)
    assert torch.bincount(ids.flatten()).tolist() == [25] * 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"physical_experts": 7, "ranks": 4},
        {"physical_experts": 10, "ranks": 4},
        {"physical_experts": 8, "ranks": 0},
        {"physical_experts": 8, "ranks": 4, "hosts": 3},
        {"physical_experts": 8, "ranks": 4, "hosts": 2, "groups": 1},
        {"physical_experts": 8, "ranks": 4, "groups": 3},
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"give a multiple|must divide"):
        balance(torch.ones(1, 8), **arguments)


def test_loads_and_maps_that_cannot_be_are_refused() -> None:
    for load in (torch.tensor([[1.0, float("nan")]]), torch.tensor([[1.0, -1.0]])):
        with pytest.raises(ConfigError, match="negative or not finite"):
            balance(load, 2, 1)
    with pytest.raises(ConfigError, match="give \\[layers, experts\\]"):
        balance(torch.ones(4), 4, 1)
    with pytest.raises(InputError, match="outside 0 to 1"):
        routable(torch.tensor([0, 2]), 2, torch.ones(2))
    with pytest.raises(InputError, match="divisible by the number of ranks"):
        routable(torch.tensor([0, 1, 0]), 2, torch.ones(2))


@given(st.integers(1, 64), st.integers(2, 16), st.data())
def test_redundant_experts_leave_room_for_all_experts_and_are_the_fewest(
    experts: int, ranks: int, data: st.DataObject
) -> None:
    failures = data.draw(st.integers(0, ranks - 1))
    redundant = redundant_experts(experts, ranks, failures)
    places, rest = divmod(experts + redundant, ranks)
    assert redundant >= 0 and rest == 0
    assert places * (ranks - failures) >= experts > (places - 1) * (ranks - failures)
    left = ranks - failures
    assert set(balance(torch.ones(1, experts), places * left, left)[0].tolist()) == set(range(experts))


@pytest.mark.parametrize("experts, ranks, failures", [(0, 8, 1), (8, 0, 0), (8, 4, 4), (8, 4, -1)])
def test_failures_must_leave_a_rank(experts: int, ranks: int, failures: int) -> None:
    with pytest.raises(ConfigError, match="fewer failures than ranks"):
        redundant_experts(experts, ranks, failures)


def test_redundant_experts_of_deepseek_v3() -> None:
    assert [redundant_experts(256, 8, failures) for failures in (0, 1, 2)] == [0, 40, 88]
