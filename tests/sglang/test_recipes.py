"""Every command that `moe-a2a recipe` writes goes through the parser and the validation of the SGLang it is for.

Nothing is started: SGLang's questions about GPUs and RDMA devices are answered as 8 H200 would, for as long as
arguments are resolved. Its answers about the network are its own.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import make
import sglang
import torch
from recipe_plans import config_folder, plan_of
from servers import fake_gpu, in_child, load_plugins
from sglang.srt.server_args import PortArgs, prepare_server_args

from moe_a2a.recipes import models, ports
from moe_a2a.recipes.plan import Plan, Server
from moe_a2a.sglang_plugin import adapter
from moe_a2a.sglang_plugin.limits import Limits, limits_from_server_args

VERSION = sglang.__version__
#: The devices that recipes of this module name.
DEVICES = ["mlx5_0", "mlx5_1"]

HOSTS = "--prefill 192.0.2.10 --decode 192.0.2.11"
IPV6 = "--prefill [2001:db8::10] --decode [2001:db8::11]"
MAP = """'{"0": "mlx5_0", "1": "mlx5_1", "2": "mlx5_0", "3": "mlx5_0", "4": "mlx5_1", "5": "mlx5_1"}'"""
DEEPSEEK = f"ep --model deepseek-ai/DeepSeek-V3 {HOSTS}"
LARGE = "--prefill 192.0.2.1,192.0.2.2 --decode 192.0.2.3,192.0.2.4,192.0.2.5,192.0.2.6 --transfer mooncake_tcp"
VISION = "--encode 192.0.2.10:0-1 --encode 192.0.2.10:2-2 --prefill 192.0.2.10:3-3 --decode 192.0.2.11:1"

RECIPES = [
    *[f"pd --model {name} {HOSTS}" for name in models.known()],
    "pd-single --model meta-llama/Llama-3.1-8B-Instruct",
    "pd-single --model Qwen/Qwen3-32B --prefill-servers 2 --decode-servers 2 --transfer mooncake_tcp --modelscope",
    f"pd --model Qwen/Qwen3-32B {IPV6} --transfer nixl",
    f"pd --model amd/Llama-3.3-70B-Instruct-FP8-KV {HOSTS} --ib-devices mlx5_0,mlx5_1 --flags '--page-size 64'",
    f"pd --model Qwen/Qwen3-32B --prefill 192.0.2.10:0-1 --decode 192.0.2.10:2-5 --ib-devices {MAP}",
    "pd --model amd/Llama-3.1-405B-Instruct-FP8-KV --prefill 192.0.2.1,192.0.2.2 --decode 192.0.2.3",
    DEEPSEEK,
    f"{DEEPSEEK} --redundant-experts 32 --prefill-tokens 4096 --decode-requests 256 --transfer mooncake_tcp",
    f"{DEEPSEEK} --two-batch-overlap",
    f"{DEEPSEEK} --ep mooncake --ib-devices mlx5_0",
    f"{DEEPSEEK} --elastic --survive 1",
    f"ep --model deepseek-ai/DeepSeek-R1 --ep mooncake --gpu h100 --elastic --survive 2 {LARGE}",
    f"epd --model Qwen/Qwen2.5-VL-7B-Instruct {VISION}",
    f"epd --model Qwen/Qwen3-VL-8B-Instruct {VISION} --encoder-transfer mooncake --transfer mooncake_tcp",
    f"epd --model Qwen/Qwen3-VL-8B-Instruct {VISION} --encoder-transfer mooncake --ib-devices mlx5_0",
    f"epd --model Qwen/Qwen3-VL-8B-Instruct {VISION} --encoder-transfer zmq_to_tokenizer",
]


def plan_for(recipe: str) -> Plan:
    return plan_of(*shlex.split(recipe), "--sglang", VERSION)


def model_of(recipe: str) -> str:
    words = shlex.split(recipe)
    return words[words.index("--model") + 1]


def resolve(server: Server, config: Path, *more: str) -> Any:
    """SGLang's own ServerArgs of a command, resolved and checked as a server does before it starts anything."""
    assert server.command[:3] == ("python3", "-m", "sglang.launch_server")
    words = [*server.command[3:], *more]
    words[words.index("--model-path") + 1] = str(config)
    real_isdir, real_listdir = os.path.isdir, os.listdir
    infiniband = "/sys/class/infiniband"
    with (
        fake_gpu(),
        mock.patch.object(torch.cuda, "device_count", return_value=8),
        mock.patch.dict(os.environ, server.env),
        mock.patch.object(os.path, "isdir", lambda path: path == infiniband or real_isdir(path)),
        mock.patch.object(os, "listdir", lambda path=".": DEVICES if path == infiniband else real_listdir(path)),
    ):
        args = prepare_server_args(words)
        if hasattr(args, "resolve_once"):  # from 0.5.20 on; before, construction resolves
            args.resolve_once()
        args.check_server_args()
    return args


