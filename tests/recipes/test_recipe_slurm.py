"""The Slurm recipe: scripts that shellcheck and hadolint pass, and whole jobs under a stand-in for Slurm and docker.

fake_slurm.py says what the stand-in is: the scripts are the real ones, containers are processes, servers have no model.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_slurm import Cluster
from recipe_plans import refusal

from moe_a2a.bench_report.logs import read
from moe_a2a.cli import main
from moe_a2a.recipes import models

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
SLURM = ("slurm", "--sglang", "0.5.20", "--model", LLAMA)
DEEPSEEK = ("slurm", "--sglang", "0.5.20", "--model", "deepseek-ai/DeepSeek-V3")
SWEEP = {"BENCHMARK_COMBINATIONS": "8/4", "BENCHMARK_CONCURRENCY_LEVELS": "2 8"}


def render(out: Path, *words: str) -> Path:
    done = CliRunner().invoke(main, ["recipe", *words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found is not None, f"{name} is in the extra `test`"
    return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path / "cluster")
    yield made
    made.kill()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return render(tmp_path / "recipe", *SLURM)


class Job:
    """A job that was submitted, and what is left when it has ended."""

    def __init__(self, cluster: Cluster, recipe: Path, nodes: int, tmp_path: Path, **given: str) -> None:
        self.logs = tmp_path / "shared logs"
        self.logs.mkdir(exist_ok=True)
        basic = {"xP": "1", "yD": "1", "DOCKER_IMAGE_NAME": "image:1", "LOG_PATH": str(self.logs), **SWEEP}
        self.folder = self.logs / "71"
        self.cluster = cluster
        self.process = cluster.submit(recipe, nodes, {**basic, "HF_HOME": str(tmp_path / "hf"), **given})

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.1)

    def log(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""


def nothing_is_left(cluster: Cluster) -> bool:
    return cluster.processes() == [] and list((cluster.folder / "containers").iterdir()) == []


def test_a_job_sweeps_and_leaves_nothing_behind(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    job = Job(cluster, recipe, 4, tmp_path, yD="2", HF_TOKEN="secret", FAKE_PREFILL="--unhealthy-s 1")
    code, output = job.end()
    assert code == 0, output
    assert nothing_is_left(cluster)

    benchmark = f"benchmark_71_xP1_yD2_{LLAMA.rpartition('/')[2]}_CONCURRENCY.log"
    nodes = {f"pd_sglang_bench_serving.sh_NODE{i}.log" for i in range(4)}
    servers = {"etcd_NODE0.log", "router_NODE0.log", "prefill_NODE1.log", "decode_NODE2.log", "decode_NODE3.log"}
    scripts = {"nodes", "settings.sh", "pd_sglang_bench_serving.sh"}
    assert {file.name for file in job.folder.iterdir()} == {benchmark, *nodes, *servers, *scripts}
    for name in servers:
        assert "stand-in for a server (no model)" in job.log(name) and "ended by a signal" in job.log(name)

    runs, problems = read(job.folder / benchmark)
    assert not problems
    assert [(run.concurrency, run.requests, run.succeeded) for run in runs] == [(2, 16, 16), (8, 16, 16)]
    assert f"moe-a2a bench-report {job.folder}/benchmark_" in output
    check_containers(cluster)


def check_containers(cluster: Cluster) -> None:
    """The containers of the job above: image, limits, addresses, workers of the router, other prompts in each run."""
    containers = cluster.containers()
    by_name = {str(container["name"]).removeprefix("moe-a2a-71-"): container for container in containers}
    prefill, decode, router = (by_name[name] for name in ("NODE1-prefill", "NODE3-decode", "NODE0-router"))
    for container in containers:
        assert container["image"] == "image:1"
        assert "nofile=1048576:1048576" in container["flags"] and "secret" not in str(container)
    for container, address in ((prefill, f"{cluster.net}.2"), (decode, f"{cluster.net}.4")):
        assert f"SGLANG_HOST_IP={address}" in container["flags"] and "/dev/infiniband" in container["flags"]
        command = container["command"]
        assert command[command.index("--host") + 1] == address
        assert command[command.index("--model-path") + 1] == LLAMA
    command = list(router["command"])
    assert command[command.index("--request-timeout-secs") + 1] == "21600"
    assert command[command.index("--prefill") :] == [
        *["--prefill", f"http://{cluster.net}.2:30000", "8998"],
        *["--decode", f"http://{cluster.net}.3:30100", "--decode", f"http://{cluster.net}.4:30100"],
    ]
    seeds = [c["command"][list(c["command"]).index("--seed") + 1] for c in containers if "--seed" in c["command"]]
    assert seeds == ["1", "2"]


@pytest.mark.parametrize(
    "container, says",
    [
        ("NODE2-decode", "decode NODE2 (node3): decode ended with code 137; the end of decode_NODE2.log: "),
        ("NODE0-router", "proxy NODE0 (node1): router ended with code 137; the end of router_NODE0.log: "),
    ],
)
def test_a_server_that_dies_in_the_sweep_ends_the_job_with_its_reason(
    container: str, says: str, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    job = Job(cluster, recipe, 3, tmp_path, BENCHMARK_COMBINATIONS="8/100000")
    job.wait_for(lambda: "Starting main benchmark run" in job.log("benchmark.part"))
    os.kill(int((cluster.folder / "containers" / f"moe-a2a-71-{container}").read_text()), signal.SIGKILL)
    code, output = job.end()
    assert code == 1 and f"{says}stand-in for a server" in output
    assert nothing_is_left(cluster)


def test_a_server_that_never_starts_ends_the_job(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    code, output = Job(cluster, recipe, 3, tmp_path, FAKE_PREFILL="--no-such-option").end()
    assert code == 1 and "prefill NODE1 (node2): prefill ended with code 2" in output
    assert "unrecognized arguments: --no-such-option" in output
    assert nothing_is_left(cluster)


def test_a_server_that_is_not_healthy_in_time_ends_the_job(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    code, output = Job(cluster, recipe, 3, tmp_path, FAKE_DECODE="--unhealthy-s 600", START_SECONDS="2").end()
    assert code == 1
    assert "is not healthy after" in output
    assert nothing_is_left(cluster)


@pytest.mark.parametrize("when", ["pd_sglang_bench_serving.sh_NODE1.log", "benchmark.part"])
def test_a_job_that_is_cancelled_leaves_nothing_behind(
    when: str, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    job = Job(cluster, recipe, 3, tmp_path, BENCHMARK_COMBINATIONS="8/100000")
    job.wait_for(lambda: job.log(when) != "")
    job.process.send_signal(signal.SIGTERM)
    code, output = job.end()
    assert code == 143 and "the job is ended by a signal" in output
    assert nothing_is_left(cluster)


def test_a_server_that_does_not_listen_is_removed(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    job = Job(cluster, recipe, 3, tmp_path, FAKE_DECODE="--ignore-term", SKIP_BENCHMARK="1", TEARDOWN_SECONDS="2")
    job.wait_for(lambda: "serving until the job ends" in job.log("pd_sglang_bench_serving.sh_NODE0.log"))
    job.process.send_signal(signal.SIGTERM)
    code, output = job.end()
    assert code == 143 and "NODE2 did not end within 2 s: its containers are removed" in output
    deadline = time.monotonic() + 30  # what ran `docker stop` ends when the container is gone
    while not nothing_is_left(cluster) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert nothing_is_left(cluster)


def test_a_run_of_the_benchmark_without_a_result_is_named(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    # The first request, of the check, succeeds; then there are none that do.
    job = Job(cluster, recipe, 3, tmp_path, FAKE_ROUTER="--refuse-after 1", BENCHMARK_CONCURRENCY_LEVELS="2")
    code, output = job.end()
    assert code == 1 and "runs of the benchmark without a result: 8/4 at 2 (code 1); see benchmark_71_xP1" in output
    (log,) = job.folder.glob("benchmark_*")
    assert "All requests failed." in log.read_text()
    assert nothing_is_left(cluster)


def test_a_node_that_does_not_see_the_folder_is_named(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    code, output = Job(cluster, recipe, 3, tmp_path, FAKE_BLIND="node3").end()
    assert code == 1
    assert "node3 does not see" in output and "LOG_PATH must be a folder that all nodes share" in output
    assert nothing_is_left(cluster)


def test_an_image_without_this_package_does_not_serve_experts(cluster: Cluster, tmp_path: Path) -> None:
    recipe = render(tmp_path / "recipe", *DEEPSEEK, "--ep", "moe-a2a")
    code, output = Job(cluster, recipe, 3, tmp_path, FAKE_LACKS="moe_a2a").end()
    assert code == 1 and "image:1 is to have moe_a2a, and looking for it ended with code 1: build it from" in output
    assert not any("sglang.launch_server" in container["command"] for container in cluster.containers())
    assert nothing_is_left(cluster)


def test_a_job_with_experts_and_a_model_of_modelscope_sweeps(cluster: Cluster, tmp_path: Path) -> None:
    recipe = render(tmp_path / "recipe", *DEEPSEEK, "--ep", "moe-a2a", "--modelscope")
    cache = str(tmp_path / "models of modelscope")
    job = Job(cluster, recipe, 3, tmp_path, BENCHMARK_CONCURRENCY_LEVELS="2", MODELSCOPE_CACHE=cache)
    code, output = job.end()
    assert code == 0, output
    servers = [container for container in cluster.containers() if "sglang.launch_server" in container["command"]]
    assert [list(server["command"]).count("--moe-a2a-backend") for server in servers] == [1, 1]
    (client,) = (container for container in cluster.containers() if "--seed" in container["command"])
    for container in (*servers, client):
        assert f"{cache}:/root/.cache/modelscope" in container["flags"]
        assert "SGLANG_USE_MODELSCOPE=true" in container["flags"] and "HF_TOKEN" not in container["flags"]


def test_a_node_without_the_model_is_named(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    code, output = Job(cluster, recipe, 3, tmp_path, MODEL_DIR=str(tmp_path / "none")).end()
    assert code == 1 and "every node must have the model" in output and "/none/Llama-3.1-8B-Instruct" in output
    assert nothing_is_left(cluster)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"xP": "0"}, "xP=0: give the number of nodes, 1 or more"),
        ({"yD": ""}, "yD=: give the number of nodes, 1 or more"),
        ({"xP": "a[$(touch broken)]"}, "xP=a[$(touch broken)]: give the number of nodes"),
        ({"yD": "2"}, "xP=1 and yD=2 need 4 nodes, one of them for the proxy; the job has 3: sbatch --nodes=4"),
        ({"MODEL_NAME": "DeepSeek-V3"}, "MODEL_NAME=DeepSeek-V3: this recipe was rendered for Llama-3.1-8B-Instruct"),
        ({"DOCKER_IMAGE_NAME": ""}, "DOCKER_IMAGE_NAME is not set"),
        ({"LOG_PATH": "logs"}, "LOG_PATH=logs: give a folder that all nodes share, from the root on"),
        ({"LOG_PATH": "/no/such/folder"}, "LOG_PATH=/no/such/folder: no such folder on node1"),
        ({"BENCHMARK_COMBINATIONS": "1024"}, "BENCHMARK_COMBINATIONS=1024: give tokens in and out"),
        ({"BENCHMARK_CONCURRENCY_LEVELS": "8 a[$(touch broken)]"}, "give numbers of requests, such as '8 64 512'"),
        ({"START_SECONDS": "1h"}, "START_SECONDS=1h: give seconds, 1 or more"),
        ({"TEARDOWN_SECONDS": "0"}, "TEARDOWN_SECONDS=0: give seconds, 1 or more"),
        ({"RECIPE_DIR": "/no/such"}, "no settings.sh in '/no/such'"),
    ],
)
def test_bad_variables_are_refused(
    given: dict[str, str], says: str, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    code, output = Job(cluster, recipe, 3, tmp_path, **given).end()
    assert code == 1 and "run_xPyD_models: " in output and says in output
    assert cluster.containers() == [] and not list(tmp_path.rglob("broken"))


def test_a_hostile_name_is_a_name_and_a_folder_of_models_takes_the_place_of_the_hub(
    cluster: Cluster, tmp_path: Path
) -> None:
    name = """it's a "model" $(touch broken) `touch broken`; touch broken #"""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(models.load(LLAMA).config))
    model = tmp_path / "models; touch broken" / name
    model.mkdir(parents=True)
    words = ["slurm", "--sglang", "0.5.20", "--model", f"hub/{name}", "--config", str(config)]
    words += ["--gpus", "1", "--flags", """--served-model-name "x'; touch broken; '" """]
    recipe = render(tmp_path / "recipe", *words)
    job = Job(cluster, recipe, 3, tmp_path, BENCHMARK_CONCURRENCY_LEVELS="2", MODEL_DIR=str(model.parent))
    code, output = job.end()
    assert code == 0, output
    servers = [container for container in cluster.containers() if "sglang.launch_server" in container["command"]]
    assert len(servers) == 2
    for server in servers:
        command = list(server["command"])
        assert command[command.index("--model-path") + 1] == str(model) and f"{model}:{model}:ro" in server["flags"]
        assert command[command.index("--served-model-name") + 1] == "x'; touch broken; '"
    assert not list(tmp_path.rglob("broken")) and not Path("broken").exists()


