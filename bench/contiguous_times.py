"""Times of contiguous dispatch and combine between GPUs of one host, through the public API.

torchrun --nproc-per-node 2 bench/contiguous_times.py [--tokens 4096 8192] [--sms 16 24] [--json FILE]
    [--set contiguous_combine._UNIT=8 contiguous_combine.L.CHUNK=32 ...]

Every case is first checked on the device: each row against the input of its source, and combine, with experts that
return their input, against the number of ranks that a token went to. Then every rank queues all steps before it waits
for one. Times are medians over steps in microseconds, of the slower rank; `parts` are the launches of a dispatch one by
one. The floor is what one direction of the link needs for the rows that leave a GPU, at --link GB/s.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Config, Contiguous, Options
from moe_a2a.fp8 import ScaleFormat, quantize
from moe_a2a.gpu import contiguous as host
from moe_a2a.gpu.layout import Layout
from moe_a2a.workload import make_routing

_WARM_UP = 6


class Case:
    """One combination of sizes, on this rank."""

    def __init__(self, arguments: argparse.Namespace, tokens: int, rows: str, sms: int, routing: Any) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.tokens, self.routing, self.iterations = tokens, routing, arguments.iterations
        self.fp8: ScaleFormat | None = None if rows == "bf16" else rows  # type: ignore[assignment]
        config = Config(arguments.experts, arguments.hidden, arguments.top_k, tokens)
        self.a2a = AllToAll(config, device="cuda", options=Options(num_sms=sms))
        self.everyone = [self._inputs(rank) for rank in range(self.world)]
        self.x, self.ids, self.weights = self.everyone[self.rank]

    def _inputs(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.a2a.config
        generator = torch.Generator(self.device).manual_seed(rank)
        shape = (self.tokens, config.hidden_size)
        x = torch.randn(shape, device=self.device, generator=generator).to(torch.bfloat16)
        ids = make_routing(1, rank, 0, self.tokens, config.num_experts, config.top_k, self.routing).to(self.device)
        weights = torch.rand(ids.shape, device=self.device, generator=generator)
        return x, ids, weights

    def dispatch(self, **options: Any) -> Contiguous:
        return self.a2a.dispatch(self.x, self.ids, self.weights, layout="contiguous", fp8=self.fp8, **options)

    def follow(self, like: Contiguous) -> Contiguous:
        return self.a2a.dispatch(self.x, layout="contiguous", fp8=self.fp8, like=like.handle)

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
            rows, scales = (x, None) if self.fp8 is None else quantize(x, power_of_two=self.fp8 != "fp32")
            assert torch.equal(got.x[:n].view(torch.uint8), rows.view(torch.uint8)), "rows"
            if self.fp8 in ("fp32", "pow2"):
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

        known = steps(lambda: self.follow(first))
        fresh = steps(self.dispatch)
        parts = self._parts(y, out)
        graph = self._graph(y, out)
        self.a2a.check()
        return {"known": known, "fresh": fresh, "parts": parts, "graph": graph}

    def _parts(self, y: torch.Tensor, out: torch.Tensor) -> dict[str, float]:
        rank = self.a2a._backend.contiguous  # type: ignore[attr-defined]
        marks = [[_event() for _ in range(6)] for _ in range(_WARM_UP + self.iterations)]
        dist.barrier()
        for a, b, c, d, e, f in marks:
            a.record()
            handle = rank.dispatch_layout(self.x, self.ids, self.weights, fp8=self.fp8)
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
        return leave * (config.row_bytes if self.fp8 is None else config.hidden_size + 4 * config.groups) / link / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _set(setting: str) -> None:
    name, value = setting.split("=")
    *path, last = name.split(".")
    if path == ["L"]:
        target: Any = Layout
    elif path == ["host"]:
        target = host
    else:
        target = importlib.import_module(f"moe_a2a.kernels.{path[0]}")
    assert hasattr(target, last), setting
    setattr(target, last, int(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096])
    parser.add_argument("--rows", nargs="*", default=["bf16", "fp32"], help="bf16, or fp32, pow2, ue8m0 (FP8 scales)")
    parser.add_argument("--sms", type=int, nargs="*", default=[24])
    parser.add_argument("--routing", nargs="*", default=["uniform"])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--link", type=float, default=391.0, help="GB/s of one direction")
    parser.add_argument("--set", nargs="*", default=[], metavar="MODULE.NAME=INT", help="a constant; host.NAME, L.NAME")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    for setting in arguments.set:
        _set(setting)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    results = []
    for routing in arguments.routing:
        for tokens in arguments.tokens:
            for rows in arguments.rows:
                for sms in arguments.sms:
                    case = Case(arguments, tokens, rows, sms, routing)
                    mine = {**case.times(case.check()), "floor": case.floor(arguments.link)}
                    every: list[Any] = [None] * case.world
                    dist.all_gather_object(every, mine)
                    worst = {
                        name: max(one[name] for one in every)
                        if name == "floor"
                        else {part: round(max(one[name][part] for one in every), 1) for part in mine[name]}
                        for name in mine
                    }
                    heading = {"tokens": tokens, "rows": rows, "sms": sms, "routing": routing, "set": arguments.set}
                    results.append({**heading, "buffer_bytes": case.a2a.buffer_bytes, "us": worst})
                    case.a2a.close()
                    if case.rank == 0:
                        print(
                            f"T={tokens} {rows} {sms} SMs {routing} {' '.join(arguments.set)}\n"
                            f"    known {worst['known']} fresh {worst['fresh']} floor {worst['floor']:.0f}\n"
                            f"    parts {worst['parts']} graph {worst['graph']}",
                            flush=True,
                        )
                    del case
                    torch.cuda.empty_cache()
    if arguments.json and dist.get_rank() == 0:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