def resolved(server: Server, config: Path) -> dict[str, Any]:
    """What a test looks at, with this package's plug-in loaded as in a server."""
    with mock.patch.dict(os.environ, server.env):
        load_plugins()
    args = adapter.view(resolve(server, config))
    names = ["disaggregation_mode", "tp_size", "nnodes", "node_rank", "base_gpu_id", "host", "port", "ep_size"]
    names += ["moe_a2a_backend", "chunked_prefill_size", "max_running_requests", "ep_num_redundant_experts"]
    names += ["enable_eplb", "encoder_only", "language_only", "encoder_urls", "disaggregation_bootstrap_port"]
    found = {name: getattr(args, name) for name in names}
    found["attention_ranks"] = max(getattr(args, "attn_dp_size", 1), args.dp_size)
    if args.moe_a2a_backend == "mooncake":
        found["limits"] = limits_from_server_args(args)
        found["graphs"] = (args.cuda_graph_config.decode.backend, args.cuda_graph_config.prefill.backend)
    return found


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in models.known():
        config_folder(folder / name, name)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_is_valid(recipe: str, configs: Path) -> None:
    plan = plan_for(recipe)
    for server in plan.servers:
        got = in_child(resolved, server, configs / model_of(recipe))
        assert got["host"] == server.host and got["port"] == server.port
        assert got["disaggregation_mode"] == {"encode": "null"}.get(server.role, server.role)
        assert got["base_gpu_id"] == server.place.first
        assert got["encoder_only"] == (server.role == "encode")
        assert got["node_rank"] == server.node
        assert got["tp_size"] == server.place.gpus * got["nnodes"]
        if server.role == "prefill" and server.node == 0:
            assert got["disaggregation_bootstrap_port"] == server.ports["bootstrap"]


def test_the_examples_are_for_releases_that_are_tried() -> None:
    tried = {"0.5.17", "0.5.20", "0.5.23"}
    assert {
        shlex.split(command)[shlex.split(command).index("--sglang") + 1] for command in make.COMMANDS.values()
    } <= tried


@pytest.mark.parametrize("name", [name for name in make.COMMANDS if f"--sglang {VERSION} " in make.COMMANDS[name]])
def test_the_examples_are_valid(name: str, configs: Path) -> None:
    words = shlex.split(make.COMMANDS[name])[1:]
    for server in plan_of(*words).servers:
        in_child(resolved, server, configs / words[words.index("--model") + 1])


def test_buffers_are_sized_for_what_the_recipe_says(configs: Path) -> None:
    plan = plan_for(f"{DEEPSEEK} --prefill-tokens 2048 --decode-requests 96")
    prefill, decode = (in_child(resolved, server, configs / "deepseek-ai/DeepSeek-V3") for server in plan.servers)
    assert prefill["limits"] == Limits(96, 2048) and decode["limits"] == Limits(96, 96)
    assert decode["graphs"] == ("full", "disabled") and prefill["graphs"][0] == "disabled"
    for got in (prefill, decode):
        assert got["ep_size"] == got["attention_ranks"] == 8 and got["moe_a2a_backend"] == "mooncake"
        assert got["max_running_requests"] == 8 * 96


def test_redundant_experts_reach_sglang(configs: Path) -> None:
    plan = plan_for(f"{DEEPSEEK} --elastic --survive 1")
    for server in plan.servers:
        got = in_child(resolved, server, configs / "deepseek-ai/DeepSeek-V3")
        assert got["enable_eplb"] and got["ep_num_redundant_experts"] == 40


def test_prefill_servers_know_all_encoders(configs: Path) -> None:
    plan = plan_for(f"epd --model Qwen/Qwen3-VL-8B-Instruct {VISION}")
    (server,) = plan.of("prefill")
    got = in_child(resolved, server, configs / "Qwen/Qwen3-VL-8B-Instruct")
    assert got["language_only"] and got["encoder_urls"] == ["http://192.0.2.10:30200", "http://192.0.2.10:30210"]


@pytest.fixture
def bound() -> Iterator[list[int]]:
    """The ports that SGLang tries to have for itself."""
    found: list[int] = []
    module = sys.modules[PortArgs.__module__]
    with mock.patch.object(module, "wait_port_available", lambda port, *_, **__: found.append(port)):
        yield found


@pytest.mark.parametrize("hosts", ["192.0.2.10", "192.0.2.10,192.0.2.11"])
def test_the_ports_of_data_parallel_attention_are_those_that_the_plan_keeps_free(
    hosts: str, configs: Path, bound: list[int]
) -> None:
    plan = plan_for(f"ep --model deepseek-ai/DeepSeek-V3 --ep mooncake --prefill {hosts} --decode 192.0.2.19")
    server = plan.servers[0]
    nccl = 29_999  # a free one otherwise
    PortArgs.init_new(resolve(server, configs / "deepseek-ai/DeepSeek-V3", "--nccl-port", str(nccl)))
    assert set(bound) - {nccl} <= set(server.ports.values())
    assert server.ports["rendezvous"] in bound
    assert set(server.ports.values()) >= set(ports.internal(server.port, server.ports["rendezvous"]).values())
