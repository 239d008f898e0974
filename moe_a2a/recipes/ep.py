"""DeepSeek-V3 and its kin with expert parallelism: prefill and decode apart, each server an EP group of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from moe_a2a import placement
from moe_a2a.recipes import memory, ports, servers
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.models import EP_ARCHITECTURES, Model
from moe_a2a.recipes.plan import Plan, RecipeError, Role, Server
from moe_a2a.recipes.servers import Kind, Policy, Ports, Settings
from moe_a2a.recipes.text import Page
from moe_a2a.sglang_plugin import flags as plugin
from moe_a2a.sglang_plugin.limits import FlagError, limits_from_server_args

#: Mooncake's own EP has one size for prefill and decode, in this variable, up to this many tokens of a rank.
UPSTREAM_LIMIT = plugin.UPSTREAM_LIMIT
UPSTREAM_MOST = 1024

#: Which code serves --moe-a2a-backend mooncake: this package, or Mooncake's own EP.
Served = Literal["moe-a2a", "mooncake"]


@dataclass(frozen=True)
class Experts:
    """What a user asks of expert parallelism.

    served_by: None chooses this package if it can.
    elastic, survive: going on without lost ranks, and how many at once.
    redundant: redundant experts for balance alone, in place of those that `survive` needs.
    prefill_tokens: of a prefill step of one rank; None: 1024, or 256 with Mooncake's own EP, whose buffers grow faster.
    decode_requests: that one rank decodes at a time, all of them in CUDA graphs.
    """

    served_by: Served | None = None
    elastic: bool = False
    survive: int | None = None
    redundant: int | None = None
    prefill_tokens: int | None = None
    decode_requests: int = 128
    two_batch_overlap: bool = False


@dataclass(frozen=True)
class _Role:
    """One role's servers, worked out."""

    kind: Kind
    redundant: int
    tokens: int


def elastic_is_served() -> bool:
    """Whether the plug-in of this package takes --elastic-ep-backend mooncake."""
    try:
        plugin.check_request(_request("mooncake", nodes=1))
    except FlagError:
        return False
    return True


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
    _check_model(model)
    served = _served_by(experts, (*prefill, *decode))
    _check_wishes(experts, served)
    found: tuple[Server, ...] = ()
    page = Page(settings)
    roles: list[_Role] = []
    wanted: tuple[tuple[Role, Sequence[Group]], ...] = (("prefill", prefill), ("decode", decode))
    for role, groups in wanted:
        ranks = _one_size(role, groups)
        worked = _role(settings, role, ranks, experts, served)
        share = memory.share(model, ranks, gpu_memory_gib, expert_parallel=True, redundant=worked.redundant)
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
        image=settings.given_image
        or (f"sglang-moe-a2a:v{settings.release.version}" if served == "moe-a2a" else settings.image),
        rdma=settings.transfer != "mooncake_tcp",
    )


def _check_model(model: Model) -> None:
    if not model.experts:
        raise RecipeError(f"--model {model.path}: has no experts; use `moe-a2a recipe pd`")
    if model.architecture not in EP_ARCHITECTURES:
        raise RecipeError(
            f"--model {model.path}: SGLang's code for {model.architecture} does not know --moe-a2a-backend mooncake, "
            f"only {', '.join(EP_ARCHITECTURES)} do in all releases; use `moe-a2a recipe pd`, with tensor parallelism"
        )


def _request(elastic: str | None, nodes: int) -> SimpleNamespace:
    """What the plug-in checks first."""
    return SimpleNamespace(
        elastic_ep_backend=elastic, device="", nnodes=nodes, pp_size=1, mooncake_ib_device=None, use_ray=False
    )


def _served_by(experts: Experts, groups: Sequence[Group]) -> Served:
    """Who serves the experts: this package if it can, or who the user names. Raises RecipeError."""
    elastic = "mooncake" if experts.elastic else None
    try:
        for one in groups:
            plugin.check_request(_request(elastic, len(one.places)))
    except FlagError as error:
        # Mooncake's own EP is not chosen in silence for servers of several hosts: it has other limits.
        if experts.served_by == "moe-a2a" or (experts.served_by is None and not experts.elastic):
            raise RecipeError(
                f"{one.option} {one.text}: moe-a2a would refuse it ({error}). Give --ep mooncake, or one host a server "
                "and no --elastic"
            ) from error
        return "mooncake"
    return experts.served_by or "moe-a2a"