@pytest.mark.parametrize(
    "words",
    [
        (*SLURM, "--model", "Qwen/Qwen3-32B", "--partition", "gpu", "--account", "me"),
        (*SLURM, "--gpu", "mi300x", "--transfer", "mooncake_tcp"),
        ("slurm", "--sglang", "0.5.23", "--model", "deepseek-ai/DeepSeek-V3", "--ep", "moe-a2a"),
        ("slurm", "--sglang", "0.5.17", "--model", "deepseek-ai/DeepSeek-R1", "--ep", "mooncake"),
    ],
)
def test_shellcheck_and_hadolint_find_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    out = render(tmp_path / "recipe", *words)
    scripts = [str(out / name) for name in ("run_xPyD_models.slurm", "pd_sglang_bench_serving.sh", "settings.sh")]
    flags = ["--external-sources", "--source-path=SCRIPTDIR", "--enable=quote-safe-variables"]
    done = subprocess.run([tool("shellcheck"), *flags, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([tool("hadolint"), str(out / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_experts_are_shared_on_nvidia_gpus_only(tmp_path: Path) -> None:
    out = render(tmp_path / "ep", *DEEPSEEK, "--ep", "moe-a2a")
    settings = (out / "settings.sh").read_text()
    assert settings.count("--moe-a2a-backend mooncake") == 2 and "--gpus all" in settings
    said = refusal(*DEEPSEEK, "--ep", "moe-a2a", "--gpu", "mi300x")
    assert "--ep with --gpu mi300x" in said and "NVIDIA GPUs" in said
    out = render(tmp_path / "amd", *DEEPSEEK, "--gpu", "mi300x")
    settings = (out / "settings.sh").read_text()
    assert "moe-a2a-backend" not in settings and "/dev/kfd" in settings and "--gpus all" not in settings
    assert "mi30x" in (out / "Dockerfile").read_text()
    out = render(tmp_path / "newer", *DEEPSEEK, "--gpu", "mi355x")
    assert "mi35x" in (out / "Dockerfile").read_text()


@pytest.mark.parametrize(
    "words, says",
    [
        (("--gpus", "16"), "--gpus 16: a node has 8 (--gpus-per-node), and a server is on one node"),
        (("--gpus", "3"), "32 attention heads cannot be cut into 3 equal parts"),
        (("--model", "other/Llama-3.1-8B-Instruct"), "--model other/Llama-3.1-8B-Instruct: not one of the models"),
        (("--model", LLAMA), "2 models are called Llama-3.1-8B-Instruct"),
        (("--model", "Qwen/Qwen3-32B", "--config", "c.json"), "--config c.json with 2 models: it is of one"),
        (("--partition", "gpu\n#SBATCH --wrap=x"), "--partition 'gpu\\n#SBATCH --wrap=x': Slurm reads it unquoted"),
        (("--time", "1 day"), "--time '1 day': give minutes, HH:MM:SS, or DAYS-HH:MM:SS"),
        (("--ep", "moe-a2a"), "has no experts"),
        (("--gpus", "2", "--ib-devices", '{"0": "mlx5_0"}'), "no devices for GPU 1; a map names those"),
        (("--decode-requests", "64"), "--decode-requests 64 without --ep"),
        (("--prefill-tokens", "64"), "--prefill-tokens 64 without --ep"),
        (("--port", "2379"), "--port 2379: etcd has it"),
        (("--transfer", "nixl", "--ib-devices", "mlx5_0"), "only mooncake over RDMA uses them"),
        (("--gpu", "12"), "its weights take 15.0 of 12 GiB"),
        (("--flags", "'"), '--flags "\'": No closing quotation'),
        (("--sglang", "0.5.21"), "--sglang is given 2 times"),
    ],
)
def test_what_cannot_work_is_refused(words: tuple[str, ...], says: str) -> None:
    assert says in refusal(*SLURM, *words)


@pytest.mark.parametrize("path", ["/", "/models/..", "hub/."])
def test_a_model_whose_name_is_no_name_is_refused(path: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(models.load(LLAMA).config))
    words = ("slurm", "--sglang", "0.5.20", "--model", path, "--config", str(config), "--gpus", "1")
    assert "the last part of a name is MODEL_NAME" in refusal(*words)


def test_a_map_of_devices_needs_the_gpus_of_a_server_only(tmp_path: Path) -> None:
    out = render(tmp_path / "recipe", *SLURM, "--ib-devices", '{"0": "mlx5_0"}')
    assert """--disaggregation-ib-device '{"0": "mlx5_0"}'""" in (out / "settings.sh").read_text()
