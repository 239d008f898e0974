"""A DeepSeek-V3 model, its routed experts sharded over ranks with moe_a2a, against the same model in one piece.

Starts the ranks on this machine and labels them as several hosts: ranks of one host share memory, ranks of different
hosts talk through the Mooncake Transfer Engine. Every rank prefills its own text and decodes greedily from it, with
every routed expert of every layer on one rank only. A further process runs the unsharded model on all the texts; this
one compares: the tokens must be equal, and the logits within TOLERANCE.

    python examples/deepseek_v3.py [--ranks 4] [--hosts 2] [--tokens 32] [--layers 4] [--prefill-layout contiguous]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from processes import ChildFailed, Job, run_all
from rich import box
from rich.console import Console
from rich.table import Table

# Largest difference of a logit, relative to the largest logit. Both sides compute in fp32 (epsilon 1.2e-7) but multiply
# matrices of other heights and add experts in another order, a few hundred roundings deep.
TOLERANCE = 1e-4

# A router choice or a likeliest token decided by less than the rounding error may go either way on another CPU, with
# either model. With this seed the closest choice of a router is decided by 2.5e-5 of a score (rounding: about 1e-7),
# and the closest token by 1.5e-3 of the largest logit.
SEED = 26


def run_reference(args: argparse.Namespace, pipe: Connection) -> None:
    """The unsharded model on all prompts; and their prefill without the routed experts, to see how much they matter."""
    import torch
    from small_deepseek_v3 import build, decode_greedily, prompts

    model = build(args.seed, args.layers)
    results = []
    for prompt in prompts(args.ranks):
        tokens, logits = decode_greedily(model, prompt, args.tokens, lambda: None, lambda: pipe.send(("step", None)))
        results.append({"tokens": tokens, "logits": logits})
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.forward = lambda hidden_states, index, weights: torch.zeros_like(hidden_states)
    for prompt, result in zip(prompts(args.ranks), results, strict=True):
        _, result["without_experts"] = decode_greedily(model, prompt, 1, lambda: None, lambda: None)
    pipe.send(("result", results))


def run_rank(args: argparse.Namespace, rank: int, meeting_point: str, pipe: Connection) -> None:
    """One expert-parallel rank: its prompt, its share of the experts."""
    import torch
    import torch.distributed as dist
    from sharded_experts import shard
    from small_deepseek_v3 import EXPERTS, HIDDEN, TOP_K, build, decode_greedily, prompts

    from moe_a2a import AllToAll, Config, Options

    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=args.ranks)
    config = Config(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        max_tokens_per_rank=max(map(len, prompts(args.ranks))),
        dtype=torch.float32,
    )
    with AllToAll(config, options=Options(host=host_of(args, rank), timeout_s=60.0)) as a2a:
        model = build(args.seed, args.layers)
        experts = shard(model, a2a)

        def use(layout: str) -> None:
            for module in experts:
                module.layout = layout

        use(args.prefill_layout)
        tokens, logits = decode_greedily(
            model, prompts(args.ranks)[rank], args.tokens, lambda: use("masked"), lambda: pipe.send(("step", None))
        )
        held = experts[0].gate_up_proj.shape[0]
    dist.destroy_process_group()
    pipe.send(("result", {"tokens": tokens, "logits": logits, "held": held, "of": EXPERTS}))


def host_of(args: argparse.Namespace, rank: int) -> str:
    """The first ranks are the first host, and so on."""
    return f"host-{rank * args.hosts // args.ranks}"


def name_of(args: argparse.Namespace, rank: int) -> str:
    return f"rank {rank}, {host_of(args, rank)}"


def judge(args: argparse.Namespace, results: dict[str, Any], console: Console) -> int:
    """Compare every rank with the unsharded model; print what was found. Returns the exit code."""
    table = Table("rank", "prompt", "experts", "equal tokens", "logit error", "effect", box=box.SIMPLE)
    table.columns[0].no_wrap = True
    failures: list[str] = []
    worst, weakest, varied = 0.0, np.inf, args.tokens
    for rank, expected in enumerate(results["unsharded model"]):
        name = name_of(args, rank)
        got = results[name]
        scale = float(np.abs(expected["logits"]).max())
        equal = int((got["tokens"] == expected["tokens"]).sum())
        prompt_length = expected["without_experts"].shape[0]
        # Once a token differs, later logits are those of another text and say nothing.
        comparable = prompt_length + int(np.argmin([*(got["tokens"] == expected["tokens"]), False]))
        difference = np.abs(got["logits"][:comparable] - expected["logits"][:comparable]).max() / scale
        matter = np.abs(expected["without_experts"] - expected["logits"][:prompt_length]).max() / scale
        if equal < args.tokens:
            step = comparable - prompt_length
            failures.append(f"{name}: token {step} is {got['tokens'][step]}, unsharded {expected['tokens'][step]}")
        if not difference <= TOLERANCE:
            failures.append(f"{name}: a logit differs by {difference:.1e} of the largest; allowed: {TOLERANCE:.0e}")
        if not matter > 1000 * TOLERANCE:
            failures.append(f"{name}: without routed experts logits change by {matter:.1e} only: this proves nothing")
        worst, weakest = max(worst, difference), min(weakest, matter)
        varied = min(varied, len(set(expected["tokens"].tolist())))
        table.add_row(
            name,
            f"{prompt_length} B",
            f"{got['held']} of {got['of']}",
            f"{equal} of {args.tokens}",
            f"{difference:.1e}",
            f"{matter:.2f}",
        )
    console.print(table)
    console.print("Logit error: against the unsharded model, relative to the largest logit.")
    console.print("Effect: the same for the unsharded model without its routed experts.\n")
    for failure in failures:
        console.print(f"DIFFERS: {failure}", style="bold red", soft_wrap=True)
    if failures:
        return 1
    held = results[name_of(args, 0)]["held"]
    console.print(
        f"Proved: {args.ranks} ranks on {args.hosts} hosts, {held} of the routed experts each, decoded the unsharded "
        f"model's tokens ({args.ranks} x {args.tokens}, at least {varied} different ones a text); logits within "
        f"{worst:.1e} of the largest (allowed: {TOLERANCE:.0e}; without the routed experts: {weakest:.2f}).",
        style="bold green",
        soft_wrap=True,
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=2, help="how many hosts to play; divides --ranks")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode on every rank")
    parser.add_argument("--layers", type=int, default=4, help="the first is dense, the others have experts")
    parser.add_argument("--prefill-layout", choices=("contiguous", "grouped", "masked"), default="contiguous")
    parser.add_argument("--seed", type=int, default=SEED, help="of the weights")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until the run is given up")
    args = parser.parse_args()
    if args.hosts < 1 or args.ranks % args.hosts:
        parser.error(f"--hosts {args.hosts} does not divide --ranks {args.ranks}")
    if args.tokens < 1 or args.layers < 2:
        parser.error("needs --tokens of 1 or more and --layers of 2 or more (the first has no experts)")
    if importlib.util.find_spec("transformers") is None:
        parser.error("needs transformers 5: pip install 'moe-a2a[demo]'")
    # Read by what the children import: one thread a process (there are more processes than cores), nothing downloaded.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", GLOO_SOCKET_IFNAME="lo")
    console = Console()
    console.print(
        f"DeepSeek-V3 architecture, {args.layers} layers, routed experts sharded over {args.ranks} ranks on "
        f"{args.hosts} hosts; prefill ({args.prefill_layout} layout), then {args.tokens} tokens (masked layout)."
    )
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="moe-a2a-") as folder:
            meeting_point = os.path.join(folder, "meeting-point")
            jobs = [Job("unsharded model", args.ranks * args.tokens, run_reference, (args,))]
            for rank in range(args.ranks):
                jobs.append(Job(name_of(args, rank), args.tokens, run_rank, (args, rank, meeting_point)))
            results = run_all(jobs, args.timeout, console)
    except KeyboardInterrupt:
        return 130
    except ChildFailed as error:
        console.print(f"FAILED: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    code = judge(args, results, console)
    console.print(f"{time.perf_counter() - start:.0f} s", highlight=False, style="dim")
    return code


if __name__ == "__main__":
    sys.exit(main())
