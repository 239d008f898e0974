"""A real SGLang server on two GPUs: checked against an oracle, and measured beside Mooncake's own EP.

    python bench/sglang_server.py --out RESULTS [--site SGLANG_FOLDER] [--variants moe-a2a,oracle,upstream,none]

Starts one server after the other on examples/tiny_deepseek_v3 with random weights:

| variant | |
|---|---|
| moe-a2a | this package: `--moe-a2a-backend mooncake --deepep-mode auto` |
| moe-a2a-tbo | the same, with `--enable-two-batch-overlap` |
| moe-a2a-ll | the same, with `--deepep-mode low_latency` |
| oracle | the reference: a dispatcher that gathers all tokens (bench/sglang_oracle.py), and the same MoE runner |
| upstream | Mooncake's own EP, with `MOE_A2A_SGLANG=0`; it has low_latency and 128 tokens per rank only |
| none | `--moe-a2a-backend none` |

RESULTS gets results.json and logs.tar.gz. --state keeps the results of variants between runs: a variant that is there
is not run again. Everything ends within --budget seconds, whatever servers do. --save-caches writes the compiled
kernels to RESULTS too, in parts, and --caches brings them back, which makes the first start two minutes shorter.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang_caches
import sglang_load
import sglang_model
from sglang_compare import compare
from sglang_process import Server, ServerFailed, make_site

_FLAGS = """--skip-tokenizer-init --skip-server-warmup --tp-size 2 --dp-size 2 --enable-dp-attention
    --moe-dense-tp-size 1 --enable-dp-lm-head --attention-backend triton --sampling-backend pytorch
    --grammar-backend none --disable-custom-all-reduce --disable-radix-cache --mem-fraction-static 0.3
    --cuda-graph-max-bs-decode 32 --max-running-requests 64"""
MOONCAKE = ["--moe-a2a-backend", "mooncake"]
#: Flags of each variant. Chunks are of both ranks together.
VARIANTS = {
    "moe-a2a": [*MOONCAKE, "--deepep-mode", "auto", "--chunked-prefill-size", "8192"],
    "moe-a2a-tbo": [*MOONCAKE, "--deepep-mode", "auto", "--chunked-prefill-size", "8192", "--enable-two-batch-overlap"],
    "moe-a2a-ll": [*MOONCAKE, "--deepep-mode", "low_latency", "--chunked-prefill-size", "256"],
    "oracle": [*MOONCAKE, "--deepep-mode", "auto", "--chunked-prefill-size", "8192"],
    "upstream": [
        *[*MOONCAKE, "--deepep-mode", "low_latency", "--chunked-prefill-size", "256"],
        *["--elastic-ep-backend", "none"],
    ],
    "none": ["--moe-a2a-backend", "none", "--chunked-prefill-size", "8192"],
}
REFERENCE = "oracle"


def plugin_of(variant: str) -> str:
    """The plug-in that a variant runs with, as `Server.says` knows it."""
    return "moe-a2a" if variant.startswith("moe-a2a") else variant


def environment(variant: str, paths: list[str]) -> dict[str, str]:
    env = {
        "PYTHONPATH": ":".join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
        "MOONCAKE_PROTOCOL": "tcp",
        "SGLANG_PLUGINS": "moe-a2a-oracle" if variant == "oracle" else "moe-a2a",
        "MOE_A2A_SGLANG": "0" if variant == "upstream" else "1",
    }
    if variant in ("oracle", "upstream"):
        env["SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = "128"
    return env


def run_variant(variant: str, options: argparse.Namespace, state: Path, paths: list[str], end: float) -> dict[str, Any]:
    """Start, check and measure one server. What was measured before a failure is kept, with the failure."""
    found: dict[str, Any] = {"variant": variant}
    log = state / f"{variant}.log"
    flags = ["--model-path", str(state / "model"), *_FLAGS.split(), *VARIANTS[variant], *options.server_flags]

    stage_end = end

    def left() -> float:
        return min(end, stage_end) - time.monotonic()

    try:
        port = options.port + 1000 * list(VARIANTS).index(variant)
        with Server(flags, environment(variant, paths), log, port) as server:
            found["start_s"] = server.wait(min(end, time.monotonic() + options.start_limit))
            stages: list[tuple[str, Callable[[], Any]]] = [
                ("first_request_s", lambda: _timed(lambda: sglang_load.crowd(server, left(), 4))),
                ("answers", lambda: sglang_load.answers(server, left())),
                ("crowd", lambda: sglang_load.crowd(server, left())),
                ("decode_warm_up", lambda: sglang_load.decode(server, options.requests, options.tokens, left)),
                ("decode", lambda: _several(lambda: _decode(server, options, left), options.rounds, "tokens_per_s")),
                ("decode_1", lambda: sglang_load.decode(server, 1, options.tokens, left)),
                ("prefill_warm_up", lambda: _prefill(server, options, left, 10_000)),
                (
                    "prefill",
                    lambda: _several(lambda: _prefill(server, options, left, 20_000), options.rounds, "tokens_per_s"),
                ),
            ]
            for name, stage in stages:
                if end - time.monotonic() < 10:
                    raise ServerFailed(f"no time left for {name}")
                compiles = name == "first_request_s"
                stage_end = time.monotonic() + (options.start_limit if compiles else options.stage_limit)
                server.check()
                print(f"  {variant}: {name} ...", flush=True)
                found[name] = stage()
            found["in_place"] = server.says(plugin_of(variant))
            if not found["in_place"]:
                raise ServerFailed(f"the log does not say that {variant} is what ran\n{server.tail()}")
    except (ServerFailed, OSError, LookupError, ValueError, threading.BrokenBarrierError) as error:
        found["failed"] = str(error) or repr(error)
        found["trace"] = traceback.format_exc(limit=-3)
    return found


def _decode(server: Server, options: argparse.Namespace, left: Callable[[], float]) -> dict[str, Any]:
    return sglang_load.decode(server, options.requests, options.tokens, left)


def _prefill(server: Server, options: argparse.Namespace, left: Callable[[], float], seed: int) -> dict[str, Any]:
    return sglang_load.prefill(server, options.prompts, options.prompt_tokens, left, seed)


def _timed(call: Callable[[], Any]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def _several(measure: Callable[[], dict[str, Any]], rounds: int, key: str) -> dict[str, Any]:
    """The median round, and all rounds' values."""
    results = [measure() for _ in range(rounds)]
    values = [result[key] for result in results]
    middle = min(results, key=lambda result: abs(result[key] - statistics.median(values)))
    return {**middle, "rounds": values}


