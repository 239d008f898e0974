"""Times of the masked path's kernels, one by one: virtual ranks on one GPU, in CUDA graphs, nothing to wait for.

python bench/kernel_times.py [--json FILE] [--set dispatch_recv._BLOCK_WORDS=512 ...]

Every case is first checked: rows against the kernels' own inputs, and combine against the weighted sum. Times are
medians over graph replays, in microseconds, of one rank's launch; a graph holds LAUNCHES of the same kernel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_a2a import Config
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.layout import Layout
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.step import Phase
from moe_a2a.virtual import VirtualGroup

LAUNCHES, REPLAYS = 20, 30


def graph_us(launch: Callable[[], Any], first: Callable[[], Any] = lambda: None) -> float:
    """Median time of one launch, in a graph of LAUNCHES, with `first` in front of all."""
    first()
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first()
        for _ in range(LAUNCHES):
            launch()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times[3:])


def set_constants(settings: Sequence[str]) -> None:
    """MODULE.NAME=INT: another value for a constant of a module of moe_a2a.kernels."""
    for setting in settings:
        name, value = setting.split("=")
        module, constant = name.split(".")
        target = importlib.import_module(f"moe_a2a.kernels.{module}")
        assert hasattr(target, constant), setting
        setattr(target, constant, int(value))


def case(
    ranks: int, tokens: int, most: int, fp8: ScaleFormat | None, hidden: int, experts: int, top_k: int
) -> dict[str, Any]:
    """Check one case, and time rank 0's kernels in it."""
    config = Config(experts, hidden, top_k, most)
    group = VirtualGroup(config, ranks)
    torch.manual_seed(tokens)
    x = [torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(ranks)]
    ids = [torch.randn(tokens, experts, device="cuda").topk(top_k)[1] for _ in range(ranks)]
    weights = [torch.randn(tokens, top_k, device="cuda").softmax(1) for _ in range(ranks)]
    handles = group.dispatch_send(x, ids, weights, fp8=fp8)
    got = group.dispatch_recv(handles)
    # Experts that return their input: combine gives the token back, since its weights sum to 1.
    y = []
    for d in got:
        rows = d.x.float()
        if d.scales is not None:
            scales = d.scales
            if scales.dtype == torch.int32:
                scales = (scales.contiguous().view(torch.uint8).to(torch.int32) << 23).view(torch.float32)
            rows *= scales[..., : hidden // 128].repeat_interleave(128, 2)
        y.append(rows.to(torch.bfloat16))
    out = group.combine(y, handles)
    group.check()
    error = max(float((o.float() - i.float()).norm() / i.float().norm()) for o, i in zip(out, x, strict=True))
    rows = sum(int(d.counts.sum()) for d in got)
    assert rows == ranks * tokens * top_k and error < (0.04 if fp8 else 0.004), (rows, error)

    rank: MaskedRank = group.ranks[0]
    handle, channel = handles[0], rank._channels[0]

    # A step that is open would keep the next send but one from sending, so that each has a state of its own.
    states = torch.zeros((LAUNCHES, Layout.LIVE_WORDS), dtype=torch.int64, device="cuda")
    unused: list[torch.Tensor] = []

    def forget() -> None:
        states.zero_()
        unused[:] = states.unbind()

    def send() -> None:
        for turns in (channel.eager, channel.captured):
            turns.open.clear()
        channel.live = unused.pop()
        rank.dispatch_send(x[0], ids[0], weights[0], fp8=fp8)

    def again(phase: Phase, launch: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            handle.phase = phase
            handle.turns.open[:] = [handle]
            launch()

        return run

    step = handle.step
    channel.live[Layout.OPEN + step % 2] = step  # combine ended it
    times = {
        "dispatch_recv": graph_us(again(Phase.SENT, lambda: rank.dispatch_recv(handle))),
        "combine_send": graph_us(again(Phase.RECEIVED, lambda: rank.combine_send(y[0], handle))),
        "combine_recv": graph_us(again(Phase.COMBINING, lambda: rank.combine_recv(handle, out=out[0]))),
        "dispatch_send": graph_us(send, forget),
    }
    group.check()
    return {"ranks": ranks, "tokens": tokens, "max_tokens": most, "fp8": fp8, "error": error, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 128])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rows", nargs="*", default=["fp32", "bf16"], help="fp32, pow2, ue8m0 (FP8 scales), bf16")
    parser.add_argument("--set", nargs="*", default=[], metavar="MODULE.NAME=INT", help="a kernel module's constant")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    set_constants(arguments.set)
    results = []
    for rows in arguments.rows:
        for tokens in arguments.tokens:
            fp8 = None if rows == "bf16" else rows
            result = case(
                arguments.ranks,
                tokens,
                max(arguments.max_tokens, tokens),
                fp8,
                arguments.hidden,
                arguments.experts,
                arguments.top_k,
            )
            results.append(result)
            times = {name: round(value, 2) for name, value in result.items() if "_" in name and name != "max_tokens"}
            print(
                f"R={arguments.ranks} T={tokens} {rows}: {times} error {result['error']:.4f} {' '.join(arguments.set)}",
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
