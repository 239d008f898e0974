"""Prefill and decode apart, with real SGLang servers on two GPUs: checked against one server, and measured beside it.

    python bench/sglang_pd.py --out RESULTS [--site SGLANG_FOLDER] [--mini-lb]

Four servers share the two GPUs, all on this package (`--moe-a2a-backend mooncake`) with EP 2: one that prefills (normal
mode, contiguous layout), one that decodes (low_latency, CUDA graphs), sglang-router before them, and one server that
does both (auto), the reference. The KV cache goes over the Transfer Engine's TCP (`mooncake_tcp`). Checked: greedy
answers to prompts one after the other; where two part, the reference's best two log-probabilities are within
--tolerance. Then 64 requests at once, whole and streamed, with short and long prompts, the two ways in turns; a
request that fails ends the program, and the results say which. RESULTS gets results.json and logs.tar.gz. The model is
that of bench/sglang_server.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sglang_load import ANSWER, PROMPT_LENGTHS, Clients, StreamFailed, body, prompt
from sglang_process import Server, ServerFailed
from sglang_report import middles
from sglang_setup import add_arguments, pack_logs, prepare
from sglang_variants import COMMON, environment

_EP = ["--moe-a2a-backend", "mooncake", "--chunked-prefill-size", "8192"]
_WAYS = ("apart", "together")


def start(options: argparse.Namespace, model: Path, paths: list[str], stack: ExitStack) -> dict[str, Server]:
    """The servers by name; "apart" is the router."""
    env = {**environment("moe-a2a", paths), "SGLANG_HOST_IP": "127.0.0.1"}
    port, bootstrap = options.port, options.port + 1
    flags = ["--model-path", str(model), *COMMON.split(), *_EP, "--host", "127.0.0.1"]
    apart = [*flags, "--disaggregation-transfer-backend", "mooncake_tcp", "--disaggregation-mode"]
    commands = {
        "prefill": [*apart, "prefill", "--deepep-mode", "normal", "--disaggregation-bootstrap-port", str(bootstrap)],
        "decode": [*apart, "decode", "--deepep-mode", "low_latency"],
        "together": [*flags, "--deepep-mode", "auto"],
    }
    servers = {}
    for number, (name, command) in enumerate(commands.items()):
        server = Server(command, env, options.state / f"{name}.log", port + 200 * (number + 1))
        servers[name] = stack.enter_context(server)
    urls = {name: f"http://127.0.0.1:{server.port}" for name, server in servers.items()}
    router = ["--pd-disaggregation", "--host", "127.0.0.1", "--prefill", urls["prefill"], str(bootstrap)]
    router += ["--decode", urls["decode"], *(["--mini-lb"] if options.mini_lb else ["--policy", "round_robin"])]
    for name in ("prefill", "decode", "together"):
        print(f"{name}: ready after {servers[name].wait(options.start_limit):.0f} s", flush=True)
    log = options.state / "router.log"
    servers["apart"] = stack.enter_context(Server(router, env, log, port, "sglang_router.launch_router"))
    print(f"router: ready after {servers['apart'].wait(60):.0f} s", flush=True)
    return servers


def compare(servers: dict[str, Server], options: argparse.Namespace) -> dict[str, Any]:
    """Greedy answers to the prompts of bench/sglang_server.py, one after the other."""
    parted, same = [], 0
    for seed, length in enumerate(PROMPT_LENGTHS):
        ids = prompt(seed, length)
        more = {"return_logprob": True, "top_logprobs_num": 2}
        meta = servers["together"].post("/generate", body(ids, ANSWER, **more), options.start_limit)["meta_info"]
        reference = [entry[1] for entry in meta["output_token_logprobs"]]
        got = servers["apart"].post("/generate", body(ids, ANSWER), options.start_limit)["output_ids"]
        if len(got) != len(reference):
            raise ServerFailed(f"{len(got)} tokens came, not {len(reference)}")
        step = next((i for i, (one, two) in enumerate(zip(reference, got, strict=True)) if one != two), len(got))
        same += step
        if step < len(got):
            best, second = (entry[0] for entry in meta["output_top_logprobs"][step][:2])
            parted.append({"prompt": seed, "step": step, "gap": best - second})
    agrees = all(one["gap"] <= options.tolerance for one in parted)
    return {"agrees": agrees, "prompts": len(PROMPT_LENGTHS), "tokens_before_parting": same, "parted": parted}


def measure(servers: dict[str, Server], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and latencies of both ways, medians of rounds in turns. The first round warms up."""
    found: dict[str, list[dict[str, Any]]] = {}
    with Clients(options.requests) as clients:
        for turn in range(1 + options.rounds):
            limit = options.stage_limit if turn else options.start_limit
            for length in options.prompt_lengths:
                for way in _WAYS:
                    whole = clients.whole(servers[way], options.tokens, limit, length)
                    streamed = clients.stream(servers[way], options.tokens, limit, length=length)
                    if turn:
                        found.setdefault(f"{way}, prompts of {length}, whole", []).append(whole)
                        found.setdefault(f"{way}, prompts of {length}, streamed", []).append(streamed)
    sent = 2 * options.requests * (1 + options.rounds) * len(options.prompt_lengths)
    return {"requests_of_each_way": sent, **{name: middles(rounds) for name, rounds in found.items()}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, state="/var/tmp/moe-a2a-sglang-pd", start_limit=240, port=25000, rounds=3)
    parser.add_argument("--mini-lb", action="store_true", help="the router's small balancer instead of the router")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[16, 512])
    return parser.parse_args()


def main() -> int:
    options = arguments()
    model, paths = prepare(options)
    results: dict[str, Any] = {
        "layers": options.layers,
        "wide": options.wide,
        "router": "mini-lb" if options.mini_lb else "sglang-router",
    }
    with ExitStack() as stack:
        try:
            servers = start(options, model, paths, stack)
            results["greedy"] = compare(servers, options)
            print(json.dumps(results["greedy"], indent=1), flush=True)
            results["measured"] = measure(servers, options)
            for name in ("prefill", "decode", "together"):
                if not servers[name].says("moe-a2a"):
                    raise ServerFailed(f"the log of {name} does not say that this package ran")
        except (ServerFailed, StreamFailed, OSError, LookupError, ValueError) as error:
            results["failed"] = f"{error!r}\n{traceback.format_exc(limit=-3)}"
            for server in list(Server.running):
                results["failed"] += f"\n\n{server.log.name}:\n{server.tail(3000)}"
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    pack_logs(options)
    print(json.dumps(results, indent=1)[:12000])
    return 0 if "failed" not in results and results["greedy"]["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
