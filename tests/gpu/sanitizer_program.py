"""A small program for compute-sanitizer: every kernel, form of rows and dtype, in virtual ranks on one GPU; then a rank
alone over symmetric memory. tests/gpu/test_sanitizer.py runs it; PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an
allocation of its own, so that an access past its end is seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from device_oracle import World, experts
from virtual_steps import Steps, make_inputs

from moe_a2a import AllToAll, Config, InputError, Options, RankLost
from moe_a2a.fp8 import quantize
from moe_a2a.virtual import VirtualGroup

DEVICE = torch.device("cuda", torch.cuda.current_device())


def forms() -> None:
    """Odd sizes: no power of two, rows wider than a block, more experts than one program counts."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        steps = Steps(VirtualGroup(Config(39, 1408, 5, 11, dtype), 3, DEVICE, timeout_s=600.0))
        for number, fp8 in enumerate((None, "fp32", "pow2", "ue8m0")):
            steps.step([11, 4, 7], fp8, weights=number % 2 == 0, holes=0.2)
        steps.step([0, 0, 1])
        print("forms", dtype)


def sizes() -> None:
    """One rank, many ranks, more tokens than one scan holds, rows that are FP8 already, a step that is discarded."""
    for ranks, tokens in ((1, 3), (2, 140), (8, 5)):
        group = VirtualGroup(Config(8, 256, 2, tokens), ranks, DEVICE, timeout_s=600.0, fp8_only=True)
        steps = Steps(group)
        steps.step([tokens] * ranks, "fp32")
        steps.step([r % (tokens + 1) for r in range(ranks)], "ue8m0", weights=False)
        inputs = make_inputs(group.config, 1, 0, [tokens] * ranks)
        rows, scales = zip(*[quantize(i.x.to(DEVICE), power_of_two=True) for i in inputs], strict=True)
        group.discard(group.dispatch_send(rows, steps.there([i.topk_ids.int() for i in inputs]), scales=scales))
        group.check()
        print("sizes", ranks, tokens)


def faults() -> None:
    """Wrong ids and a NaN; a rank that does not come, and the steps after that."""
    group = VirtualGroup(Config(8, 256, 2, 5), 2, DEVICE, timeout_s=0.5)
    there = Steps(group).there
    inputs = make_inputs(group.config, 0, 0, [5, 5])
    inputs[1].topk_ids[4, 1], inputs[1].topk_ids[3, 0] = 8, -(1 << 40)
    inputs[0].x[4, 255] = torch.nan
    given = [there([getattr(i, name) for i in inputs]) for name in ("x", "topk_ids", "topk_weights")]
    got = group.dispatch(*given, fp8="fp32")
    group.combine([experts(d.x, d.scales, 0) for d in got], [d.handle for d in got])
    for rank in group.ranks:
        try:
            rank.check()
        except InputError as error:
            print("faults", error)
        else:
            raise AssertionError("what was wrong was not reported")
    for _ in range(3):
        rank = group.ranks[0]
        handle = rank.dispatch_send(*[tensors[0] for tensors in given])
        alone = rank.dispatch_recv(handle)
        rank.combine_send(alone.x, handle)
        rank.combine_recv(handle)
        assert rank.missing(handle) == [1]
        try:
            rank.check()
        except RankLost as error:
            print("faults", error)
        else:
            raise AssertionError("the missing rank was not reported")


def symmetric() -> None:
    """A rank alone, through the public API: its region is symmetric memory."""
    config = Config(4, 256, 2, 5, channels=("a", "b"))
    options = Options(timeout_s=600.0)
    with AllToAll(config, store=dist.HashStore(), rank=0, world_size=1, device=DEVICE, options=options) as a2a:
        for number, (fp8, channel) in enumerate(((None, "a"), ("fp32", "b"), ("ue8m0", "a"), (None, "b"))):
            world = World.make(config, [5 - number], number, DEVICE)
            got = a2a.dispatch(*world.of(0), fp8=fp8, channel=channel)
            out = a2a.combine(experts(got.x, got.scales, 0), got.handle)
            world.check_against_reference(0, got, out, fp8)
        a2a.check()
    print("symmetric")


if __name__ == "__main__":
    forms()
    sizes()
    faults()
    symmetric()
    torch.cuda.synchronize()
    print("done")
