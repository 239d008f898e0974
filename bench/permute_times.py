"""Times of permute and unpermute on one GPU, in CUDA graphs, beside plain torch and a copy of the same bytes.

python bench/permute_times.py [--json FILE] [--variants "permute._BLOCK_WORDS=256" "permute._SCALE_ROWS=64 ..." ...]

Every case is first checked against the same calls on the CPU. Times are medians over graph replays, in microseconds,
eager times by the wall clock over many calls. A variant is a list of settings of the kernels' constants: permute is
timed with each of them too, in the same run and on the same inputs, once it has given the same bits.

    permute_us, unpermute_us    our calls; permute with places, source, expert ids and weights by row
    places_us                   permute with rows of 16 bytes: what finding the places costs
    *_floor_us                  bytes that have to be read and written, each once, at 4.2 TB/s
    *_copy_us                   torch's copy of half these bytes: reads and writes as many
    torch_permute_us            stable sort by expert and index_select: no padding, no index maps, rows for holes too
    torch_unpermute_us          index_select back to [T, K, H], times the weights, sum over K
    eager_us                    permute and unpermute without a graph
    variants                    permute_us of each variant
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_times import graph_us, set_constants

from moe_a2a import Permuted, permute, unpermute, worst_case_rows
from moe_a2a.fp8 import quantize
from moe_a2a.kernels import launch
from moe_a2a.workload import make_routing

BYTES_A_SECOND = 4.2e12


def eager_us(call: Callable[[], Any], calls: int = 50) -> float:
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def copy_us(count: int) -> float:
    """Time to read and write `count` bytes in all."""
    source = torch.empty(count // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return graph_us(lambda: target.copy_(source))


def check(got: Any, want: Any, out: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
    """Our results on the GPU against those on the CPU, bit for bit."""
    got.check()
    for name in ("expert_ids", "counts", "offsets", "source", "places", "topk_weights"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    rows = want.source >= 0
    assert torch.equal(got.x.view(torch.uint8).cpu()[rows], want.x.view(torch.uint8)[rows])
    if want.scales is not None:
        assert torch.equal(got.scales.cpu()[rows], want.scales[rows])
    first = 256  # tokens; the CPU sums slowly
    assert torch.equal(out[:first].cpu(), unpermute(y.cpu(), want.places[:first], weights[:first].cpu()))


def check_same(got: Permuted, want: Permuted) -> None:
    """Two results on the GPU, bit for bit, but for rows of padding."""
    rows = want.expert_ids >= 0
    for name in ("expert_ids", "counts", "offsets", "source", "places", "topk_weights"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.x.view(torch.uint8)[rows], want.x.view(torch.uint8)[rows])
    if want.scales is not None and got.scales is not None:
        assert torch.equal(got.scales[rows], want.scales[rows])


@contextlib.contextmanager
def constants(settings: str) -> Iterator[None]:
    """With other values of the kernels' constants."""
    names = [setting.split("=")[0].split(".") for setting in settings.split()]
    modules = [importlib.import_module(f"moe_a2a.kernels.{module}") for module, _ in names]
    kept = [getattr(module, name) for module, (_, name) in zip(modules, names, strict=True)]
    set_constants(settings.split())
    launch._launches.clear()  # a prepared launch keeps the number of warps that it had
    yield
    for module, (_, name), value in zip(modules, names, kept, strict=True):
        setattr(module, name, value)
    launch._launches.clear()


