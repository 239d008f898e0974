"""Times of contiguous steps in rounds (`Options.recv_capacity`), one process for each of two GPUs.

    python bench/round_times.py [--tokens 4096] [--num-sms 24 64] [--json FILE]

Prints, for rows in bf16 and rows that are quantised to FP8 on the way, medians of 30 dispatches and 30 combines, with
events around each, for buffers of the whole step and for a half, a fourth and an eighth of it. Routing is random,
sizes are DeepSeek-V3's: rows of 7168, 256 experts, top-8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_a2a import AllToAll, Config, Options

_HIDDEN, _EXPERTS, _TOP_K, _WARM_UP, _STEPS = 7168, 256, 8, 5, 30


def measure(a2a: AllToAll, tokens: int, fp8: str | None) -> tuple[float, float]:
    """Median microseconds of dispatch and of combine on this rank. Collective."""
    generator = torch.Generator(device="cuda").manual_seed(a2a.rank)
    x = torch.randn(tokens, _HIDDEN, generator=generator, device="cuda").to(torch.bfloat16)
    weights, ids = torch.rand(tokens, _EXPERTS, generator=generator, device="cuda").topk(_TOP_K)
    y = torch.zeros(a2a.world_size * tokens, _HIDDEN, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(x)
    events = []
    for _ in range(_WARM_UP + _STEPS):
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        got = a2a.dispatch(x, ids, weights, layout="contiguous", fp8=fp8)
        middle.record()
        a2a.combine(y if fp8 else got.x, got.handle, out=out)
        end.record()
        events.append((begin, middle, end))
    torch.cuda.synchronize()
    a2a.check()
    events = events[_WARM_UP:]
    return (
        statistics.median(begin.elapsed_time(middle) * 1e3 for begin, middle, _ in events),
        statistics.median(middle.elapsed_time(end) * 1e3 for _, middle, end in events),
    )


def rank_main(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    tokens, cases = options.tokens, []
    for fp8 in (None, "fp32"):
        for sms in options.num_sms:
            for part in (None, 2, 4, 8):
                capacity = None if part is None else world * tokens // part
                store = dist.FileStore(f"{folder}/{fp8}.{sms}.{part}", world)
                with AllToAll(
                    Config(_EXPERTS, _HIDDEN, _TOP_K, tokens),
                    store=store,
                    rank=rank,
                    world_size=world,
                    device="cuda",
                    options=Options(recv_capacity=capacity, num_sms=sms, timeout_s=60.0),
                ) as a2a:
                    dispatch, combine = measure(a2a, tokens, fp8)
                    case: dict[str, Any] = {"tokens": tokens, "fp8": fp8, "num_sms": sms, "recv_capacity": capacity}
                    case |= {"buffers_mb": round(a2a.buffer_bytes / 1e6)}
                    case |= {"dispatch_us": round(dispatch), "combine_us": round(combine)}
                cases.append(case)
                if rank == 0:
                    print(case, flush=True)
    if rank == 0 and options.json:
        options.json.write_text(json.dumps({"machine": torch.cuda.get_device_name(), "cases": cases}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each rank")
    parser.add_argument("--num-sms", type=int, nargs="+", default=[24, 64])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if torch.cuda.device_count() < 2:
        raise SystemExit(f"two GPUs are needed, this machine has {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (2, folder, options), nprocs=2)


if __name__ == "__main__":
    main()
