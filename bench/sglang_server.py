"""A real SGLang server on two GPUs: checked against an oracle, and measured beside Mooncake's own EP.

    python bench/sglang_server.py --out RESULTS [--site SGLANG_FOLDER] [--variants moe-a2a,oracle,upstream,none]

Starts a server for each variant on examples/tiny_deepseek_v3 with random weights:

| variant | |
|---|---|
| moe-a2a | this package: `--moe-a2a-backend mooncake --deepep-mode auto` |
| moe-a2a-tbo | the same, with `--enable-two-batch-overlap` |
| moe-a2a-ll | the same, with `--deepep-mode low_latency` |
| oracle | the reference: a dispatcher that gathers all tokens (bench/sglang_oracle.py), and the same MoE runner |
| upstream | Mooncake's own EP, with `MOE_A2A_SGLANG=0`; it has low_latency and 128 tokens per rank only |
| none | `--moe-a2a-backend none` |
| moe-a2a-exact, oracle-exact | as above, with `--enable-deterministic-inference`: rows do not depend on their batch |

All servers start at once on the same two GPUs and stay up. First each is compared with the oracle of its kind: one
prompt after the other (`answers`), which gives the same batches each time, and 64 at once (`crowd`), which does so
only with -exact. Elsewhere the oracle's crowd is compared with a second one of its own too (`oracle/crowd_again`),
which tells how far one server's answers are from one another. Then servers are measured one at a time, in turns, so
that what changes on the machine meets all of them.

The model has 2 MoE layers; --layers makes it deeper and --wide its layers those of DeepSeek-V3 with 32 experts, so
that the time of a step is less that of SGLang's CPU part.
RESULTS gets results.json and logs.tar.gz. Everything ends within --budget seconds, whatever servers do. --save-caches
writes the compiled kernels to RESULTS too, in parts, and --caches brings them back. --parts chooses what is measured;
--profile adds what the GPUs did during one more prefill (`prefill_profile`).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import sglang_caches
from sglang_load import Clients, StreamFailed, answers, crowd
from sglang_process import Server, ServerFailed
from sglang_profile import profile
from sglang_report import COMPARED, report
from sglang_setup import add_arguments, pack_logs, prepare
from sglang_variants import VARIANTS, environment, flags, is_exact, plugin_of

_FAILURES = (ServerFailed, StreamFailed, OSError, LookupError, ValueError)


class Run:
    """One variant's server, and what was found with it. What was found before a failure is kept, with the failure."""

    def __init__(self, variant: str, server: Server, end: float) -> None:
        self.variant, self.server, self.end = variant, server, end
        self.found: dict[str, Any] = {"variant": variant}

    @property
    def failed(self) -> bool:
        return "failed" in self.found

    def stage(self, name: str, limit: float, call: Callable[[float], Any], several: bool = False) -> None:
        """found[name] = call(seconds that it may take); with `several`, one of a list. Nothing after a failure."""
        if self.failed:
            return
        try:
            self.server.check()
            left = min(limit, self.end - time.monotonic())
            if left < 1:
                raise ServerFailed(f"no time left for {name}")
            print(f"  {self.variant}: {name} ...", flush=True)
            value = call(left)
        except _FAILURES as error:
            self.found["failed"] = f"{name}: {error or repr(error)}\n{self.server.tail()}"
            self.found["trace"] = traceback.format_exc(limit=-3)
            print(f"  {self.variant}: FAILED in {name}", flush=True)
            return
        if several:
            self.found.setdefault(name, []).append(value)
        else:
            self.found[name] = value

    def finish(self) -> None:
        self.found["ready_s"] = self.server.timings()
        self.stage("in_place", 10, lambda left: self._in_place())

    def _in_place(self) -> bool:
        if not self.server.says(plugin_of(self.variant)):
            raise ServerFailed(f"the log does not say that {self.variant} is what ran")
        return True