def case(
    tokens: int,
    hidden: int,
    top_k: int,
    experts: int,
    fp8: bool,
    holes: float,
    routing: Any,
    alignment: int,
    variants: list[str],
) -> dict[str, Any]:
    """Check one case, and time it."""
    torch.manual_seed(tokens)
    ids = make_routing(0, 0, 0, tokens, experts, top_k, routing)
    ids = ids.masked_fill(torch.rand(tokens, top_k) < holes, -1)
    x, weights, scales = torch.randn(tokens, hidden).to(torch.bfloat16), torch.rand(tokens, top_k), None
    if fp8:
        x, scales = quantize(x)
    rows = worst_case_rows(tokens, top_k, experts, alignment)
    options: dict[str, Any] = {"alignment": alignment}
    want = permute(x, ids, experts, topk_weights=weights, scales=scales, capacity=rows, **options)
    x, ids, weights = x.cuda(), ids.cuda(), weights.cuda()
    scales = None if scales is None else scales.cuda()
    got = permute(x, ids, experts, topk_weights=weights, scales=scales, **options)
    y = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    out = unpermute(y, got.places, weights)
    check(got, want, out, y, weights)

    row_bytes = hidden * x.element_size() + (0 if scales is None else 4 * scales.shape[1])
    used, read = int((want.source >= 0).sum()), int((want.places >= 0).any(1).sum())
    forward, back = (used + read) * row_bytes, (used + tokens) * hidden * 2
    places = got.places.long().clamp(min=0).flatten()
    row_weights = weights.to(torch.bfloat16).where(ids >= 0, 0)[:, :, None]
    bytes_of_rows = x.view(torch.uint8)

    def torch_permute() -> tuple[torch.Tensor, torch.Tensor | None]:
        token = ids.flatten().argsort(stable=True) // top_k
        return bytes_of_rows.index_select(0, token), None if scales is None else scales.index_select(0, token)

    def torch_unpermute() -> torch.Tensor:
        return (y.index_select(0, places).view(tokens, top_k, hidden) * row_weights).sum(1)

    def our_permute() -> Permuted:
        return permute(x, ids, experts, topk_weights=weights, scales=scales, **options)

    times = {}
    for variant in variants:
        with constants(variant):
            check_same(our_permute(), got)
            times[variant] = graph_us(our_permute)

    narrow = x[:, : 16 // x.element_size()].contiguous()
    return {
        "tokens": tokens,
        "hidden": hidden,
        "top_k": top_k,
        "experts": experts,
        "rows": "fp8" if fp8 else "bf16",
        "holes": holes,
        "routing": routing,
        "alignment": alignment,
        "rows_used": used,
        "rows_held": rows,
        "permute_us": graph_us(our_permute),
        "variants": times,
        "places_us": graph_us(lambda: permute(narrow, ids, experts, topk_weights=weights, **options)),
        "permute_floor_us": forward / BYTES_A_SECOND * 1e6,
        "permute_copy_us": copy_us(forward),
        "torch_permute_us": graph_us(torch_permute),
        "unpermute_us": graph_us(lambda: unpermute(y, got.places, weights, out=out)),
        "unpermute_floor_us": back / BYTES_A_SECOND * 1e6,
        "unpermute_copy_us": copy_us(back),
        "torch_unpermute_us": graph_us(torch_unpermute),
        "eager_us": eager_us(lambda: (our_permute(), unpermute(y, got.places, weights, out=out))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 4096, 8192])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rows", nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--holes", type=float, nargs="*", default=[0.0], help="share of choices that are -1")
    parser.add_argument("--routing", nargs="*", default=["uniform"], help="uniform, zipf, k-hot")
    parser.add_argument("--alignment", type=int, default=128)
    parser.add_argument("--variants", nargs="*", default=[], metavar="SETTINGS", help="MODULE.NAME=INT ...")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results = []
    axes = (arguments.rows, arguments.tokens, arguments.experts, arguments.holes, arguments.routing)
    for rows, tokens, experts, holes, routing in itertools.product(*axes):
        sizes = (tokens, arguments.hidden, arguments.top_k, experts)
        result = case(*sizes, rows == "fp8", holes, routing, arguments.alignment, arguments.variants)
        results.append(result)
        times = {name: round(value, 1) for name, value in result.items() if name.endswith("_us")}
        print(f"T={tokens} E={experts} {rows} holes={holes} {routing}: {times}", flush=True)
        for variant, value in result["variants"].items():
            print(f"    {variant}: permute_us {value:.1f}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
