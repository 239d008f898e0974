"""A Slurm batch script for xP prefill nodes, yD decode nodes and a proxy, with what goes into the containers' image.

The scripts are files of their own, in slurm_files; this renders what they read: settings.sh, with the command lines for
each model. Hosts are known only when a job runs, so that commands are planned for place holders.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_a2a.recipes import ep, hosts, memory, pd, quoting, servers
from moe_a2a.recipes.dockerfile import dockerfile
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.models import Model
from moe_a2a.recipes.plan import HostGpus, Plan, RecipeError, Server
from moe_a2a.recipes.servers import Policy, Ports, Settings
from moe_a2a.recipes.slurm_text import readme

_FILES = Path(__file__).with_name("slurm_files")
BATCH = "run_xPyD_models.slurm"
NODE = "pd_sglang_bench_serving.sh"
_HOST = "node.invalid"
_PROXY = "proxy.invalid"
_MODEL = "/model.invalid"
#: Place holder -> the variable that has the value on a node.
_VARIABLES = {_HOST: "ADDRESS", _PROXY: "ADDRESS", _MODEL: "MODEL_PATH"}
_SBATCH = re.compile(r"[A-Za-z0-9_.,:=@%+/-]+")
_TIME = re.compile(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|UNLIMITED", re.IGNORECASE)
#: Ports of etcd on the proxy node, as the node script says.
_ETCD = (2379, 2380)

#: What containers of servers are given, by the maker of the GPUs.
_DEVICES = {
    "nvidia": ("--gpus", "all"),
    "amd": ("--device", "/dev/kfd", "--device", "/dev/dri", "--group-add", "video", "--cap-add", "SYS_PTRACE"),
}
_RDMA = ("--device", "/dev/infiniband", "--cap-add", "IPC_LOCK")


@dataclass(frozen=True)
class Job:
    """What is asked for.

    settings: one for each model, the default first; they differ in the model only.
    ib_devices: --ib-devices, as given.
    gpus: of a server, one server a node; None takes each model's usual number.
    gpu: --gpu. experts: with expert parallelism, or None for tensor parallelism.
    sbatch: more #SBATCH options, such as partition and time, by name.
    """

    settings: tuple[Settings, ...]
    ib_devices: str
    gpus: int | None
    gpus_per_node: int
    gpu: str
    experts: ep.Experts | None
    given: Ports
    policy: Policy
    sbatch: tuple[tuple[str, str], ...] = ()

    @property
    def maker(self) -> str:
        return memory.gpu_memory(self.gpu)[1]

    @property
    def served(self) -> str | None:
        """Who serves experts; None for tensor parallelism."""
        return (self.experts.served_by or "moe-a2a") if self.experts else None

    def gpus_of(self, settings: Settings) -> int:
        usual = min(settings.model.gpus or self.gpus_per_node, self.gpus_per_node)
        return self.gpus_per_node if self.experts and not self.gpus else self.gpus or usual


def render(job: Job) -> dict[str, str]:
    """File name -> text. Raises RecipeError."""
    _check(job)
    plans = [_plan(job, settings) for settings in job.settings]  # refuses what cannot work, in words of the user
    placed = [_plan(job, _placed(settings)) for settings in job.settings]
    return {
        BATCH: _batch(job),
        NODE: (_FILES / NODE).read_text(encoding="utf-8"),
        "settings.sh": _settings(job, placed),
        "Dockerfile": dockerfile(job.settings[0].release.version, job.maker, job.gpu),
        "README.md": readme(
            job.settings, plans, [name_of(settings.model) for settings in job.settings], job.maker, job.served
        ),
    }


def name_of(model: Model) -> str:
    """What MODEL_NAME is for a model: the last part of its name, as the folders of checkpoints are called."""
    return model.path.rstrip("/").rpartition("/")[2]


def _check(job: Job) -> None:
    if job.experts and job.maker == "amd":
        raise RecipeError(
            f"--ep with --gpu {job.gpu}: the kernels of moe-a2a and of Mooncake's EP are for NVIDIA GPUs, so "
            "--moe-a2a-backend mooncake does not run on AMD's; leave --ep out, prefill and decode apart work there"
        )
    names = [name_of(settings.model) for settings in job.settings]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(
                f"--model: {names.count(name)} models are called {name}, and MODEL_NAME could be either; give one"
            )
        if name in ("", ".", ".."):
            raise RecipeError(
                f"--model: the last part of a name is MODEL_NAME, and {name!r} is none; give the folder's"
            )
    if job.given.router in _ETCD:
        raise RecipeError(f"--port {job.given.router}: etcd has it on the proxy node; give another")
    for option, value in job.sbatch:
        if option == "time" and not _TIME.fullmatch(value):
            raise RecipeError(f"--time {value!r}: give minutes, HH:MM:SS, or DAYS-HH:MM:SS, as Slurm reads it")
        if not _SBATCH.fullmatch(value):
            raise RecipeError(f"--{option} {value!r}: Slurm reads it unquoted; give letters, digits and _.,:=@%+/-")
    for settings in job.settings:
        gpus = job.gpus_of(settings)
        if gpus > job.gpus_per_node:
            raise RecipeError(
                f"--gpus {gpus}: a node has {job.gpus_per_node} (--gpus-per-node), and a server is on one node; give "
                f"{job.gpus_per_node} or fewer"
            )


def _plan(job: Job, settings: Settings) -> Plan:
    """One prefill and one decode server: every node's is the same but for its address."""
    gpus = job.gpus_of(settings)
    devices = hosts.ib_devices(job.ib_devices, [HostGpus(_HOST, gpus)])
    settings = dataclasses.replace(settings, ib_devices=devices)
    one = [Group("--gpus", str(gpus), (HostGpus(_HOST, gpus),), (False,))]
    gib = memory.gpu_memory(job.gpu)[0]
    if job.experts:
        return ep.plan(settings, one, one, _PROXY, gib, job.given, job.policy, job.experts)
    return pd.plan("slurm", settings, one, one, _PROXY, gib, job.given, job.policy)


