"""What a user asks of expert parallelism, and whether it can be: rules, and the plug-in's own checks beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from moe_a2a import placement
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.memory import GIB, Share
from moe_a2a.recipes.models import EP_ARCHITECTURES, Model
from moe_a2a.recipes.plan import RecipeError
from moe_a2a.sglang_plugin import flags as plugin
from moe_a2a.sglang_plugin.limits import FlagError, limits_from_server_args

#: Mooncake's own EP has one size for prefill and decode, in this variable, up to this many tokens of a rank.
UPSTREAM_LIMIT = plugin.UPSTREAM_LIMIT
UPSTREAM_MOST = 1024

#: Requests that one rank decodes at a time, where nobody says how many.
DECODE_REQUESTS = 128

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
    decode_requests: int = DECODE_REQUESTS
    two_batch_overlap: bool = False


def check_model(model: Model) -> None:
    """It has experts, and SGLang's code for it knows the flag. Raises RecipeError."""
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


def served_by(experts: Experts, groups: Sequence[Group]) -> Served:
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


def check_wishes(experts: Experts, served: Served) -> None:
    """Options against one another. Raises RecipeError."""
    if experts.survive is not None and not experts.elastic:
        raise RecipeError(
            f"--survive {experts.survive} without --elastic: a lost rank ends the server whatever its experts; give "
            "both, or --redundant-experts for balance"
        )
    if experts.elastic and experts.redundant is not None:
        raise RecipeError(
            f"--redundant-experts {experts.redundant} with --elastic: --survive decides how many there are; leave the "
            "first out"
        )
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


def one_size(role: str, groups: Sequence[Group]) -> int:
    """GPUs of each of a role's servers. Raises RecipeError."""
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


def redundant(role: str, model: Model, ranks: int, experts: Experts) -> int:
    """Redundant experts of a server. Raises RecipeError."""
    if experts.elastic:
        failures = experts.survive or 1
        if failures >= ranks:
            raise RecipeError(
                f"--survive {failures}: a {role} server has {ranks} ranks, one of which must be left; give fewer"
            )
        return placement.redundant_experts(model.experts, ranks, failures)
    redundant = experts.redundant or 0
    if redundant < 0 or (model.experts + redundant) % ranks:
        fitting = -model.experts % ranks
        raise RecipeError(
            f"--redundant-experts {redundant}: {model.experts} experts and these cannot be shared evenly by the "
            f"{ranks} GPUs of a {role} server; give {fitting} or {fitting + ranks}"
        )
    return redundant


def check_rows(model: Model, role: str, tokens: int, share: Share) -> None:
    """The rows of a step fit beside the weights, counting what no implementation is without. Raises RecipeError.

    With equal loads a rank's experts have `tokens` rows for each choice of a token, a byte a column that goes in and
    two that come out; its own tokens are there in bf16, twice (the residual stream).
    """
    columns = tokens * model.size("hidden_size")
    least = columns * 3 * model.size("num_experts_per_tok") + columns * 4
    if share.weights + least > share.memory:
        option = "--prefill-tokens" if role == "prefill" else "--decode-requests"
        raise RecipeError(
            f"{option} {tokens}: a step's rows take {least / GIB:.0f} GiB of a GPU or more, beside {share.text} for "
            "weights; give fewer"
        )


def check_sizes(
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
    sizes = plugin.ModelSizes(model.experts, model.size("hidden_size"), model.size("num_experts_per_tok"))
    try:
        plugin.check_resolved(args, limits_from_server_args(args), sizes)
    except FlagError as error:
        raise RecipeError(f"the {role} servers would not start: {error}") from error
