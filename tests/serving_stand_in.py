"""A small HTTP server that answers as an SGLang server does, as far as the serving benchmark asks. It has no model.

    python serving_stand_in.py --port 30000 [--cut-every 5] [--refuse-every 7] [--token-ms 1]

A real server on a real socket: `/generate` streams events in chunks, cumulative text as SGLang sends it.
`--cut-every N` closes every Nth stream in the middle, without the chunk that ends a body, which is how a server or a
router that gives up looks to a client; `--refuse-every N` answers every Nth request with 503. `/health` answers 200, or
503 for the first `--unhealthy-s` seconds. It prints a line when it serves, and one when SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import resource
import signal
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

BACKLOG = 2048  # as uvicorn


class StandIn:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.generated = itertools.count(1)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other, until the client closes it."""
        try:
            while line := await reader.readline():
                if not line.endswith(b" HTTP/1.1\r\n"):  # the router asks whether this is gRPC
                    break
                method, path, _ = line.decode().split(" ", 2)
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.strip().lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self.answer(writer, method, path.partition("?")[0], body):
                    break
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):  # they left, or this server ends
            pass
        finally:
            writer.close()

    async def answer(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> bool:
        """Answer one request. False if the connection is to be closed."""
        if path == "/generate":
            return await self.generate(writer, json.loads(body))
        if path in ("/health", "/health_generate"):
            warming = time.monotonic() - self.started < self.args.unhealthy_s
            self.send(writer, 503 if warming else 200, {})
        elif path in ("/v1/models", "/get_model_info", "/model_info"):
            self.send(writer, 200, {"data": [{"id": self.args.model_path}], "model_path": self.args.model_path})
        elif path in ("/server_info", "/get_server_info"):
            self.send(writer, 200, {"internal_states": [{}], "disaggregation_mode": self.args.mode})
        elif path == "/flush_cache":
            self.send(writer, 200, {})
        else:
            self.send(writer, 404, {"error": f"the stand-in has no {method} {path}"})
        return True

    def send(self, writer: asyncio.StreamWriter, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def generate(self, writer: asyncio.StreamWriter, request: dict[str, Any]) -> bool:
        number = next(self.generated)
        args = self.args
        late = args.refuse_after is not None and number > args.refuse_after
        if late or (args.refuse_every and number % args.refuse_every == 0):
            self.send(writer, 503, {"error": "the stand-in refuses this one"})
            return True
        tokens = request["sampling_params"]["max_new_tokens"]
        prompt = len(request["input_ids"]) if "input_ids" in request else len(request["text"].split())
        if not request.get("stream", False):
            await asyncio.sleep((args.first_ms + tokens * args.token_ms) / 1000)
            self.send(writer, 200, self.event(tokens, prompt))
            return True
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        await asyncio.sleep(args.first_ms / 1000)
        cut_at = tokens // 2 if args.cut_every and number % args.cut_every == 0 else None
        for token in range(1, tokens + 1):
            if token == cut_at:
                return False
            self.chunk(writer, b"data: " + json.dumps(self.event(token, prompt)).encode() + b"\n\n")
            await writer.drain()
            await asyncio.sleep(args.token_ms / 1000)
        self.chunk(writer, b"data: [DONE]\n\n")
        self.chunk(writer, b"")
        return True

    def event(self, tokens: int, prompt: int) -> dict[str, Any]:
        return {"text": "a " * tokens, "meta_info": {"prompt_tokens": prompt, "completion_tokens": tokens}}

    def chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def serve(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, (lambda: None) if args.ignore_term else stop.set)
    server = await asyncio.start_server(StandIn(args).connection, args.host, args.port, backlog=BACKLOG)
    port = server.sockets[0].getsockname()[1]
    print(f"stand-in for a server (no model), mode {args.mode}: serving on {args.host}:{port}", flush=True)
    await stop.wait()
    print("stand-in: ended by a signal", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A server without a model, for tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one, and the first line says which.")
    parser.add_argument("--mode", default="null", help="What /server_info calls the disaggregation mode.")
    parser.add_argument(
        "--model-path", default="stand-in", help="What /model_info says; clients load a tokenizer there."
    )
    parser.add_argument("--first-ms", type=float, default=2.0, help="Until the first token.")
    parser.add_argument("--token-ms", type=float, default=1.0, help="Between tokens.")
    parser.add_argument("--cut-every", type=int, default=0)
    parser.add_argument("--refuse-every", type=int, default=0)
    parser.add_argument("--refuse-after", type=int, help="Every request after so many.")
    parser.add_argument("--unhealthy-s", type=float, default=0.0)
    parser.add_argument("--ignore-term", action="store_true", help="Go on after SIGTERM.")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    asyncio.run(serve(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
