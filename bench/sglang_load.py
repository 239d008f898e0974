"""What bench/sglang_server.py asks of a server: logits of fixed prompts, and throughput."""

from __future__ import annotations

import http.client
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

from sglang_process import Server

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


class Clients:
    """Processes that send requests: one could not read as fast as a server writes. A context manager."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self._count = min(8, requests, os.cpu_count() or 1)
        self._pool = ProcessPoolExecutor(self._count, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def whole(self, server: Server, tokens: int, timeout: float, length: int = 16) -> dict[str, Any]:
        """Output tokens a second of all requests at once, each answered when it is done."""
        made = self._send(server, tokens, timeout, self.requests, False, length)
        return _rate(made)

    def stream(
        self, server: Server, tokens: int, timeout: float, requests: int | None = None, length: int = 16
    ) -> dict[str, Any]:
        """The same of streamed requests, and their latencies in milliseconds: `ttft`, to the first token; `tpot`, from
        token to token, a request's mean; `itl`, from one arrival to the next. length: of prompts."""
        made = self._send(server, tokens, timeout, requests or self.requests, True, length)
        tpot = [(one.arrivals[-1] - one.arrivals[0]) / max(1, one.tokens - 1) for one in made]
        return {
            **_rate(made),
            **_percentiles("ttft", [one.arrivals[0] - one.sent for one in made]),
            **_percentiles("tpot", tpot),
            **_percentiles("itl", [late - early for one in made for early, late in itertools.pairwise(one.arrivals)]),
        }

    def prefill(self, server: Server, prompts: int, length: int, timeout: float, seed: int) -> dict[str, Any]:
        """Prompt tokens a second: so many prompts in one request, one new token each."""
        ids = [prompt(20_000 + seed + number, length) for number in range(prompts)]
        begin = time.monotonic()
        server.post("/generate", {**body([], 1), "input_ids": ids}, timeout)
        return {"tokens_per_s": prompts * length / (time.monotonic() - begin), "tokens": prompts * length}

    def _send(
        self, server: Server, tokens: int, timeout: float, requests: int, stream: bool, length: int
    ) -> list[Answered]:
        ids = [prompt(1000 + number, length) for number in range(requests)]
        shares = [ids[number :: self._count] for number in range(min(requests, self._count))]
        begin = time.monotonic() + 0.3  # all processes have their requests by then
        futures = [self._pool.submit(_requests, server.port, one, tokens, begin, timeout, stream) for one in shares]
        return [answered for future in futures for answered in future.result(timeout + 30)]


def _rate(made: list[Answered]) -> dict[str, Any]:
    tokens = sum(one.tokens for one in made)
    took = max(one.arrivals[-1] for one in made) - min(one.sent for one in made)
    return {"tokens_per_s": tokens / took, "tokens": tokens}


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    return {f"{name}_p{part}_ms": 1e3 * ordered[len(ordered) * part // 100] for part in (50, 99)}


class StreamFailed(Exception):
    """A request that the server refused or ended."""


class Answered(NamedTuple):
    """One request: when it was sent, when new tokens came (s, monotonic), and how many in all."""

    sent: float
    arrivals: list[float]
    tokens: int


def _requests(
    port: int, prompts: list[list[int]], tokens: int, begin: float, timeout: float, stream: bool
) -> list[Answered]:
    """In a process of its own: so many requests at once, sent at `begin`. Raises StreamFailed."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda ids: _request(port, ids, tokens, begin, timeout, stream), prompts))


def _request(port: int, ids: list[int], tokens: int, begin: float, timeout: float, stream: bool) -> Answered:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=max(1.0, timeout))
    text = json.dumps(body(ids, tokens, stream=stream))
    time.sleep(max(0.0, begin - time.monotonic()))
    sent, arrivals, seen = time.monotonic(), [], 0
    try:
        connection.request("POST", "/generate", text, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise StreamFailed(f"/generate: {reply.status} {reply.read()[:500]!r}")
        for event in _events(reply) if stream else [json.loads(reply.read())]:
            now = time.monotonic()
            if "error" in event:
                raise StreamFailed(f"/generate: {event['error']}")
            done = event["meta_info"]["completion_tokens"]
            if done > seen:
                arrivals.append(now)
            seen = done
    except (OSError, http.client.HTTPException) as error:
        raise StreamFailed(f"/generate: {error!r}") from error
    finally:
        connection.close()
    if seen != tokens:
        raise StreamFailed(f"/generate: {seen} tokens of {tokens} came")
    return Answered(sent, arrivals, seen)


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
