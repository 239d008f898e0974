"""Prefill and decode apart, each with tensor parallelism: on one machine, or on several."""

from __future__ import annotations

from collections.abc import Sequence

from moe_a2a.recipes import memory, ports, servers
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.plan import Plan
from moe_a2a.recipes.servers import Kind, Policy, Ports, Settings
from moe_a2a.recipes.text import Page


def plan(
    name: str,
    settings: Settings,
    prefill: Sequence[Group],
    decode: Sequence[Group],
    router_host: str,
    gpu_memory_gib: float,
    given: Ports,
    policy: Policy,
) -> Plan:
    """xPyD: any number of prefill and decode servers. Raises RecipeError."""
    shares = {}
    for one in (*prefill, *decode):
        memory.check_parts(settings.model, one.gpus)
        shares[one.gpus] = memory.share(settings.model, one.gpus, gpu_memory_gib)
    found = (
        *servers.build(settings, Kind("prefill"), prefill, given),
        *servers.build(settings, Kind("decode"), decode, given),
    )
    gate = servers.router(router_host, given.router, found, policy)
    ports.check((*found, gate))
    page = Page(settings, (*found, gate))
    page.what(
        f"{len(prefill)} prefill and {len(decode)} decode servers with tensor parallelism. A request goes to the "
        "router, which picks one of each. The prefill server computes the prompt's KV cache and sends it to the "
        "decode server, GPU to GPU; nothing else crosses between them."
    )
    for gpus, share in shares.items():
        page.fits(f"weights on {gpus} {'GPU' if gpus == 1 else 'GPUs'}", share)
    page.transfer()
    return Plan(
        name=name,
        title=page.title("prefill and decode apart"),
        servers=found,
        router=gate,
        checks=servers.checks(found, gate, "/generate", servers.GENERATE),
        text=page.text(),
        volumes=settings.volumes,
        image=settings.image,
        rdma=settings.transfer != "mooncake_tcp",
    )
