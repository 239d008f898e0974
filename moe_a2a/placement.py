"""Which rank holds which experts, when popular experts have several replicas: pure functions on tensors.

Logical experts are the model's, 0 to E - 1. Physical experts are places for weights, 0 to P - 1; rank r has those from
r * P / R on. `AllToAll` knows physical experts only: its num_experts is P, and `route` makes its ids.

The balancing follows the idea of DeepSeek's EPLB (Expert Parallelism Load Balancer, open-sourced 2025): replicate the
experts that carry the most load per replica, then pack the replicas so that every rank has equally many and about equal
load; with groups of experts and several hosts, pack the groups onto hosts first, so that a token whose experts are of
few groups goes to few hosts. Ours also keeps replicas of one expert on different ranks where it can: a dead rank then
takes no expert along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_a2a.errors import ConfigError, InputError


def balance(load: torch.Tensor, physical_experts: int, ranks: int, hosts: int = 1, groups: int = 1) -> torch.Tensor:
    """Place experts by their load. Returns int64 [L, P], the logical expert of each physical one.

    load: [L, E], tokens (or any measure of work, 0 or more) of each layer's logical experts.
    physical_experts: P, E or more, divisible by `ranks`; P - E are redundant.
    hosts, groups: with hosts > 1, all replicas of an expert are on one host, and so are the experts of a group; both
        `ranks` and `groups` must divide by `hosts`, and E by `groups`. Then a host that dies takes its experts along;
        hosts=1 spreads replicas over all ranks.

    Equal loads give equal results everywhere. Raises ConfigError.
    """
    if load.dim() != 2 or load.shape[1] < 1:
        raise ConfigError(f"load has shape {tuple(load.shape)}; give [layers, experts]")
    experts = load.shape[1]
    if ranks < 1 or physical_experts < experts or physical_experts % ranks:
        raise ConfigError(
            f"physical_experts={physical_experts} for {experts} experts on {ranks} ranks; give a multiple of {ranks} "
            f"that is {experts} or more"
        )
    if hosts < 1 or groups < 1 or ranks % hosts or groups % hosts or experts % groups:
        raise ConfigError(
            f"hosts={hosts}, groups={groups} with {ranks} ranks and {experts} experts; ranks and groups must divide by "
            "hosts, and experts by groups"
        )
    loads = load.detach().double().cpu()
    if not bool(torch.isfinite(loads).all()) or bool((loads < 0).any()):
        raise ConfigError("load has entries that are negative or not finite; give counts of tokens")
    rows = [_balance_layer(layer, physical_experts, ranks, hosts, groups) for layer in loads.tolist()]
    return torch.tensor(rows, dtype=torch.int64).view(load.shape[0], physical_experts)


def _balance_layer(load: list[float], physical: int, ranks: int, hosts: int, groups: int) -> list[int]:
    size = len(load) // groups
    group_load = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    placed: list[int] = []
    for mine in _pack(group_load, list(range(groups)), hosts):
        experts = [e for group in sorted(mine) for e in range(group * size, (group + 1) * size)]
        chosen = _replicate({e: load[e] for e in experts}, physical // hosts)
        share = [load[e] / chosen.count(e) for e in chosen]
        for pack in _pack(share, chosen, ranks // hosts):
            placed += [chosen[item] for item in pack]
    return placed


def _replicate(load: dict[int, float], count: int) -> list[int]:
    """`count` replicas: one of each expert, then always one more of the expert with the most load per replica."""
    replicas = dict.fromkeys(load, 1)
    for _ in range(count - len(load)):
        # Among equals the one with the fewest replicas, so that experts without load get their share too.
        busiest = max(load, key=lambda e: (load[e] / replicas[e], -replicas[e], -e))
        replicas[busiest] += 1
    return [e for e in load for _ in range(replicas[e])]


def _pack(load: Sequence[float], kind: Sequence[int], packs: int) -> list[list[int]]:
    """Items into packs of equal size and about equal load: heaviest first, each into the lightest pack that has room,
    and that has none of its kind if there is such a pack."""
    room = len(load) // packs
    content: list[list[int]] = [[] for _ in range(packs)]
    kinds: list[set[int]] = [set() for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(load)), key=lambda i: (-load[i], i)):
        open_packs = [p for p in range(packs) if len(content[p]) < room]
        best = min(open_packs, key=lambda p: (kind[item] in kinds[p], total[p], len(content[p]), p))
        content[best].append(item)
        kinds[best].add(kind[item])
        total[best] += load[item]
    return content


def redundant_experts(experts: int, ranks: int, failures: int) -> int:
    """The fewest redundant experts with which `ranks` minus `failures` ranks still have a place for every expert.

    Places are the same number on every rank, (experts + redundant) / ranks, and those of the ranks that are left must
    be `experts` or more. Then `balance` over them places every expert again; the weights of an expert whose replicas
    were all on lost ranks must come from elsewhere, such as the model's files. Raises ConfigError.
    """
    if experts < 1 or ranks < 1 or not 0 <= failures < ranks:
        raise ConfigError(
            f"{experts} experts on {ranks} ranks with {failures} failures: give 1 or more experts, and fewer failures "
            "than ranks"
        )
    return -(-experts // (ranks - failures)) * ranks - experts


def rank_load(load: torch.Tensor, physical_to_logical: torch.Tensor, ranks: int) -> torch.Tensor:
    """float64 [L, R]: each rank's share of the load, if every expert's tokens spread evenly over its replicas.

    load: [L, E]. physical_to_logical: [L, P].
    """
    loads = load.detach().double().cpu()
    counts = torch.zeros_like(loads).scatter_add_(
        1, physical_to_logical, torch.ones(physical_to_logical.shape).double()
    )
    share = (loads / counts.clamp(min=1)).gather(1, physical_to_logical)
    return share.view(len(loads), ranks, -1).sum(-1)


def routable(
    physical_to_logical: torch.Tensor, num_experts: int, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The replicas that tokens may go to. Returns (replicas, counts).

    physical_to_logical: int64 [P], of one layer. num_experts: E. active: bool [R], whose slots take part
    (`View.active`). replicas: int64 [E, most], ascending physical experts on active ranks, -1 beyond counts. counts:
    int64 [E], 0 for an expert that is lost. On the device of `physical_to_logical`. Raises InputError.
    """
    physical, ranks = physical_to_logical.numel(), active.numel()
    if physical_to_logical.dim() != 1 or ranks < 1 or physical % ranks:
        raise InputError(
            f"{tuple(physical_to_logical.shape)} physical experts on {ranks} ranks; give one layer, [P], with P "
            "divisible by the number of ranks"
        )
    if physical and not 0 <= int(physical_to_logical.min()) <= int(physical_to_logical.max()) < num_experts:
        raise InputError(
            f"physical_to_logical names experts outside 0 to {num_experts - 1}; give the model's num_experts"
        )
    device = physical_to_logical.device
    alive = active.to(device=device, dtype=torch.bool).repeat_interleave(physical // ranks)
    usable = alive.nonzero().flatten()
    owner = physical_to_logical[usable]
    counts = torch.bincount(owner, minlength=num_experts)
    order = torch.argsort(owner, stable=True)
    start = counts.cumsum(0) - counts
    place = torch.arange(len(owner), device=device) - start[owner[order]]
    replicas = torch.full((num_experts, max(1, int(counts.max()))), -1, dtype=torch.int64, device=device)
    replicas[owner[order], place] = usable[order]
    return replicas, counts


def lost_experts(counts: torch.Tensor) -> torch.Tensor:
    """int64, the logical experts without a replica on an active rank, ascending. counts: of `routable`."""
    return (counts == 0).nonzero().flatten()


def route(
    topk_ids: torch.Tensor, replicas: torch.Tensor, counts: torch.Tensor, first_token: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Physical experts for a router's choices. Returns (physical ids, lost).

    topk_ids: int64 [T, K], logical experts, -1 for none. replicas, counts: of `routable`. first_token: number of the
    first token, the same for the same tokens; give ranks different ones (their number times M), so that they begin with
    different replicas.

    physical ids: int64 [T, K]; an expert's tokens go to its replicas in turn, by their number and nothing else, so that
    a repeated step makes the same choice. -1 where topk_ids has -1 and where the expert is lost; lost: bool [T, K], the
    latter. Does not wait for the device.
    """
    wanted = topk_ids >= 0
    experts = topk_ids.clamp(min=0)
    number = torch.arange(first_token, first_token + topk_ids.shape[0], device=topk_ids.device).view(-1, 1)
    available = counts[experts]
    chosen = replicas[experts, number % available.clamp(min=1)]
    return torch.where(wanted, chosen, -1), wanted & (available == 0)
