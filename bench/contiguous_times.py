"""Times of contiguous dispatch and combine between GPUs of one host, through the public API.

torchrun --nproc-per-node 2 bench/contiguous_times.py [--tokens 4096 8192] [--sms 16 24] [--rows bf16 given fp32]
    [--variants "" "contiguous_send._STAGES=1 contiguous_combine._STAGES=1" ...] [--parts] [--graph] [--json FILE]

A variant is a list of settings of the modules' constants; "" is none. One process measures all of them. Rows: bf16;
given: FP8 with scales, as they are; fp32, pow2, ue8m0: quantised on the way, for scales in that form.

Every case is first checked on the device: each row against the input of its source, and combine, with experts that
return their input, against the number of ranks that a token went to. Then every rank queues all steps before it waits
for one. Times are medians over steps in microseconds, of the slower rank: known (the routing is an earlier step's) and
fresh steps; parts: the launches of a dispatch one by one; graph: a step of a captured graph. The floor is what one
direction of the link needs for the rows that leave a GPU, at --link GB/s; --push measures that speed: a kernel does
nothing but store rows into the next GPU, all GPUs at once.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from moe_a2a import AllToAll, Config, Contiguous
from moe_a2a.fp8 import ScaleFormat, quantize
from moe_a2a.gpu import contiguous as host
from moe_a2a.workload import make_routing

_WARM_UP = 6


@triton.jit
def _push(
    x, to, rows, WORDS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """x: int32 [rows, WORDS], stored at the address `to`."""
    PARTS: tl.constexpr = (WORDS + PART - 1) // PART
    for item in tl.range(tl.program_id(0), rows // ROWS * PARTS, tl.num_programs(0), num_stages=STAGES):
        row = item // PARTS * ROWS + tl.arange(0, ROWS)
        w = item % PARTS * PART + tl.arange(0, PART)
        inside = (row < rows)[:, None] & (w < WORDS)[None, :]
        place = (row.to(tl.int64) * WORDS)[:, None] + w[None, :]
        words = tl.load(x + place, mask=inside)
        tl.store(tl.multiple_of(to.to(tl.pointer_type(tl.int32)), 16) + place, words, mask=inside, cache_modifier=STORE)


class Case:
    """One combination of sizes, on this rank."""

    def __init__(self, arguments: argparse.Namespace, tokens: int, routing: Any) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.tokens, self.routing, self.iterations = tokens, routing, arguments.iterations
        self.with_parts, self.with_graph = arguments.parts, arguments.graph
        self.a2a = AllToAll(Config(arguments.experts, arguments.hidden, arguments.top_k, tokens), device="cuda")
        self.everyone = [self._inputs(rank) for rank in range(self.world)]
        self.x, self.ids, self.weights = self.everyone[self.rank]
        self.given = quantize(self.x)
        self.use("bf16", 24)

    def use(self, rows: str, sms: int) -> None:
        """What the next steps are like."""
        self.rows = rows
        self.fp8: ScaleFormat | None = None if rows in ("bf16", "given") else rows  # type: ignore[assignment]
        self.arguments = {"fp8": self.fp8, "layout": "contiguous"}
        if rows == "given":
            self.arguments["scales"] = self.given[1]
        self.sent = self.given[0] if rows == "given" else self.x
        self.a2a._backend.contiguous.use_sms(sms)  # type: ignore[attr-defined]

    def _inputs(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.a2a.config
        generator = torch.Generator(self.device).manual_seed(rank)
        shape = (self.tokens, config.hidden_size)
        x = torch.randn(shape, device=self.device, generator=generator).to(torch.bfloat16)
        ids = make_routing(1, rank, 0, self.tokens, config.num_experts, config.top_k, self.routing).to(self.device)
        weights = torch.rand(ids.shape, device=self.device, generator=generator)
        return x, ids, weights

    def dispatch(self, **options: Any) -> Contiguous:
        return self.a2a.dispatch(self.sent, self.ids, self.weights, **self.arguments, **options)

    def follow(self, like: Contiguous) -> Contiguous:
        return self.a2a.dispatch(self.sent, **self.arguments, like=like.handle)

    def check(self) -> torch.Tensor:
        """Raises AssertionError. Returns experts' outputs for the received rows."""
        local, most = self.a2a.local_experts, self.a2a.config.max_tokens_per_rank
        y, first = torch.empty(0), None
        for _ in range(3):
            got = self.dispatch() if first is None else self.follow(first)
            first = first or got
            n = int(got.tokens_per_rank.sum())
            source = got.source[:n].long()
            x = torch.cat([x for x, _, _ in self.everyone])[source // most * self.tokens + source % most]
            ids = torch.cat([ids for _, ids, _ in self.everyone])[source // most * self.tokens + source % most]
            mine = (ids // local == self.rank) & (ids >= 0)
            assert bool((source[1:] > source[:-1]).all()), "order of rows"
            assert torch.equal(got.topk_ids[:n], torch.where(mine, ids - local * self.rank, -1)), "ids"
            assert bool(mine.any(dim=1).all()) and bool((got.topk_ids[n:] == -1).all()), "rows without experts"
            total = sum(int(((i // local == self.rank) & (i >= 0)).any(dim=1).sum()) for _, i, _ in self.everyone)
            assert n == total, f"{n} rows, expected {total}"
            rows, scales = x, None
            if self.rows != "bf16":
                rows, scales = quantize(x, power_of_two=self.rows in ("pow2", "ue8m0"))
            assert torch.equal(got.x[:n].view(torch.uint8), rows.view(torch.uint8)), "rows"
            if self.rows in ("given", "fp32", "pow2"):
                assert got.scales is not None and scales is not None and torch.equal(got.scales[:n], scales), "scales"
            y = torch.full(got.x.shape, float("nan"), dtype=torch.bfloat16, device=self.device)
            y[:n] = x
            out = self.a2a.combine(y, got.handle)
            went = sum(((self.ids // local == r) & (self.ids >= 0)).any(dim=1, keepdim=True) for r in range(self.world))
            assert torch.equal(out, (self.x.float() * went).to(torch.bfloat16)), "sums"
        self.a2a.check()
        return y

    def times(self, y: torch.Tensor) -> dict[str, Any]:
        out = torch.empty_like(self.x)
        first = self.dispatch()
        self.a2a.combine(y, first.handle, out=out)

        def steps(dispatch: Callable[[], Contiguous]) -> dict[str, float]:
            marks = [[_event() for _ in range(3)] for _ in range(_WARM_UP + self.iterations)]
            dist.barrier()
            for start, middle, end in marks:
                start.record()
                got = dispatch()
                middle.record()
                self.a2a.combine(y, got.handle, out=out)
                end.record()
            torch.cuda.synchronize()
            kept = marks[_WARM_UP:]
            return {
                "dispatch": statistics.median(1e3 * a.elapsed_time(b) for a, b, _ in kept),
                "combine": statistics.median(1e3 * b.elapsed_time(c) for _, b, c in kept),
            }

        measured = {"known": steps(lambda: self.follow(first)), "fresh": steps(self.dispatch)}
        if self.with_parts:
            measured["parts"] = self._parts(y, out)
        if self.with_graph:
            measured["graph"] = self._graph(y, out)
        self.a2a.check()
        return measured

    def push(self, sms: int, warps: int, stages: int, modifier: str) -> float:
        """GB/s of one direction, while the others go the other way."""
        state = self.a2a._backend.rank._channels[0]  # type: ignore[attr-defined]
        layout = self.a2a._backend.rank.layout  # type: ignore[attr-defined]
        to = int(state.peers[(self.rank + 1) % self.world]) + layout.rows
        words = self.x.view(torch.int32)
        marks = [_event() for _ in range(12)]
        dist.barrier()
        for mark in marks:
            mark.record()
            _push[(sms,)](words, to, self.tokens, words.shape[1], 16, 512, stages, modifier, num_warps=warps)
        torch.cuda.synchronize()
        dist.barrier()
        took = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks[2:]))
        return words.numel() * 4 / took / 1e6

    def _parts(self, y: torch.Tensor, out: torch.Tensor) -> dict[str, float]:
        rank = self.a2a._backend.contiguous  # type: ignore[attr-defined]
        marks = [[_event() for _ in range(6)] for _ in range(_WARM_UP + self.iterations)]
        dist.barrier()
        for a, b, c, d, e, f in marks:
            a.record()
            scales = self.arguments.get("scales")
            handle = rank.dispatch_layout(self.sent, self.ids, self.weights, fp8=self.fp8, scales=scales)
            b.record()
            rank.dispatch_rows(handle)
            c.record()
            rank.dispatch_recv(handle)
            d.record()
            rank.combine_send(y, handle)
            e.record()
            rank.combine_recv(handle, out=out)
            f.record()
        torch.cuda.synchronize()
        names = ("layout", "send", "recv", "combine_send apart", "combine_recv apart")
        return {
            name: statistics.median(1e3 * m[i].elapsed_time(m[i + 1]) for m in marks[_WARM_UP:])
            for i, name in enumerate(names)
        }

    def _graph(self, y: torch.Tensor, out: torch.Tensor) -> dict[str, float]:
        """Mean step of a graph of 10, fresh routing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                self.a2a.combine(y, self.dispatch().handle, out=out)
        ends = [_event() for _ in range(9)]
        dist.barrier()
        for event in ends:
            event.record()
            graph.replay()
        torch.cuda.synchronize()
        return {"both": statistics.median(100 * a.elapsed_time(b) for a, b in itertools.pairwise(ends[2:]))}

    def floor(self, link: float) -> float:
        owner = self.ids // self.a2a.local_experts
        leave = sum(int(((owner == r) & (self.ids >= 0)).any(dim=1).sum()) for r in range(self.world) if r != self.rank)
        config = self.a2a.config
        return (
            leave * (config.row_bytes if self.rows == "bf16" else config.hidden_size + 4 * config.groups) / link / 1e3
        )


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Settings:
    """Constants of modules, changed for a while."""

    def __init__(self, text: str) -> None:
        self._kept: list[tuple[Any, str, Any]] = []
        for setting in text.split():
            name, value = setting.split("=")
            module, constant = name.split(".")
            target = host if module == "host" else importlib.import_module(f"moe_a2a.kernels.{module}")
            assert hasattr(target, constant), setting
            self._kept.append((target, constant, getattr(target, constant)))
            setattr(target, constant, int(value) if value.lstrip("-").isdigit() else value)

    def undo(self) -> None:
        for target, constant, value in self._kept:
            setattr(target, constant, value)


def _measure(case: Case, link: float) -> dict[str, Any]:
    """Figures of the slower rank."""
    mine = {**case.times(case.check()), "floor": {"link": case.floor(link)}}
    every: list[Any] = [None] * case.world
    dist.all_gather_object(every, mine)
    return {name: {part: round(max(one[name][part] for one in every), 1) for part in mine[name]} for name in mine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096])
    parser.add_argument("--rows", nargs="*", default=["bf16", "given"], help="bf16, given, fp32, pow2, ue8m0")
    parser.add_argument("--sms", type=int, nargs="*", default=[24])
    parser.add_argument("--variants", nargs="*", default=[""], metavar="SETTINGS", help="MODULE.NAME=VALUE ...")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--push", action="store_true", help="first measure the link")
    parser.add_argument("--routing", nargs="*", default=["uniform"])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--link", type=float, default=391.0, help="GB/s of one direction")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no variant after so long")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    leader, results = dist.get_rank() == 0, []
    for routing, tokens in itertools.product(arguments.routing, arguments.tokens):
        case = Case(arguments, tokens, routing)
        if arguments.push:
            for sms, warps, stages, store in itertools.product(arguments.sms, (8, 32), (1, 4), ("", ".wt")):
                speed = case.push(sms, warps, stages, store)
                if leader:
                    print(f"push {sms} SMs {warps} warps {stages} stages {store!r}: {speed:.0f} GB/s", flush=True)
        for variant, rows, sms in itertools.product(arguments.variants, arguments.rows, arguments.sms):
            late = [time.monotonic() - began > arguments.seconds]
            dist.broadcast_object_list(late)
            if late[0]:
                continue
            settings = Settings(variant)
            case.use(rows, sms)
            us = _measure(case, arguments.link)
            settings.undo()
            heading = {"tokens": tokens, "rows": rows, "sms": sms, "routing": routing, "variant": variant}
            results.append({**heading, "buffer_bytes": case.a2a.buffer_bytes, "us": us})
            if leader:
                figures = " | ".join(f"{name} {' '.join(f'{k} {v}' for k, v in us[name].items())}" for name in us)
                print(f"{time.monotonic() - began:5.1f} s T={tokens} {rows} {sms} SMs {variant}: {figures}", flush=True)
        case.a2a.close()
        del case
        torch.cuda.empty_cache()
    if arguments.json and leader:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