def report(results: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Comparisons and ratios of what has been run."""
    out: dict[str, Any] = {"comparisons": {}, "measured": {}, "ratios": {}}
    for variant, found in results.items():
        kept = ("start_s", "first_request_s", "decode", "decode_1", "prefill", "in_place", "failed")
        out["measured"][variant] = {name: found[name] for name in kept if name in found}
    reference = results.get(REFERENCE, {})
    for variant, found in results.items():
        for part in ("answers", "crowd"):
            if variant != REFERENCE and part in found and part in reference:
                out["comparisons"][f"{variant}/{part}"] = compare(reference[part], found[part], tolerance)
    for variant in [name for name in results if name.startswith("moe-a2a")]:
        for other, part in (("upstream", "decode"), ("none", "decode"), ("none", "prefill"), ("upstream", "prefill")):
            if part in results[variant] and part in results.get(other, {}):
                ours, theirs = results[variant][part]["tokens_per_s"], results[other][part]["tokens_per_s"]
                out["ratios"][f"{part}: {variant} / {other}"] = ours / theirs
    return out


def write(out: Path, state: Path, results: dict[str, Any], tolerance: float) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    summary = report(results, tolerance)
    (out / "results.json").write_text(json.dumps({**summary, "results": results}, indent=1))
    with tarfile.open(out / "logs.tar.gz", "w:gz") as tar:
        for log in sorted(state.glob("*.log")):
            tar.add(log, log.name)
    return summary


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("/var/tmp/moe-a2a-sglang"))
    parser.add_argument("--site", help="a folder with SGLang, for PYTHONPATH")
    parser.add_argument("--variants", default="moe-a2a,oracle,upstream,none", type=lambda text: text.split(","))
    parser.add_argument("--again", action="store_true", help="run variants that --state has results of")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--least", type=float, default=60, help="seconds without which no server is started")
    parser.add_argument(
        "--start-limit", type=float, default=300, help="seconds for one server's start, and for its first request"
    )
    parser.add_argument("--variant-limit", type=float, default=420, help="seconds for one variant")
    parser.add_argument("--stage-limit", type=float, default=150, help="seconds for one request or round")
    parser.add_argument("--caches", type=Path, help="a folder with the parts that --save-caches wrote")
    parser.add_argument("--save-caches", action="store_true")
    parser.add_argument("--port", type=int, default=31000)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.1, help="of log-probabilities")
    parser.add_argument("server_flags", nargs="*", help="more flags for every server, after --")
    options = parser.parse_args()
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {unknown}; there are {', '.join(VARIANTS)}")
    return options


def main() -> int:
    options = arguments()
    end = time.monotonic() + options.budget - 15  # to end a server and write results
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(int(options.budget) - 5)
    state: Path = options.state
    state.mkdir(parents=True, exist_ok=True)
    paths = [str(make_site(state / "site")), *([options.site] if options.site else [])]
    if not (state / "model" / "model.safetensors").is_file():
        sglang_model.write(state / "model")
    if options.caches:
        sglang_caches.restore(options.caches)
    kept = state / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    try:
        for variant in options.variants:
            if variant in results and "failed" not in results[variant] and not options.again:
                continue
            if end - time.monotonic() < options.least:
                print(f"{variant}: left out, {end - time.monotonic():.0f} s are left", flush=True)
                continue
            print(f"{variant}: starting", flush=True)
            limit = min(end, time.monotonic() + options.variant_limit)
            results[variant] = run_variant(variant, options, state, paths, limit)
            kept.write_text(json.dumps(results))
            shown = {name: value for name, value in results[variant].items() if name not in ("answers", "crowd")}
            print(json.dumps(shown, indent=1)[:8000], flush=True)
    finally:
        signal.alarm(0)
        summary = write(options.out, state, results, options.tolerance)
    if options.save_caches:
        sglang_caches.save(options.out)
    print(json.dumps(summary, indent=1)[:9000])
    return 1 if any("failed" in found for found in results.values()) else 0


def _too_late(*_: object) -> None:
    if Server.running is not None:
        Server.running.end()
    raise TimeoutError("the budget is used up")


if __name__ == "__main__":
    sys.exit(main())
