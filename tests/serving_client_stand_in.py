"""Stands in for `python -m sglang.benchmark.serving` where SGLang is not installed.

It takes those of the client's options that the Slurm recipe uses, makes real requests, and prints a table of the
client's form. (The client itself: tests/sglang/test_serving_client.py.)
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def request(args: argparse.Namespace) -> tuple[float, float, list[float]] | None:
    """Times of one streamed request in ms: to the first token, in all, between tokens. None if it failed."""
    body = {"text": "a " * args.random_input_len, "stream": True}
    body["sampling_params"] = {"max_new_tokens": args.random_output_len}
    start = time.perf_counter()
    arrived: list[float] = []
    try:
        connection = http.client.HTTPConnection(args.host, args.port, timeout=60)
        connection.request("POST", "/generate", json.dumps(body))
        answer = connection.getresponse()
        for line in answer:
            if line.startswith(b"data: {"):
                arrived.append((time.perf_counter() - start) * 1000)
        connection.close()
    except (OSError, http.client.HTTPException) as error:
        print(f"output.error={error!r:}", file=sys.stderr)
        return None
    if answer.status != 200 or len(arrived) != args.random_output_len:
        return None
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrived)]
    return arrived[0], arrived[-1], gaps or [0.0]


def rows(name: str, values: Sequence[float]) -> None:
    ordered = sorted(values)
    for which, value in (
        ("Mean", sum(ordered) / len(ordered)),
        ("Median", ordered[len(ordered) // 2]),
        ("P99", ordered[int(0.99 * (len(ordered) - 1))]),
    ):
        print(f"{which + ' ' + name + ' (ms):':<40} {value:<10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("backend", "host", "model", "dataset-name", "output-file"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "random-input-len", "random-output-len", "num-prompts", "max-concurrency", "seed"):
        parser.add_argument(f"--{name}", required=True, type=int)
    parser.add_argument("--random-range-ratio", required=True, type=float)
    args = parser.parse_args()
    print(f"benchmark_args={args}\nstand-in for SGLang's serving benchmark (not SGLang)")
    print("Starting warmup with 1 sequences...\nStarting main benchmark run...", flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(args.max_concurrency) as pool:
        done = [times for times in pool.map(request, [args] * args.num_prompts) if times is not None]
    seconds = time.perf_counter() - start
    if not done:
        sys.exit("All requests failed.")
    tokens_in, tokens_out = len(done) * args.random_input_len, len(done) * args.random_output_len
    print(f"\n{' Serving Benchmark Result ':=^50}")
    for label, value in (
        ("Max request concurrency:", args.max_concurrency),
        ("Successful requests:", len(done)),
        ("Benchmark duration (s):", f"{seconds:.2f}"),
        ("Total input tokens:", tokens_in),
        ("Total generated tokens:", tokens_out),
        ("Request throughput (req/s):", f"{len(done) / seconds:.2f}"),
        ("Input token throughput (tok/s):", f"{tokens_in / seconds:.2f}"),
        ("Output token throughput (tok/s):", f"{tokens_out / seconds:.2f}"),
        ("Total token throughput (tok/s):", f"{(tokens_in + tokens_out) / seconds:.2f}"),
    ):
        print(f"{label:<40} {value!s:<10}")
    rows("E2E Latency", [total for _, total, _ in done])
    rows("TTFT", [first for first, _, _ in done])
    rows("TPOT", [sum(gaps) / len(gaps) for _, _, gaps in done])
    rows("ITL", [gap for _, _, gaps in done for gap in gaps])
    print("=" * 50)


if __name__ == "__main__":
    main()