def _check_wishes(experts: Experts, served: Served) -> None:
    if experts.survive is not None and not experts.elastic:
        raise RecipeError(
            f"--survive {experts.survive} without --elastic: a lost rank ends the server whatever its experts; give "
            "both, or --redundant-experts for balance"
        )
    if experts.survive is not None and experts.redundant is not None:
        raise RecipeError("--survive and --redundant-experts: the first decides the second; give one of them")
    if experts.survive is not None and experts.survive < 1:
        raise RecipeError(f"--survive {experts.survive}: give 1 or more failures, or leave --elastic out")
    tokens = experts.prefill_tokens
    if tokens is not None and (tokens < 64 or tokens % 64):
        raise RecipeError(f"--prefill-tokens {tokens}: give a multiple of 64, since SGLang's chunks are whole pages")
    if served == "mooncake":
        for option, value in (("--prefill-tokens", tokens), ("--decode-requests", experts.decode_requests)):
            if value is not None and value > UPSTREAM_MOST:
                raise RecipeError(
                    f"{option} {value}: Mooncake's own EP takes at most {UPSTREAM_MOST} tokens of a rank; give fewer"
                )
        if experts.two_batch_overlap:
            raise RecipeError("--two-batch-overlap with --ep mooncake: not tried; leave one of the two out")


def _one_size(role: str, groups: Sequence[Group]) -> int:
    sizes = {one.gpus for one in groups}
    if len(sizes) > 1:
        raise RecipeError(
            f"--{role}: servers with {' and '.join(map(str, sorted(sizes)))} GPUs; give all of a role the same number"
        )
    (size,) = sizes
    if size < 2:
        raise RecipeError(
            f"--{role} {groups[0].text}: one GPU has no one to share experts with; give a server 2 or more"
        )
    return size


def _redundant(role: str, model: Model, ranks: int, experts: Experts) -> int:
    """Redundant experts of a server. Raises RecipeError."""
    if experts.elastic:
        failures = experts.survive or 1
        if failures >= ranks:
            raise RecipeError(f"--survive {failures}: a {role} server has {ranks} ranks, one of which must be left")
        return placement.redundant_experts(model.experts, ranks, failures)
    redundant = experts.redundant or 0
    if redundant < 0 or (model.experts + redundant) % ranks:
        fitting = -model.experts % ranks
        raise RecipeError(
            f"--redundant-experts {redundant}: {model.experts} experts and these cannot be shared evenly by the "
            f"{ranks} GPUs of a {role} server; give {fitting} or {fitting + ranks}"
        )
    return redundant


def _role(settings: Settings, role: Role, ranks: int, experts: Experts, served: Served) -> _Role:
    redundant = _redundant(role, settings.model, ranks, experts)
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
        _check_sizes(settings.model, role, ranks, tokens, requests, redundant, mode, experts.two_batch_overlap)
    return _Role(Kind(role, tuple(flags), env, data_parallel_attention=True), redundant, tokens)


def _check_sizes(
    model: Model, role: str, ranks: int, tokens: int, requests: int, redundant: int, mode: str, overlap: bool
) -> None:
    """What the plug-in will check when the server starts. Raises RecipeError."""
    args: Any = SimpleNamespace(
        tp_size=ranks,
        dp_size=ranks,
        pp_size=1,
        ep_size=ranks,
        enable_dp_attention=True,
        deepep_mode=mode,
        chunked_prefill_size=tokens,
        max_prefill_tokens=None,
        max_running_requests=requests,
        enable_mixed_chunk=False,
        enable_dynamic_chunking=False,
        enable_two_batch_overlap=overlap,
        speculative_algorithm=None,
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend="disabled")),
        ep_num_redundant_experts=redundant,
    )
    sizes = plugin.ModelSizes(model.experts, model.size("hidden_size"), model.first("num_experts_per_tok", default=1))
    try:
        plugin.check_resolved(args, limits_from_server_args(args), sizes)
    except FlagError as error:
        raise RecipeError(f"the {role} servers would not start: {error}") from error


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
    if any(role.redundant for role in roles):
        for role in roles:
            page.what(
                f"Each {role.kind.role} server has {role.redundant} redundant experts"
                + (
                    f", so that it has room for every expert without {experts.survive or 1} of its ranks."
                    if experts.elastic
                    else "."
                )
            )
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
