"""DeepSeek-V3 and its kin with expert parallelism: prefill and decode apart, each server an EP group of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_a2a.recipes import experts as rules
from moe_a2a.recipes import memory, ports, servers
from moe_a2a.recipes.experts import UPSTREAM_LIMIT, Experts, Served
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.plan import Plan, Role, Server
from moe_a2a.recipes.servers import Kind, Policy, Ports, Settings
from moe_a2a.recipes.text import Page

__all__ = ["Experts", "Served", "plan"]


@dataclass(frozen=True)
class _Role:
    """One role's servers, worked out."""

    kind: Kind
    redundant: int
    tokens: int


def plan(
    settings: Settings,
    prefill: Sequence[Group],
    decode: Sequence[Group],
    router_host: str,
    gpu_memory_gib: float,
    given: Ports,
    policy: Policy,
    experts: Experts,
) -> Plan:
    """xPyD with expert parallelism. Raises RecipeError."""
    model = settings.model
    rules.check_model(model)
    served = rules.served_by(experts, (*prefill, *decode))
    rules.check_wishes(experts, served)
    found: tuple[Server, ...] = ()
    page = Page(settings)
    roles: list[_Role] = []
    wanted: tuple[tuple[Role, Sequence[Group]], ...] = (("prefill", prefill), ("decode", decode))
    for role, groups in wanted:
        ranks = rules.one_size(role, groups)
        worked = _role(settings, role, ranks, experts, served)
        share = memory.share(model, ranks, gpu_memory_gib, expert_parallel=True, redundant=worked.redundant)
        rules.check_rows(model, role, worked.tokens, share)
        page.fits(f"weights of a {role} server on {ranks} GPUs", share)
        roles.append(worked)
        found += servers.build(settings, worked.kind, groups, given)
    gate = servers.router(router_host, given.router, found, policy)
    ports.check((*found, gate))
    page.processes = (*found, gate)
    _describe(page, experts, served, roles)
    return Plan(
        name="ep",
        title=page.title("prefill and decode apart, with expert parallelism"),
        servers=found,
        router=gate,
        checks=servers.checks(found, gate, "/generate", servers.GENERATE),
        text=page.text(),
        warnings=_warnings(experts, served),
        volumes=settings.volumes,
        image=settings.image_with_this_package if served == "moe-a2a" else settings.image,
        rdma=settings.transfer != "mooncake_tcp",
    )


def _role(settings: Settings, role: Role, ranks: int, experts: Experts, served: Served) -> _Role:
    redundant = rules.redundant(role, settings.model, ranks, experts)
    upstream = served == "mooncake"
    prefill_tokens = experts.prefill_tokens or (256 if upstream else 1024)
    tokens = prefill_tokens if role == "prefill" else experts.decode_requests
    mode = "low_latency" if upstream or role == "decode" else "normal"
    requests = experts.decode_requests * ranks
    flags = [*settings.release.attention_data_parallel(ranks), "--moe-a2a-backend", "mooncake", "--deepep-mode", mode]
    flags += ["--moe-dense-tp-size", "1", "--enable-dp-lm-head"]
    # SGLang divides both by the ranks. A decode server prefills nothing, so its chunk is what a decode step brings.
    flags += ["--chunked-prefill-size", str(tokens * ranks), "--max-running-requests", str(requests)]
    if role == "decode":
        flags += ["--cuda-graph-max-bs-decode", str(experts.decode_requests)]
    if experts.two_batch_overlap:
        flags.append("--enable-two-batch-overlap")
    if experts.elastic or redundant:
        flags += ["--enable-eplb", "--ep-num-redundant-experts", str(redundant)]
    if experts.elastic:
        flags += ["--elastic-ep-backend", "mooncake"]
    elif upstream:
        # Its dispatcher needs the flag; the word makes no elastic group.
        flags += ["--elastic-ep-backend", "none"]
    env = {"MOE_A2A_SGLANG": "0", UPSTREAM_LIMIT: str(max(tokens, 128))} if upstream else {}
    if upstream and settings.ib_devices is not None:
        flags += ["--mooncake-ib-device", settings.ib_devices]
    if upstream and settings.transfer == "mooncake_tcp":
        env["MOONCAKE_PROTOCOL"] = "tcp"
    if not upstream:
        rules.check_sizes(settings.model, role, ranks, tokens, requests, redundant, mode, experts.two_batch_overlap)
    return _Role(Kind(role, tuple(flags), env, data_parallel_attention=True), redundant, tokens)


def _describe(page: Page, experts: Experts, served: Served, roles: Sequence[_Role]) -> None:
    page.what(
        "Each server is an EP group of its own: its GPUs share the experts, and tokens go from GPU to GPU at every "
        "expert layer. Between prefill and decode servers only the KV cache of a request crosses; no expert row ever "
        "does. Attention is data parallel: each GPU has its own requests and their KV cache, so weights of attention, "
        "dense layers and embeddings are on every GPU."
    )
    prefill, decode = roles
    if served == "moe-a2a":
        page.what(
            "`--moe-a2a-backend mooncake` runs on moe-a2a, which must be installed beside SGLang. A prefill step has "
            f"up to {prefill.tokens} tokens of each GPU, in the contiguous layout; a decode step up to {decode.tokens} "
            "requests of each, in the masked layout and in CUDA graphs. The log of every scheduler says `serves "
            "--moe-a2a-backend mooncake`; a server that cannot ends with the reason."
        )
    else:
        page.what(
            "`--moe-a2a-backend mooncake` runs on Mooncake's own EP (`MOE_A2A_SGLANG=0` leaves it to that), which "
            f"takes `low_latency` only. A prefill step has up to {prefill.tokens} tokens of each GPU, a decode step up "
            f"to {decode.tokens}; `{UPSTREAM_LIMIT}` says so, and its buffers grow with it."
        )
    room = f", room for every expert without {experts.survive or 1} of its ranks" if experts.elastic else ""
    if any(role.redundant for role in roles):
        counts = " and ".join(f"{role.redundant} on each {role.kind.role} server" for role in roles)
        page.what(f"There are redundant experts: {counts}{room}.")
    if experts.elastic:
        page.what(_elastic_text(served))
    page.transfer()


def _elastic_text(served: Served) -> str:
    upstream = (
        "In SGLang's own flow a forward pass notices a lost rank, experts are placed anew over those that are left, "
        "the weights of experts that had no other replica are read from the model's files, and the pass is run again. "
        "A rank comes back with `--elastic-ep-join-mode recover`. Growing needs `--moe-a2a-backend nixl` in these "
        "releases."
    )
    if served == "moe-a2a":
        return f"**Elastic EP** is served by moe-a2a. {upstream}"
    return (
        "**Elastic EP** is served by Mooncake's own EP and process groups here: moe-a2a does not take "
        f"`--elastic-ep-backend mooncake` yet, and stops a server that asks for both. {upstream} Tried on 2 GPUs with "
        "SGLang 0.5.17, such a server made its process groups and did not get through the capture of its CUDA graphs "
        "in the 90 seconds that it was given: try it before you count on it."
    )


def _warnings(experts: Experts, served: Served) -> tuple[str, ...]:
    if served == "moe-a2a":
        return ("Install moe-a2a beside SGLang on every host: without it the flag is Mooncake's own EP.",)
    if experts.elastic and experts.served_by is None:
        return ("--elastic: moe-a2a does not serve elastic EP yet, so the servers use Mooncake's own EP.",)
    return ()
