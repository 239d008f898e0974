"""Renders the examples of this folder again: `python examples/recipes/make.py`. The tests compare them.

The hosts are addresses for documentation (RFC 5737); put yours in their place and run the command yourself.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from click.testing import CliRunner

from moe_a2a.cli import main

HERE = Path(__file__).resolve().parent

#: Folder -> the command that fills it.
COMMANDS = {
    "pd-single": """recipe pd-single --sglang 0.5.20 --model meta-llama/Llama-3.1-8B-Instruct
        --transfer mooncake_tcp""",
    "pd-single-compose": """recipe pd-single --sglang 0.5.20 --model meta-llama/Llama-3.1-8B-Instruct
        --decode-servers 2 --transfer mooncake_tcp --format compose""",
    "pd": """recipe pd --sglang 0.5.20 --model amd/Llama-3.3-70B-Instruct-FP8-KV
        --prefill 192.0.2.10:0-3 --prefill 192.0.2.10:4-7 --decode 192.0.2.11:8
        --ib-devices mlx5_0,mlx5_1""",
    "ep": """recipe ep --sglang 0.5.23 --model deepseek-ai/DeepSeek-V3
        --prefill 192.0.2.10 --decode 192.0.2.11 --decode 192.0.2.12 --router 192.0.2.9""",
    "ep-two-hosts": """recipe ep --sglang 0.5.17 --model deepseek-ai/DeepSeek-R1 --gpu h100 --ep mooncake
        --prefill 192.0.2.10,192.0.2.11 --decode 192.0.2.12,192.0.2.13""",
    "ep-elastic": """recipe ep --sglang 0.5.20 --model deepseek-ai/DeepSeek-V3 --elastic --survive 1
        --prefill 192.0.2.10 --decode 192.0.2.11""",
    "epd": """recipe epd --sglang 0.5.20 --model Qwen/Qwen2.5-VL-7B-Instruct
        --encode 192.0.2.10:0-0 --encode 192.0.2.10:1-1 --prefill 192.0.2.10:2-2 --decode 192.0.2.11:1""",
}

#: The same, for jobs: their hosts are known when they run.
JOBS = {
    "slurm": """recipe slurm --sglang 0.5.20 --model amd/Llama-3.3-70B-Instruct-FP8-KV
        --model meta-llama/Llama-3.1-8B-Instruct --model Qwen/Qwen3-32B --partition gpu""",
    "slurm-amd": """recipe slurm --sglang 0.5.20 --gpu mi300x --model amd/Llama-3.1-405B-Instruct-FP8-KV
        --model amd/Llama-3.3-70B-Instruct-FP8-KV --model mistralai/Mixtral-8x7B-Instruct-v0.1
        --model deepseek-ai/DeepSeek-V3""",
    "slurm-ep": """recipe slurm --sglang 0.5.23 --model deepseek-ai/DeepSeek-V3 --model deepseek-ai/DeepSeek-R1
        --ep moe-a2a --partition gpu""",
}
ALL = {**COMMANDS, **JOBS}


def render(name: str, out: Path) -> None:
    """Run a command, with its output in `out`, which is made anew. Raises RuntimeError."""
    shutil.rmtree(out, ignore_errors=True)
    done = CliRunner().invoke(main, [*shlex.split(ALL[name]), "--out", str(out)])
    if done.exit_code != 0:
        raise RuntimeError(f"moe-a2a {ALL[name]}: {done.output}") from done.exception


if __name__ == "__main__":
    for folder in ALL:
        render(folder, HERE / folder)
