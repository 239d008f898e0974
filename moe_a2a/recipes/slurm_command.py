"""`moe-a2a recipe slurm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moe_a2a.recipes import ep, models, options, releases, slurm
from moe_a2a.recipes.experts import DECODE_REQUESTS
from moe_a2a.recipes.plan import RecipeError
from moe_a2a.recipes.servers import Policy, Ports, Settings
from moe_a2a.recipes.write import write_files


@click.command("slurm", cls=options.Once)
@options.RELEASE
@click.option(
    "--model", "names", multiple=True, required=True, help="MODEL_NAME chooses one; the first is the default."
)
@options.CONFIG
@options.MACHINE
@click.option("--gpus", type=click.IntRange(1), help="Of a server, one a node; the model's usual number if not given.")
@click.option("--ep", "served_by", type=click.Choice(["moe-a2a", "mooncake"]), help="Share experts; NVIDIA GPUs only.")
@options.STEPS
@options.KV
@options.EXTRA
@options.ROUTER
@click.option("--partition", help="For #SBATCH.")
@click.option("--account", help="For #SBATCH.")
@click.option("--time", default="24:00:00", show_default=True, help="For #SBATCH: how long a job may last.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that is new or empty.")
def slurm_command(**given: Any) -> None:
    """Prefill and decode on the nodes of a Slurm job: batch script, Dockerfile, and a sweep of SGLang's benchmark.

    How many nodes of each (xP, yD) is said when the job is submitted; the README.md that is written says how.
    """
    out: Path = given["out"]
    try:
        written = write_files(slurm.render(_job(given)), out)
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {', '.join(written)}")


def _job(given: dict[str, Any]) -> slurm.Job:
    """What the options ask for. Raises RecipeError."""
    names, config = given["names"], given["config"]
    if config is not None and len(names) > 1:
        raise RecipeError(f"--config {config} with {len(names)} models: it is of one; render a recipe for each")
    release = releases.release(given["version"])
    extra = options.split(given["flags"])
    return slurm.Job(
        settings=tuple(
            Settings(release, models.load(name, config), given["transfer"], modelscope=given["modelscope"], extra=extra)
            for name in names
        ),
        ib_devices=given["ib_devices"],
        gpus=given["gpus"],
        gpus_per_node=given["gpus_per_node"],
        gpu=given["gpu"],
        experts=_experts(given),
        given=Ports(router=given["router_port"]),
        policy=Policy(given["prefill_policy"], given["decode_policy"]),
        sbatch=tuple((name, given[name]) for name in ("partition", "account", "time") if given[name] is not None),
    )


def _experts(given: dict[str, Any]) -> ep.Experts | None:
    """What is asked of expert parallelism, if it is. Raises RecipeError."""
    tokens, requests = given["prefill_tokens"], given["decode_requests"]
    if given["served_by"] is not None:
        return ep.Experts(given["served_by"], prefill_tokens=tokens, decode_requests=requests or DECODE_REQUESTS)
    for option, value in (("--prefill-tokens", tokens), ("--decode-requests", requests)):
        if value is not None:
            raise RecipeError(f"{option} {value} without --ep: it is of expert parallelism; give both or neither")
    return None