def _placed(settings: Settings) -> Settings:
    """The same, with a place holder for the model's folder: MODEL_DIR may say where it is."""
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=_MODEL))


def _batch(job: Job) -> str:
    """The batch script, with the options of the job in its head."""
    text = (_FILES / BATCH).read_text(encoding="utf-8")
    lines = [f"#SBATCH --{name}={value}" for name, value in (("gres", f"gpu:{job.gpus_per_node}"), *job.sbatch)]
    first, rest = text.split("\n", 1)
    return "\n".join([first, *lines, rest])


def _settings(job: Job, plans: Sequence[Plan]) -> str:
    """settings.sh: what the two scripts read, each word quoted."""
    names = [name_of(settings.model) for settings in job.settings]
    prefill, decode = plans[0].of("prefill")[0], plans[0].of("decode")[0]
    router = servers.router(_PROXY, job.given.router, (), job.policy)
    devices = [*_DEVICES[job.maker], *(_RDMA if plans[0].rdma else ())]
    lines = [
        "#!/usr/bin/env bash",
        "# shellcheck disable=SC2034 # read by the other scripts",
        f"# Written by moe-a2a recipe slurm: SGLang {job.settings[0].release.version}, {job.gpu}.",
        f"SGLANG={quoting.word(job.settings[0].release.version)}",
        f"MODELS=({quoting.line(names)})",
        f"DEFAULT_MODEL={quoting.word(names[0])}",
        f"PREFILL_PORT={prefill.port} DECODE_PORT={decode.port} BOOTSTRAP_PORT={prefill.ports['bootstrap']}",
        f"ROUTER_PORT={job.given.router}",
        f"DEVICES=({quoting.line(devices)})",
        # Without this package the flag of --ep moe-a2a would be Mooncake's own EP.
        f"REQUIRES=({'moe_a2a' if job.served == 'moe-a2a' else ''})",
        f"HUB={'modelscope' if job.settings[0].modelscope else 'huggingface'}",
        f"PROOF={quoting.word(json.dumps(servers.GENERATE))}",
        "",
        "set_model() {",
        "    case $1 in",
    ]
    for name, settings in zip(names, job.settings, strict=True):
        lines.append(f"    {quoting.word(name)}) MODEL_PATH={quoting.word(settings.model.path)} ;;")
    lines += ["    *) return 1 ;;", "    esac", "}"]
    for role in ("prefill", "decode"):
        lines += ["", f"{role}_command() {{", "    case $MODEL_NAME in"]
        for name, plan in zip(names, plans, strict=True):
            lines += [f"    {quoting.word(name)})", *_command(plan.of(role)[0]), "        ;;"]
        lines += ["    esac", "}"]
    lines += ["", "router_command() {", *_command(router), "}", ""]
    return "\n".join(lines)


def _command(server: Server) -> list[str]:
    """COMMAND and ENVIRONMENT of a server; its own address is known on the node."""
    env = {"SGLANG_HOST_IP": _HOST, **server.env} if server.role != "router" else server.env
    flags = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
    words = quoting.lines(server.command, _VARIABLES, indent=" " * 12).replace(" \\\n", "\n")
    return [f"        ENVIRONMENT=({quoting.line(flags, _VARIABLES)})", f"        COMMAND=({words})"]
