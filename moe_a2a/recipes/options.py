"""Options that several recipes have, and how commands read them."""

from __future__ import annotations

import functools
import shlex
from collections import Counter
from collections.abc import Callable

import click

from moe_a2a.recipes import ports, servers
from moe_a2a.recipes.plan import RecipeError

Command = Callable[..., None]

#: Flags that --flags cannot have: a server would be elsewhere, or another, than the rest of the recipe says.
_PLACED = {
    *("--host", "--port", "--model", "--model-path", "--tp", "--tp-size", "--dp", "--dp-size", "--attn-dp-size"),
    *("--nnodes", "--node-rank", "--dist-init-addr", "--base-gpu-id", "--moe-a2a-backend", "--elastic-ep-backend"),
    *("--disaggregation-mode", "--disaggregation-bootstrap-port", "--disaggregation-transfer-backend"),
}


class Once(click.Command):
    """A command that refuses an option given twice, where the last one would win in silence."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(order).items():
            if times > 1 and not getattr(option, "multiple", False):
                raise click.UsageError(f"{option.opts[0]} is given {times} times; give it once", ctx)
        return super().parse_args(ctx, args)


def options(*wanted: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Options in the order in which --help is to show them."""

    def add(command: Command) -> Command:
        return functools.reduce(lambda inner, option: option(inner), reversed(wanted), command)

    return add


RELEASE = click.option("--sglang", "version", required=True, help="SGLang's release, 0.5.17 to 0.5.23.")
CONFIG = click.option("--config", help="The model's config.json, for models that are not known by name.")
MACHINE = options(
    click.option("--gpu", default="h200", show_default=True, help="Which GPUs: a name, or the GiB of their memory."),
    click.option("--gpus-per-node", default=8, show_default=True, type=click.IntRange(1, 64)),
)
EXTRA = options(
    click.option("--modelscope", is_flag=True, help="Take the model from ModelScope (SGLANG_USE_MODELSCOPE=true)."),
    click.option("--flags", default="", help="More flags for every server, as one string; SGLang checks them."),
)
KV = options(
    click.option(
        "--transfer",
        default="mooncake",
        show_default=True,
        type=click.Choice(servers.TRANSFERS),
        help="The KV cache's way.",
    ),
    click.option(
        "--ib-devices",
        default="auto",
        show_default=True,
        help="RDMA devices: auto, a list, a JSON map from GPU, or a file.",
    ),
)
STEPS = options(
    click.option("--prefill-tokens", type=int, help="Tokens of a prefill step of one GPU: 1024, or 256 with Mooncake."),
    click.option("--decode-requests", type=click.IntRange(1), help="Of one GPU at a time; 128 if not given."),
)
ROUTER = options(
    click.option("--port", "router_port", default=ports.ROUTER, show_default=True, type=click.IntRange(1024, 65535)),
    click.option("--prefill-policy", default="cache_aware", show_default=True, type=click.Choice(servers.POLICIES)),
    click.option("--decode-policy", default="round_robin", show_default=True, type=click.Choice(servers.POLICIES)),
)


def split(flags: str) -> tuple[str, ...]:
    """The words of --flags. Raises RecipeError."""
    try:
        words = tuple(shlex.split(flags))
    except ValueError as error:
        raise RecipeError(f"--flags {flags!r}: {error}; quote it as a shell would") from error
    for word in words:
        if word.partition("=")[0] in _PLACED:
            raise RecipeError(
                f"--flags {flags!r}: the recipe gives each server its own {word.partition('=')[0]}, and the check, the "
                "router and other servers count on it; use the recipe's options"
            )
    return words
