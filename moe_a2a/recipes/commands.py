"""`moe-a2a recipe`: from hosts and a model to files that start SGLang."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from moe_a2a.recipes import ep, epd, hosts, memory, models, options, pd, releases
from moe_a2a.recipes.experts import DECODE_REQUESTS, Experts
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.options import KV, Once
from moe_a2a.recipes.plan import Plan, RecipeError, Role
from moe_a2a.recipes.servers import Policy, Ports, Settings
from moe_a2a.recipes.slurm_command import slurm_command
from moe_a2a.recipes.write import FORMATS, write


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def recipe() -> None:
    """Write launch scripts for SGLang: your hosts, your model, flags that the release knows.

    docs/recipes.md says which recipe is for what.
    """


recipe.add_command(slurm_command)

_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]*")

COMMON = options.options(
    options.RELEASE,
    click.option("--model", required=True, help="A name on a hub, or a folder that every host has."),
    options.CONFIG,
    options.MACHINE,
    options.EXTRA,
)
GATE = options.options(
    options.ROUTER,
    click.option("--prefill-port", multiple=True, type=int, help="Once for all prefill servers, or once for each."),
    click.option("--decode-port", multiple=True, type=int, help="The same for decode servers."),
    click.option("--bootstrap-port", multiple=True, type=int, help="Where prefill servers meet decode servers."),
)
PLACES = options.options(
    click.option(
        "--prefill", multiple=True, required=True, metavar="HOST[:GPUS]", help="A server; with commas, its hosts."
    ),
    click.option("--decode", multiple=True, required=True, metavar="HOST[:GPUS]", help="The same."),
    click.option("--router", metavar="HOST", help="Where the router runs; the first prefill host if it is not given."),
)
OUT = options.options(
    click.option("--format", "form", default="shell", show_default=True, type=click.Choice(list(FORMATS))),
    click.option("--image", help="The container image, for compose."),
    click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that is new or empty."),
)


def run(make: Callable[[], Plan], form: str, out: Path) -> None:
    """Write what `make` returns, or end with what it cannot do."""
    try:
        plan = make()
        names = write(plan, form, out)
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    for warning in plan.warnings:
        click.echo(f"note: {warning}", err=True)
    click.echo(f"{out}: {', '.join(names)}")


def settings_of(given: dict[str, Any], groups: Sequence[Group]) -> Settings:
    """What servers share, from the options of COMMON and KV."""
    places = [place for one in groups for place in one.places]
    return Settings(
        release=releases.release(given["version"]),
        model=models.load(given["model"], given["config"]),
        transfer=given["transfer"],
        ib_devices=hosts.ib_devices(given["ib_devices"], places),
        modelscope=given["modelscope"],
        extra=options.split(given["flags"]),
        given_image=_image(given),
    )


def _image(given: dict[str, Any]) -> str | None:
    """--image, which containers have. Raises RecipeError."""
    image: str | None = given["image"]
    if image is None:
        return None
    if given["form"] != "compose":
        raise RecipeError(f"--image {image} with --format {given['form']}: only containers have one; leave it out")
    if not _IMAGE.fullmatch(image):
        raise RecipeError(f"--image {image!r} is not the name of an image, such as lmsysorg/sglang:v0.5.20")
    return image


def ports_of(given: dict[str, Any]) -> Ports:
    """From the options of GATE, and --encode-port."""
    roles: tuple[Role, ...] = ("prefill", "decode", "encode")
    http = {role: given.get(f"{role}_port", ()) for role in roles}
    return Ports(http=http, bootstrap=given["bootstrap_port"], router=given["router_port"])


def groups_of(given: dict[str, Any], *roles: str) -> list[list[Group]]:
    """The servers of each role, from the options of PLACES. GPUs that are not given are the model's usual number."""
    model = models.load(given["model"], given["config"])
    usual = min(model.gpus or given["gpus_per_node"], given["gpus_per_node"])
    found = [
        [hosts.group(f"--{role}", text, 1 if role == "encode" else usual) for text in given[role]] for role in roles
    ]
    hosts.check_groups([one for groups in found for one in groups], given["gpus_per_node"])
    return found


def policy_of(given: dict[str, Any]) -> Policy:
    return Policy(given["prefill_policy"], given["decode_policy"])


def gpu_memory_of(given: dict[str, Any], kernels: bool = False) -> float:
    """GiB of --gpu. kernels: whether the recipe runs this package's, which are for NVIDIA GPUs. Raises RecipeError."""
    gib, maker = memory.gpu_memory(given["gpu"])
    if maker == "amd" and kernels:
        raise RecipeError(
            f"--gpu {given['gpu']}: moe-a2a's --moe-a2a-backend mooncake is for NVIDIA GPUs; use `moe-a2a recipe pd`, "
            "which needs none of it"
        )
    if maker == "amd" and given["form"] == "compose":
        raise RecipeError(
            f"--gpu {given['gpu']} with --format compose: they hand out GPUs through NVIDIA's container toolkit; "
            "use --format shell inside containers of yours"
        )
    return gib


