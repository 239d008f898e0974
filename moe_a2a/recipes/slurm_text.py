"""README.md of the Slurm recipe."""

from __future__ import annotations

from collections.abc import Sequence

from moe_a2a.recipes.plan import Plan
from moe_a2a.recipes.servers import REQUEST_SECONDS, Settings

_TEXT = """\
# {title}

One node for the proxy (etcd, the router, SGLang's serving benchmark), xP nodes with a prefill server each and yD nodes
with a decode server each. A request goes to the router, which picks one of each; the prefill server sends the request's
KV cache to the decode server, GPU to GPU, and nothing else crosses between them.
{ep}
    {diagram}

Models: {models}.

Build the image once, where every node can get it, from `Dockerfile` (its head says how; it is linted, and was not built
where it was written). Then:

    export xP=1 yD=1
    export MODEL_NAME={model}
    export DOCKER_IMAGE_NAME=sglang-moe-a2a:v{version}
    export LOG_PATH=/a/folder/that/all/nodes/share
    sbatch --nodes=$((xP + yD + 1)) run_xPyD_models.slurm

Submit from this folder, or set `RECIPE_DIR` to it; a partition and an account are options of sbatch, or of
`moe-a2a recipe slurm`. Nodes need docker, curl and Slurm; the user must be allowed to use docker.

| variable | |
|---|---|
| `xP`, `yD` | prefill and decode nodes |
| `MODEL_NAME` | one of the models above; `{model}` if it is not set |
| `DOCKER_IMAGE_NAME` | the image |
| `LOG_PATH` | a folder that all nodes share; each job makes a folder in it, named after its id |
| `MODEL_DIR` | where the nodes have `MODEL_NAME` as a folder; without it, {without} |
| {cache} |
| `BENCHMARK_COMBINATIONS` | tokens in and out, `1024/1024 8192/1024` |
| `BENCHMARK_CONCURRENCY_LEVELS` | `8 16 32 64 128 256 512` |
| `SKIP_BENCHMARK` | 1: serve until the job ends, at port {router} of the proxy node |
| `START_SECONDS` | until all servers are healthy, 3600 |
| `TEARDOWN_SECONDS` | until a node that does not end is killed, 120 |

The job's folder:

| file | |
|---|---|
| `nodes` | number, role, name and address of each node |
| `pd_sglang_bench_serving.sh_NODE*.log` | what each node did, with the commands |
| `etcd_NODE0.log`, `router_NODE0.log` | of the proxy node |
| `prefill_NODE*.log`, `decode_NODE*.log` | of the servers |
| `benchmark_*_CONCURRENCY.log` | the sweep, a run for each pair of lengths and concurrency |

    moe-a2a bench-report LOG_PATH/JOB/benchmark_*_CONCURRENCY.log --plot sweep.png

The job ends by itself when the sweep is done, and all containers with it. If a server ends before, so does the job, and
`slurm-JOB.out` has the node and the last lines of its log. `scancel` and the time limit end everything in the same way.

The containers may open 1048576 files and the router waits {timeout} s for a request: with 1024 files and half an hour,
requests are dropped at 512 and more at a time (docs/troubleshooting.md of moe-a2a). The sweep's prompts are random
tokens, others in each run, so that no run finds them in a prefix cache and nothing is downloaded for them.

etcd is for membership stores of moe-a2a (`etcd://PROXY:2379`); SGLang's servers need none today. Servers, router and
etcd listen on the nodes' addresses and authenticate nobody: the network must be trusted.
{notes}"""

_EP = """
Each server is an EP group of its own: its GPUs share the experts, with `--moe-a2a-backend mooncake`, and no expert row
leaves the node. {served}
"""
_SERVED = {
    "moe-a2a": "That runs on moe-a2a, which the image must have: a node looks for it first and stops without it.",
    "mooncake": "That runs on Mooncake's own EP (`MOE_A2A_SGLANG=0`).",
}

_AMD = """
AMD GPUs: prefill and decode apart only. `--moe-a2a-backend mooncake` needs NVIDIA GPUs, with moe-a2a and with
Mooncake's own EP.
"""

_DIAGRAM = """\
client, benchmark ──> router (NODE0) ──> prefill (NODE1..xP) ══ KV cache ══> decode (NODExP+1..)
                                    └──────────────────────────────────────────^"""


def readme(
    settings: Sequence[Settings], plans: Sequence[Plan], names: Sequence[str], maker: str, served: str | None
) -> str:
    """settings, plans and names: of each model, the default first. served: who serves experts."""
    first = settings[0]
    local = all(one.model.is_local for one in settings)
    gpus = [plan.of("prefill")[0].place.gpus for plan in plans]
    models = [f"`{name}` ({n} {'GPU' if n == 1 else 'GPUs'} a server)" for name, n in zip(names, gpus, strict=True)]
    return _TEXT.format(
        title=f"xPyD on Slurm: SGLang {first.release.version}" + (", with expert parallelism" if served else ""),
        ep=_EP.format(served=_SERVED[served]) if served else "",
        diagram=_DIAGRAM.replace("\n", "\n    "),
        models=", ".join(models),
        model=names[0],
        version=first.release.version,
        without="the folder that the recipe was rendered for" if local else "it is taken from the hub",
        cache="`MODELSCOPE_CACHE` | the cache, if the model comes from the hub"
        if first.modelscope
        else "`HF_HOME`, `HF_TOKEN` | cache and token, if the model comes from the hub",
        router=plans[0].router.port,
        timeout=REQUEST_SECONDS,
        notes=_AMD if maker == "amd" else "",
    )
