"""What bench/sglang_server.py asks of a server: logits of fixed prompts, and throughput."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sglang_process import Server, ServerFailed

VOCABULARY = 4096
#: Prompts of which each token's log-probability is compared: one token to several chunks.
PROMPT_LENGTHS = (2, 7, 64, 129, 500, 1500)
ANSWER = 48


def prompt(seed: int, length: int) -> list[int]:
    """Token ids; those below 2 are special."""
    numbers = random.Random(seed)
    return [numbers.randrange(2, VOCABULARY) for _ in range(length)]


def body(ids: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    parameters = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": parameters, **more}


def answers(server: Server, timeout: float) -> list[dict[str, Any]]:
    """One prompt after the other, so that every server makes the same batches. Each: `input`, the log-probability of
    each prompt token but the first (teacher-forced); `output`, greedy tokens, with `top`, the best two of each step."""
    return [_answer(server, prompt(seed, length), timeout) for seed, length in enumerate(PROMPT_LENGTHS)]


def crowd(server: Server, timeout: float, requests: int = 64) -> list[dict[str, Any]]:
    """The same at once, of short prompts: full decode batches, replayed from graphs."""
    ids = [prompt(100 + number, 16 + number % 17) for number in range(requests)]
    with ThreadPoolExecutor(requests) as pool:
        return list(pool.map(lambda one: _answer(server, one, timeout), ids))


def _answer(server: Server, ids: list[int], timeout: float) -> dict[str, Any]:
    more = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    got = server.post("/generate", body(ids, ANSWER, **more), timeout)
    meta = got["meta_info"]
    return {
        "input": [entry[0] for entry in meta["input_token_logprobs"] if entry[0] is not None],
        "output": [entry[1] for entry in meta["output_token_logprobs"]],
        "top": [[best[0][0], best[1][0]] for best in meta["output_top_logprobs"]],
    }


def decode(server: Server, requests: int, tokens: int, deadline: Callable[[], float]) -> dict[str, Any]:
    """Output tokens a second of so many requests at once, and the times between the tokens of a request."""
    ids = [prompt(1000 + number, 16) for number in range(requests)]
    gaps: list[float] = []
    lock = threading.Lock()
    start = threading.Barrier(requests + 1)

    def one(number: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=max(1.0, deadline()))
        start.wait(60)
        text = json.dumps(body(ids[number], tokens, stream=True))
        connection.request("POST", "/generate", text, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise ServerFailed(f"/generate: {reply.status} {reply.read()[:500]!r}\n{server.tail()}")
        mine, last, seen = [], None, 0
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                raise ServerFailed(f"/generate: {event['error']}\n{server.tail()}")
            done = event["meta_info"]["completion_tokens"]
            if last is not None and done > seen:
                mine += [(now - last) / (done - seen)] * (done - seen)
            last, seen = now, done
        connection.close()
        with lock:
            gaps.extend(mine)
        return seen

    with ThreadPoolExecutor(requests) as pool:
        futures = [pool.submit(one, number) for number in range(requests)]
        start.wait(60)
        begin = time.perf_counter()
        made = sum(future.result() for future in futures)
        took = time.perf_counter() - begin
    gaps.sort()
    return {
        "tokens_per_s": made / took,
        "tokens": made,
        "p50_ms": 1e3 * gaps[len(gaps) // 2],
        "p99_ms": 1e3 * gaps[len(gaps) * 99 // 100],
    }


def prefill(server: Server, prompts: int, length: int, deadline: Callable[[], float], seed: int) -> dict[str, Any]:
    """Prompt tokens a second: so many prompts in one request, one new token each."""
    ids = [prompt(seed + number, length) for number in range(prompts)]
    begin = time.perf_counter()
    server.post("/generate", {**body([], 1), "input_ids": ids}, deadline())
    took = time.perf_counter() - begin
    return {"tokens_per_s": prompts * length / took, "tokens": prompts * length}
