"""`moe-a2a recipe slurm`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from moe_a2a.recipes import ep, hosts, models, releases, servers, slurm
from moe_a2a.recipes.plan import HostGpus, RecipeError
from moe_a2a.recipes.servers import Policy, Ports, Settings
from moe_a2a.recipes.write import write_files


@click.command("slurm")
@click.option("--sglang", "version", required=True, help="SGLang's release, 0.5.17 to 0.5.23.")
@click.option(
    "--model", "names", multiple=True, required=True, help="MODEL_NAME chooses one; the first is the default."
)
@click.option("--config", help="The model's config.json, for a model that is not known by name.")
@click.option("--gpu", default="h200", show_default=True, help="Which GPUs: a name, or the GiB of their memory.")
@click.option("--gpus-per-node", default=8, show_default=True, type=click.IntRange(1, 64))
@click.option("--gpus", type=click.IntRange(1), help="Of a server, one a node; the model's usual number if not given.")
@click.option("--ep", "served_by", type=click.Choice(["moe-a2a", "mooncake"]), help="Share experts; NVIDIA GPUs only.")
@click.option("--prefill-tokens", type=int, help="With --ep: tokens of a prefill step of one GPU.")
@click.option(
    "--decode-requests", default=128, show_default=True, type=click.IntRange(1), help="With --ep: of one GPU."
)
@click.option("--transfer", default="mooncake", show_default=True, type=click.Choice(servers.TRANSFERS))
@click.option("--ib-devices", default="auto", show_default=True, help="auto, a list, a JSON map from GPU, or a file.")
@click.option("--modelscope", is_flag=True, help="Take the model from ModelScope (SGLANG_USE_MODELSCOPE=1).")
@click.option("--flags", default="", help="More flags for every server, as one string; they are not checked.")
@click.option("--port", "router_port", default=8000, show_default=True, type=click.IntRange(1024, 65535))
@click.option("--prefill-policy", default="cache_aware", show_default=True, type=click.Choice(servers.POLICIES))
@click.option("--decode-policy", default="round_robin", show_default=True, type=click.Choice(servers.POLICIES))
@click.option("--partition", help="For #SBATCH.")
@click.option("--account", help="For #SBATCH.")
@click.option("--time", "limit", default="24:00:00", show_default=True, help="For #SBATCH: how long a job may last.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that is new or empty.")
def slurm_command(
    version: str,
    names: tuple[str, ...],
    config: str | None,
    gpu: str,
    gpus_per_node: int,
    gpus: int | None,
    served_by: ep.Served | None,
    prefill_tokens: int | None,
    decode_requests: int,
    transfer: str,
    ib_devices: str,
    modelscope: bool,
    flags: str,
    router_port: int,
    prefill_policy: str,
    decode_policy: str,
    partition: str | None,
    account: str | None,
    limit: str,
    out: Path,
) -> None:
    """Prefill and decode on the nodes of a Slurm job: batch script, Dockerfile, and a sweep of SGLang's benchmark.

    How many nodes of each (xP, yD) is said when the job is submitted; the README.md that is written says how.
    """
    try:
        if config is not None and len(names) > 1:
            raise RecipeError(f"--config {config} with {len(names)} models: it is of one; render a recipe for each")
        release = releases.release(version)
        widest = HostGpus("node", gpus or gpus_per_node)
        devices = hosts.ib_devices(ib_devices, [widest])
        extra = tuple(_split(flags))
        settings = tuple(
            Settings(release, models.load(name, config), transfer, devices, modelscope, extra) for name in names
        )
        experts = None
        if served_by is not None:
            experts = ep.Experts(served_by, prefill_tokens=prefill_tokens, decode_requests=decode_requests)
        given = (("partition", partition), ("account", account), ("time", limit))
        job = slurm.Job(
            settings=settings,
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            gpu=gpu,
            experts=experts,
            given=Ports(router=router_port),
            policy=Policy(prefill_policy, decode_policy),
            sbatch=tuple((name, value) for name, value in given if value is not None),
        )
        written = write_files(slurm.render(job), out)
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {', '.join(written)}")


def _split(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise RecipeError(f"--flags {flags!r}: {error}; quote it as a shell would") from error
