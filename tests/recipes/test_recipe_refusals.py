"""Recipes that cannot work are refused, with the option, the value and the rule; and those beside them are not."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from recipe_plans import plan_of, refusal

from moe_a2a.recipes import models
from moe_a2a.recipes.plan import RecipeError
from moe_a2a.recipes.write import write_files

LLAMA = "--sglang 0.5.20 --model meta-llama/Llama-3.1-8B-Instruct"
V3 = "--sglang 0.5.20 --model deepseek-ai/DeepSeek-V3"
VISION = "--sglang 0.5.20 --model Qwen/Qwen2.5-VL-7B-Instruct"
PAIR = "--prefill 192.0.2.10 --decode 192.0.2.11"

#: Command -> words of the refusal, in order.
REFUSED = {
    # hosts and GPUs
    f"pd {LLAMA} --prefill 192.0.2.10 --decode 192.0.2.10": ["--prefill 192.0.2.10", "--decode", "there twice", ":0-3"],
    f"pd {LLAMA} --prefill 192.0.2.10:8 --prefill 192.0.2.10:0-1 --decode b": ["192.0.2.10:0-1", "there twice"],
    f"pd {LLAMA} --prefill a:0-3 --decode a:3-6": ["--prefill a:0-3", "--decode a:3-6", "GPU 3 is in both"],
    f"pd {LLAMA} --prefill a:0-4 --decode a:3-6": ["GPUs 3 to 4 are in both"],
    f"pd {LLAMA} --prefill a,a --decode b": ["--prefill a,a", "in one server twice"],
    f"pd {LLAMA} --prefill a:9 --decode b": ["--prefill a:9", "number 8 of a", "a node has 8", "--gpus-per-node"],
    f"pd {LLAMA} --prefill a:4-8 --decode b": ["--prefill a:4-8", "number 8"],
    f"pd {LLAMA} --prefill a:2,b:4 --decode c": ["2 and 4 GPUs", "equally many"],
    f"pd {LLAMA} --prefill a:3-2 --decode b": ["3-2", "give 2-3"],
    f"pd {LLAMA} --prefill a:0 --decode b": ["a has 0 GPUs", "a:0-0 is GPU 0"],
    f"pd {LLAMA} --prefill [2001:db8::1] --decode [2001:DB8:0:0::1]": ["2001:db8::1 is there twice"],
    f"pd {LLAMA} --prefill Host-A:0-0 --decode host-a:0-0": ["GPU 0 is in both"],
    f"pd {LLAMA} --prefill [::::] --decode b": ["--prefill '[::::]'", "is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill '[fe80::1%$(id)]' --decode b": ["is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill 192.0.2.300 --decode b": ["--prefill '192.0.2.300'", "is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill a..b --decode b": ["--prefill 'a..b'", "is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill a-:1 --decode b": ["--prefill 'a-:1'", "is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill {'a' * 64} --decode b": ["is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill 0.0.0.0:1 --decode b": ["--prefill 0.0.0.0:1", "all addresses of a host"],
    f"pd {LLAMA} {PAIR} --router [::]": ["--router [::]", "all addresses of a host"],
    f"pd {LLAMA} {PAIR} --router localhost": ["--router localhost", "loopback"],
    f"pd-single {LLAMA} --host 0.0.0.0": ["--host 0.0.0.0", "all addresses of a host"],
    f"pd-single {LLAMA} --host [::1": ["--host '[::1'", "is not a name or an address"],
    f"pd {LLAMA} --prefill 'a b' --decode c": ["--prefill 'a b'", "is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill '$(id)' --decode c": ["--prefill '$(id)'", "is not HOST[:GPUS]"],
    f"pd {LLAMA} --prefill 2001:db8::1 --decode c": ["is not HOST[:GPUS]", "[2001:db8::10]:8"],
    f"pd {LLAMA} --prefill 127.0.0.1 --decode 192.0.2.1": ["--prefill 127.0.0.1", "loopback"],
    f"pd {LLAMA} --prefill a --decode [::1]": ["--decode [::1]", "loopback"],
    f"pd {LLAMA} {PAIR} --router 'a;b'": ["--router 'a;b'"],
    f"pd {LLAMA} {PAIR} --router a:1": ["--router 'a:1'", "is not a name or an address"],
    f"pd-single {LLAMA} --tp 4 --decode-servers 2": ["--decode-servers 2", "12 GPUs", "--gpus-per-node"],
    # ports
    f"pd {LLAMA} --prefill a:0-0 --prefill a:1-1 --decode b --bootstrap-port 8998": [
        "--bootstrap-port 8998: prefill-0 (bootstrap) and prefill-1 (bootstrap) of a",
        "two prefill servers of one host need two bootstrap ports",
    ],
    f"pd {LLAMA} --prefill a:0-0 --decode a:1-1 --prefill-port 8000": ["--port 8000", "--prefill-port 8000", "router"],
    f"pd {LLAMA} --prefill a:0-0 --decode a:1-1 --decode-port 8998": ["--decode-port 8998 and --bootstrap-port 8998"],
    f"pd {LLAMA} {PAIR} --prefill-port 80": ["--prefill-port 80", "1024 to 65535"],
    f"pd {LLAMA} {PAIR} --prefill-port 2000 --prefill-port 3000": ["--prefill-port is given 2 times for 1 servers"],
    f"ep {V3} --prefill a:0-3 --decode a:4-7 --prefill-port 30000 --decode-port 30234 --gpu 280": [
        "--decode-port 30234",
        "internal",
    ],
    # devices
    f"pd {LLAMA} {PAIR} --ib-devices 'a b'": ["--ib-devices a b", "is not the name of a device"],
    f"pd {LLAMA} {PAIR} --ib-devices '{{'": ["--ib-devices {", "not JSON"],
    f"""pd {LLAMA} --prefill a:0-1 --decode b:1 --ib-devices '{{"0": "mlx5_0"}}'""": ["no devices for GPU 1"],
    f"""pd {LLAMA} {PAIR} --ib-devices '{{"x": "mlx5_0"}}'""": ["'x'", "is not a GPU"],
    f"""pd {LLAMA} {PAIR} --ib-devices '{{"0": "mlx5_0", "0": "mlx5_1"}}'""": ["GPU 0 is in the map twice"],
    f"pd {LLAMA} {PAIR} --ib-devices /missing/map.json": ["/missing/map.json", "No such file"],
    f"pd {LLAMA} {PAIR} --ib-devices mlx5_0 --transfer mooncake_tcp": ["--transfer mooncake_tcp", "over RDMA"],
    # models and releases
    f"pd --sglang 0.5.16 --model Qwen/Qwen3-32B {PAIR}": ["--sglang 0.5.16", "0.5.17 to 0.5.23"],
    f"pd --sglang 0.5.20rc1 --model Qwen/Qwen3-32B {PAIR}": ["--sglang 0.5.20rc1", "not yet a release", "give 0.5.20"],
    f"pd --sglang latest --model Qwen/Qwen3-32B {PAIR}": ["--sglang latest", "0.5.17 to 0.5.23"],
    f"pd --sglang 0.5.20 --model some/model {PAIR}": ["--model some/model", "--config config.json"],
    f"pd --sglang 0.5.20 --model=--evil {PAIR}": ["--model '--evil'", "begins with a dash"],
    f"pd --sglang 0.5.20 --model 'a\nb' {PAIR}": ["cannot be printed"],
    f"pd --sglang 0.5.20 --model ./model {PAIR}": ["--model ./model", "from / on"],
    f"pd --sglang 0.5.20 --model a:b {PAIR}": ["--model a:b", "no colon"],
    f"pd {LLAMA} --config /missing/config.json {PAIR}": ["--config /missing/config.json", "No such file"],
    f"pd {LLAMA} {PAIR} --flags 'a \"b'": ["--flags", "No closing quotation"],
    f"pd {LLAMA} {PAIR} --flags '--page-size 64 --port=1'": ["--flags '--page-size 64 --port=1'", "its own --port"],
    # memory and parts
    f"pd {V3} {PAIR} --gpu h100": ["--model deepseek-ai/DeepSeek-V3", "78.3 of 79 GiB", "if a server has 8", "85%"],
    f"pd {LLAMA} {PAIR} --gpu 8": ["15.0 of 8 GiB"],
    f"pd {LLAMA} {PAIR} --gpu rtx": ["--gpu rtx", "h200"],
    f"pd {LLAMA} --prefill a:3 --decode b": ["32 attention heads", "3 equal parts", "1, 2, 4, 8, 16 GPUs"],
    "pd --sglang 0.5.20 --model Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4 --prefill a:7 --decode b": [
        "4 key-value heads",
        "7",
    ],
    f"pd {V3} --gpus-per-node 32 --gpu 300 --prefill a:32 --decode b:8": [
        "intermediate_size 18432",
        "32 parts of whole blocks of 128",
    ],
    # experts
    f"ep {LLAMA} {PAIR}": ["has no experts", "moe-a2a recipe pd"],
    f"ep --sglang 0.5.20 --model mistralai/Mixtral-8x7B-v0.1 {PAIR}": ["MixtralForCausalLM", "recipe pd"],
    f"ep {V3} {PAIR} --redundant-experts 3": ["--redundant-experts 3", "256 experts", "8 GPUs", "give 0 or 8"],
    f"ep {V3} --prefill a:6 --decode b --gpu 280": ["--redundant-experts 0", "6 GPUs of a prefill", "give 2 or 8"],
    f"ep {V3} {PAIR} --gpu mi300x": ["--gpu mi300x", "NVIDIA GPUs", "recipe pd"],
    f"pd {LLAMA} {PAIR} --gpu mi300x --format compose": ["--gpu mi300x", "--format shell"],
    f"ep {V3} {PAIR} --survive 1": ["--survive 1 without --elastic"],
    f"ep {V3} {PAIR} --elastic --survive 8": ["--survive 8", "8 ranks"],
    f"ep {V3} {PAIR} --elastic --survive 0": ["--survive 0"],
    f"ep {V3} {PAIR} --elastic --redundant-experts 8": ["--redundant-experts 8 with --elastic", "--survive"],
    f"ep {V3} {PAIR} --elastic --survive 2": ["88 redundant experts", "fewer failures"],
    f"ep {V3} {PAIR} --elastic --ep moe-a2a": ["--elastic-ep-backend mooncake", "--ep mooncake"],
    f"ep {V3} --prefill a,b --decode c": ["--prefill a,b", "one host", "--ep mooncake"],
    f"ep {V3} {PAIR} --prefill-tokens 64000000": ["--prefill-tokens 64000000", "GiB", "give fewer"],
    f"ep {V3} {PAIR} --prefill-tokens 100": ["--prefill-tokens 100", "multiple of 64"],
    f"ep {V3} {PAIR} --ep mooncake --prefill-tokens 2048": ["--prefill-tokens 2048", "at most 1024"],
    f"ep {V3} {PAIR} --ep mooncake --two-batch-overlap": ["--two-batch-overlap", "--ep mooncake"],
    f"ep {V3} {PAIR} --decode-requests 4096": ["decode servers would not start", "GiB", "16 GiB"],
    f"ep {V3} --prefill a --prefill b:4 --decode c --gpu 280": ["--prefill: servers with 4 and 8 GPUs"],
    f"ep {V3} --prefill a:1 --decode b --gpu 9000": ["one GPU has no one to share experts with"],
    # what is given twice, or in vain
    f"pd {LLAMA} {PAIR} --port 8000 --port 9000": ["--port is given 2 times"],
    f"pd {LLAMA} {PAIR} --model Qwen/Qwen3-32B": ["--model is given 2 times"],
    f"pd {LLAMA} {PAIR} --image mine:1": ["--image mine:1 with --format shell", "leave it out"],
    f"pd {LLAMA} {PAIR} --format compose --image 'a b'": ["--image 'a b'", "not the name of an image"],
    f"pd {LLAMA} {PAIR} --format compose --image ''": ["--image ''", "not the name of an image"],
    # encoders
    f"epd {LLAMA} --encode a {PAIR}": ["no encoder server for LlamaForCausalLM", "recipe pd"],
    f"epd {VISION} --encode a:3 {PAIR}": ["--encode a:3", "16 heads"],
}


@pytest.mark.parametrize("command", REFUSED)
def test_refused(command: str) -> None:
    said = refusal(*shlex.split(command))
    at = 0
    for words in REFUSED[command]:
        assert words in said[at:], said
        at = said.index(words, at)


ACCEPTED = [
    f"pd {LLAMA} --prefill 127.0.0.1:0-0 --decode 127.0.0.1:1-1",
    f"pd {LLAMA} --prefill a:0-3 --decode a:4-7",
    f"pd {LLAMA} --prefill a:0-0 --prefill a:1-1 --decode b --bootstrap-port 8998 --bootstrap-port 9000",
    f"pd {LLAMA} --prefill a --prefill b --decode c --bootstrap-port 8998",
    f"pd {LLAMA} --prefill '[2001:db8::1]:2' --decode '[2001:db8::2]:0-1'",
    f"""pd {LLAMA} --prefill a:0-1 --decode b:1 --ib-devices '{{"0": "mlx5_0", "1": "mlx5_1,mlx5_2"}}'""",
    f"pd {V3} {PAIR} --gpu 95",
    f"pd {V3} {PAIR} --gpu mi300x",
    f"ep {V3} {PAIR} --redundant-experts 8",
    f"ep {V3} {PAIR} --elastic --survive 2 --gpu b200",
    f"ep {V3} --prefill a,b --decode c,d --ep mooncake --gpu h100",
    "ep --sglang 0.5.23.post1 --model deepseek-ai/DeepSeek-R1 --prefill a --decode b",
]


@pytest.mark.parametrize("command", ACCEPTED)
def test_accepted(command: str) -> None:
    plan_of(*shlex.split(command))


def test_a_map_of_devices_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"0": "mlx5_0"}))
    plan = plan_of(*shlex.split(f"pd {LLAMA} {PAIR} --ib-devices {file}"))
    for server in plan.servers:
        assert server.command[server.command.index("--disaggregation-ib-device") + 1] == '{"0": "mlx5_0"}'


@pytest.mark.parametrize("content", [b"\xff\xfe", b"mlx5_0,mlx5_1", b"", b"[1]"])
def test_a_file_without_a_map_of_devices_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_bytes(content)
    said = refusal(*shlex.split(f"pd {LLAMA} {PAIR} --ib-devices {file}"))
    assert f"--ib-devices {file}: " in said and "give a file" in said


@pytest.mark.parametrize(
    "host, listens", [("a", "0.0.0.0"), ("192.0.2.9", "192.0.2.9"), ("[2001:db8::9]", "[2001:db8::9]")]
)
def test_the_router_listens_on_an_address(host: str, listens: str) -> None:
    plan = plan_of(*shlex.split(f"pd {LLAMA} {PAIR} --router {host}"))
    assert plan.router.command[plan.router.command.index("--host") + 1] == listens
    assert ("the router on all of its host" in plan.text) == (listens == "0.0.0.0")


def test_a_folder_has_its_config_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(models.load("Qwen/Qwen3-32B").config))
    plan = plan_of("pd", "--sglang", "0.5.20", "--model", str(tmp_path), "--prefill", "a:2", "--decode", "b:2")
    assert plan.volumes == (str(tmp_path),)


#: What a config.json may have in the place of what it should, and what is said of it.
BROKEN = [
    *[({name: None}, f"{name}=None") for name in ("num_attention_heads", "hidden_size", "vocab_size")],
    ({"hidden_size": "5120"}, "hidden_size='5120'"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ({"architectures": []}, "has no architectures"),
    ({"n_routed_experts": 8, "first_k_dense_replace": "x"}, "first_k_dense_replace='x'"),
    ({"n_routed_experts": 8, "n_shared_experts": 0.5}, "n_shared_experts=0.5"),
    ({"kv_lora_rank": 512, "q_lora_rank": 8}, "qk_rope_head_dim=None"),
    ({"quantization_config": {"bits": "four"}}, "quantization_config bits='four'"),
    ({"quantization_config": {"weight_block_size": [0, 0]}}, "quantization_config weight_block_size=0"),
    ({"quantization_config": {"bits": 4, "group_size": -2}}, "quantization_config group_size=-2"),
    ({"vision_config": {"depth": "x"}}, "vision_config depth='x'"),
]


@pytest.mark.parametrize("change, says", BROKEN)
def test_a_config_that_lacks_a_size_names_it(change: dict[str, object], says: str, tmp_path: Path) -> None:
    config = {**models.load("Qwen/Qwen3-32B").config, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refusal("pd", "--sglang", "0.5.20", "--model", str(tmp_path), "--prefill", "a", "--decode", "b")
    assert says in said


@pytest.mark.parametrize(
    "change",
    [{"num_experts": 0}, {"quantization_config": {"bits": 4, "group_size": -1}}, {"quantization_config": None}],
)
def test_a_config_may_say_that_there_is_none_of_something(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**models.load("Qwen/Qwen3-32B").config, **change}))
    plan_of("pd", "--sglang", "0.5.20", "--model", str(tmp_path), "--prefill", "a", "--decode", "b")


def test_files_that_cannot_all_be_written_are_not_left(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give a folder that can be written"):
        write_files({"one.sh": "#!/bin/sh", "missing/two.sh": ""}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from moe_a2a.cli import main

    (tmp_path / "notes.txt").touch()
    words = shlex.split(f"recipe pd {LLAMA} {PAIR}")
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path)])
    assert done.exit_code == 1 and "new or empty" in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