def router_host(given: dict[str, Any], groups: Sequence[Group]) -> str:
    """The host of --router, or the first of `groups`' without it."""
    text = given["router"]
    host = hosts.check_host("--router", text) if text is not None else groups[0].places[0].host
    hosts.check_router(host, groups)
    return host


@recipe.command("pd-single", cls=Once)
@COMMON
@click.option("--host", default="127.0.0.1", show_default=True, help="The machine's address, for all servers.")
@click.option("--tp", type=click.IntRange(1), help="GPUs of each server; the model's usual number if not given.")
@click.option("--prefill-servers", default=1, show_default=True, type=click.IntRange(1))
@click.option("--decode-servers", default=1, show_default=True, type=click.IntRange(1))
@KV
@GATE
@OUT
def pd_single(**given: Any) -> None:
    """Prefill and decode servers on the GPUs of one machine."""

    def make() -> Plan:
        host = hosts.check_host("--host", given["host"])
        model = models.load(given["model"], given["config"])
        tp = given["tp"] or model.gpus or 1
        prefills, decodes = given["prefill_servers"], given["decode_servers"]
        if tp * (prefills + decodes) > given["gpus_per_node"]:
            raise RecipeError(
                f"--prefill-servers {prefills} and --decode-servers {decodes} with {tp} GPUs each (--tp) need "
                f"{tp * (prefills + decodes)} GPUs; the machine has {given['gpus_per_node']} (--gpus-per-node)"
            )
        name = f"[{host}]" if ":" in host else host
        places = [f"{name}:{first}-{first + tp - 1}" for first in range(0, tp * (prefills + decodes), tp)]
        groups = [hosts.group("--tp", text, tp) for text in places]
        settings = settings_of(given, groups)
        return pd.plan(
            "pd-single",
            settings,
            groups[:prefills],
            groups[prefills:],
            host,
            gpu_memory_of(given),
            ports_of(given),
            policy_of(given),
        )

    run(make, given["form"], given["out"])


@recipe.command("pd", cls=Once)
@COMMON
@PLACES
@KV
@GATE
@OUT
def pd_command(**given: Any) -> None:
    """Prefill and decode servers on several machines."""

    def make() -> Plan:
        prefill, decode = groups_of(given, "prefill", "decode")
        return pd.plan(
            "pd",
            settings_of(given, [*prefill, *decode]),
            prefill,
            decode,
            router_host(given, [*prefill, *decode]),
            gpu_memory_of(given),
            ports_of(given),
            policy_of(given),
        )

    run(make, given["form"], given["out"])


@recipe.command("ep", cls=Once)
@COMMON
@PLACES
@click.option("--ep", "served_by", type=click.Choice(["moe-a2a", "mooncake"]), help="Whose EP; moe-a2a if it can.")
@click.option("--elastic", is_flag=True, help="Go on without lost ranks. The page that is written says what serves it.")
@click.option("--survive", type=int, help="Failures to have room for, with --elastic; 1 if not given.")
@click.option("--redundant-experts", type=int, help="Redundant experts for balance, without --elastic.")
@options.STEPS
@click.option("--two-batch-overlap", is_flag=True, help="Communicate while the other half of a batch computes.")
@KV
@GATE
@OUT
def ep_command(**given: Any) -> None:
    """DeepSeek-V3 and its kin with expert parallelism, on several machines."""

    def make() -> Plan:
        prefill, decode = groups_of(given, "prefill", "decode")
        return ep.plan(
            settings_of(given, [*prefill, *decode]),
            prefill,
            decode,
            router_host(given, [*prefill, *decode]),
            gpu_memory_of(given, kernels=True),
            ports_of(given),
            policy_of(given),
            Experts(
                served_by=given["served_by"],
                elastic=given["elastic"],
                survive=given["survive"],
                redundant=given["redundant_experts"],
                prefill_tokens=given["prefill_tokens"],
                decode_requests=given["decode_requests"] or DECODE_REQUESTS,
                two_batch_overlap=given["two_batch_overlap"],
            ),
        )

    run(make, given["form"], given["out"])


@recipe.command("epd", cls=Once)
@COMMON
@click.option("--encode", multiple=True, required=True, metavar="HOST[:GPUS]", help="An encoder; 1 GPU if not given.")
@PLACES
@click.option("--encode-port", multiple=True, type=int, help="Once for all encoders, or once for each.")
@click.option(
    "--encoder-transfer",
    default="zmq_to_scheduler",
    show_default=True,
    type=click.Choice(epd.ENCODER_TRANSFERS),
    help="The embeddings' way.",
)
@KV
@GATE
@OUT
def epd_command(**given: Any) -> None:
    """Encoders, prefill and decode servers of a vision-language model, on several machines."""

    def make() -> Plan:
        encode, prefill, decode = groups_of(given, "encode", "prefill", "decode")
        return epd.plan(
            settings_of(given, [*encode, *prefill, *decode]),
            encode,
            prefill,
            decode,
            router_host(given, [*prefill, *decode]),
            gpu_memory_of(given),
            ports_of(given),
            policy_of(given),
            given["encoder_transfer"],
        )

    run(make, given["form"], given["out"])
