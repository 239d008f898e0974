"""Commands of a Slurm job, as bash makes them on a node, through the parsers of SGLang and of its router."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import sglang
from click.testing import CliRunner
from recipe_plans import config_folder
from servers import in_child
from test_recipes import resolved

from moe_a2a.cli import main
from moe_a2a.recipes.plan import HostGpus, Server

MODELS = ["meta-llama/Llama-3.1-8B-Instruct", "amd/Llama-3.3-70B-Instruct-FP8-KV", "deepseek-ai/DeepSeek-V3"]
# What the node script adds to the router's words.
WORKERS = "--prefill http://192.0.2.11:30000 8998 --decode http://192.0.2.12:30100 --decode http://192.0.2.13:30100"


def words_on_a_node(recipe: Path, model: str, function: str) -> list[str]:
    """COMMAND after `function` of settings.sh, on a node with the address 192.0.2.10."""
    script = f'source "$1/settings.sh" && set_model "$MODEL_NAME" && {function} && printf "%s\\0" "${{COMMAND[@]}}"'
    environment = {"MODEL_NAME": model.rpartition("/")[2], "ADDRESS": "192.0.2.10"}
    done = subprocess.run(["bash", "-uc", script, "_", str(recipe)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def rendered(out: Path, *words: str) -> Path:
    done = CliRunner().invoke(main, ["recipe", "slurm", "--sglang", sglang.__version__, *words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("ep", [None, "moe-a2a", "mooncake"])
def test_servers_of_a_job_are_valid(ep: str | None, tmp_path: Path) -> None:
    models = MODELS if ep is None else MODELS[-1:]
    options = [] if ep is None else ["--ep", ep]
    recipe = rendered(tmp_path / "recipe", *(word for model in models for word in ("--model", model)), *options)
    for model in models:
        config = config_folder(tmp_path / model, model)
        for role in ("prefill", "decode"):
            words = words_on_a_node(recipe, model, f"{role}_command")
            env = {"MOE_A2A_SGLANG": "0"} if ep == "mooncake" else {}
            port = {"prefill": 30000, "decode": 30100}[role]
            server = Server(role, role, HostGpus("192.0.2.10", 8), port, tuple(words), env)  # type: ignore[arg-type]
            assert words[words.index("--model-path") + 1] == model
            got = in_child(resolved, server, config)
            assert (got["host"], got["port"], got["disaggregation_mode"]) == ("192.0.2.10", port, role)
            assert got["moe_a2a_backend"] == ("none" if ep is None else "mooncake")
            if ep is not None:
                assert got["tp_size"] == got["ep_size"] == got["attention_ranks"] == 8


def test_the_router_of_a_job_is_valid(tmp_path: Path) -> None:
    parser = pytest.importorskip("sglang_router.launch_router", reason="sglang-router is not installed")
    recipe = rendered(tmp_path / "recipe", "--model", MODELS[0], "--port", "9000")
    words = words_on_a_node(recipe, MODELS[0], "router_command")
    args = parser.parse_router_args([*words[3:], *shlex.split(WORKERS)])
    args._validate_router_args()
    assert (args.host, args.port, args.request_timeout_secs) == ("192.0.2.10", 9000, 21600)
    assert args.prefill_urls == [("http://192.0.2.11:30000", 8998)]
    assert args.decode_urls == ["http://192.0.2.12:30100", "http://192.0.2.13:30100"]