def run_all(options: argparse.Namespace, model: Path, paths: list[str], end: float) -> dict[str, dict[str, Any]]:
    with ExitStack() as stack:
        clients = stack.enter_context(Clients(options.requests))
        runs = []
        for number, variant in enumerate(options.variants):
            command = [*flags(variant, str(model)), *options.server_flags]
            port = options.port + 200 * number
            server = Server(command, environment(variant, paths), options.state / f"{variant}.log", port)
            runs.append(Run(variant, stack.enter_context(server), end))
        with ThreadPoolExecutor(len(runs)) as pool:
            list(pool.map(lambda run: compare(run, options), runs))
        slow = [run for run in runs if is_exact(run.variant)]
        for run in slow:
            run.finish()
            run.server.end()
        measured = [run for run in runs if run not in slow]
        for part in options.parts:
            for turn in range(1 + options.rounds):
                for run in measured:
                    PARTS[part](run, clients, options, turn)
        for run in measured:
            if options.profile:
                run.stage("prefill_profile", options.start_limit, partial(profiled, run, clients, options))
            run.finish()
        return {run.variant: run.found for run in runs}


def compare(run: Run, options: argparse.Namespace) -> None:
    """Wait for the server, and take the answers that are compared. For all servers at the same time."""
    server = run.server
    run.stage("start_s", options.start_limit, server.wait)
    run.stage("first_request_s", options.start_limit, lambda left: _timed(lambda: crowd(server, left, 4)))
    if not options.compare:
        return
    run.stage("answers", options.start_limit, lambda left: answers(server, left))
    run.stage("crowd", options.start_limit, lambda left: crowd(server, left))
    run.stage("crowd_again", options.stage_limit, lambda left: crowd(server, left))


# Measurements. The first turn warms up: kernels for these sizes are compiled in it.


def decode(run: Run, clients: Clients, options: argparse.Namespace, turn: int) -> None:
    _measure(run, options, "decode", turn, lambda left: clients.whole(run.server, options.tokens, left))


def stream(run: Run, clients: Clients, options: argparse.Namespace, turn: int) -> None:
    _measure(run, options, "stream", turn, lambda left: clients.stream(run.server, options.tokens, left))


def one(run: Run, clients: Clients, options: argparse.Namespace, turn: int) -> None:
    _measure(run, options, "one", turn, lambda left: clients.stream(run.server, options.tokens, left, requests=1))


def prefill(run: Run, clients: Clients, options: argparse.Namespace, turn: int) -> None:
    sizes = options.prompts, options.prompt_tokens
    _measure(run, options, "prefill", turn, lambda left: clients.prefill(run.server, *sizes, left, 10_000 * turn))


PARTS = {"decode": decode, "stream": stream, "one": one, "prefill": prefill}


def profiled(run: Run, clients: Clients, options: argparse.Namespace, left: float) -> dict[str, Any]:
    folder = options.state / f"profile-{run.variant}"
    sizes = options.prompts, options.prompt_tokens
    return profile(run.server, folder, lambda: clients.prefill(run.server, *sizes, left, 0))


def _measure(
    run: Run, options: argparse.Namespace, name: str, turn: int, call: Callable[[float], dict[str, Any]]
) -> None:
    if turn == 0:
        run.stage(f"{name}_warm_up", options.start_limit, call)
    else:
        run.stage(name, options.stage_limit, call, several=True)


def _timed(call: Callable[[], Any]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def write(results: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    out: Path = options.out
    summary = {"layers": options.layers, "wide": options.wide, **report(results, options.tolerance)}
    (out / "results.json").write_text(json.dumps(summary, indent=1))
    (out / "answers.json").write_text(json.dumps({v: {p: f.get(p) for p in COMPARED} for v, f in results.items()}))
    pack_logs(options)
    return summary


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, state="/var/tmp/moe-a2a-sglang", start_limit=300, port=31000, rounds=5)
    parser.add_argument("--variants", default="moe-a2a,oracle,upstream,none", type=lambda text: text.split(","))
    parser.add_argument("--parts", default=list(PARTS), type=lambda text: text.split(","))
    parser.add_argument("--no-compare", dest="compare", action="store_false")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--save-caches", action="store_true")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("server_flags", nargs="*", help="more flags for every server, after --")
    options = parser.parse_args()
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {unknown}; there are {', '.join(VARIANTS)}")
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    return options


def main() -> int:
    options = arguments()
    end = time.monotonic() + options.budget - 15  # to end servers and write results
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model, paths = prepare(options)
    results = run_all(options, model, paths, end)
    summary = write(results, options)
    if options.save_caches:
        sglang_caches.save(options.out)
    print(json.dumps(summary, indent=1)[:20000])
    return 1 if any("failed" in found for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
