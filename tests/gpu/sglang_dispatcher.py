"""SGLang's dispatcher layer on the GPUs of this machine, without a server: eager and captured decode, prefill,
two-batch and single-batch overlap, against the oracle of tests/sglang/sglang_steps.py. Needs SGLang and its packages:

    PYTHONPATH=.:SITE python3 tests/gpu/sglang_dispatcher.py [--ranks 2] [--only NAME,NAME]

A process is started for each rank. Every section says whether it passed and how long it took; the exit status is the
number of sections that failed. Times at the end are of a layer's dispatch and combine, with nothing between.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sglang"))

import sglang_env  # noqa: F401  first
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sglang.srt.batch_overlap.single_batch_overlap import CombineOverlapArgs
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLCombineInput, DeepEPNormalCombineInput
from sglang_steps import Batch, Model, Rank, check_overlapped, check_sums, overlapped, run_experts

from moe_a2a.sglang_plugin import activation, buffers

LIMIT_S = 540
LAYERS = 3
DECODE = ((128, 3, 0, 5), (0, 128, 8, 1), (0, 0, 0, 0), (64, 64, 64, 64), (1, 0, 2, 0))
PREFILL = ((1024, 7, 0, 13), (0, 0, 24, 1), (0, 0, 0, 0), (500, 1024, 1024, 24))


def model_of(ranks: int) -> Model:
    return Model(experts=32, hidden=2048, top_k=8, decode_tokens=128, prefill_tokens=1024, ranks=ranks)


class Section:
    """A rank within a section of the program."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.device = torch.device("cuda", rank)
        self._seed = 0

    def make(self, **flags: Any) -> Rank:
        """A model on the buffers of the sections before, if the flags allow it."""
        buffers.close_all()
        return Rank(model_of(self.ranks), self.rank, self.device, LAYERS, **flags)

    def batch(self, made: Rank, tokens: Sequence[int]) -> Batch:
        self._seed += 1
        return made.batch(self._seed, tokens[: self.ranks])

    def check(self) -> None:
        """Anything that kernels have found wrong."""
        buffers.poll()
        for shared in (*buffers._decode.values(), *buffers._prefill.values()):
            shared.a2a.check()


# sections


def eager(section: Section) -> None:
    """Decode and prefill in turn, in every mode, FP8 and bf16."""
    for mode in ("auto", "normal", "low_latency"):
        for dtype in ("fp8", "bf16"):
            made = section.make(deepep_mode=mode, deepep_dispatcher_output_dtype=dtype)
            for decode, prefill in zip(DECODE, PREFILL, strict=False):
                for layer in range(LAYERS):
                    extend = decode if mode == "low_latency" else prefill
                    made.step(layer, section.batch(made, extend), True)
                    made.step(layer, section.batch(made, decode), False)
            section.check()


def captured(section: Section) -> None:
    """Decode graphs of several batch sizes; each rank replays one of its own, with eager steps between."""
    made = section.make(deepep_mode="auto")
    graphs = [capture(section, made, tokens) for tokens in (128, 16, 1)]
    for number in range(12):
        graphs[(number + section.rank) % len(graphs)].replay_and_check(section.batch, number)
        if number % 3 == 0:
            made.step(number % LAYERS, section.batch(made, PREFILL[number % 4]), True)
            made.step(number % LAYERS, section.batch(made, DECODE[number % 5]), False)
        buffers.poll()
    section.check()


class Graph:
    """A captured decode pass of all layers. batches: by layer, of all ranks; this rank's tensors are the graph's."""

    def __init__(self, section: Section, made: Rank, tokens: int) -> None:
        self.made, self.tokens = made, tokens
        self.batches = [section.batch(made, [tokens] * section.ranks) for _ in range(LAYERS)]
        for _ in range(2):
            self.forward()
        torch.cuda.synchronize()
        dist.barrier()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.sums = self.forward()

    def forward(self) -> list[torch.Tensor]:
        made, sums = self.made, []
        set_is_extend_in_batch(False)
        for layer, batch in zip(made.layers, self.batches, strict=True):
            output = layer.dispatch(hidden_states=batch.x[made.rank], topk_output=batch.topk(made.rank))
            sums.append(layer.combine(combine_input=run_experts(made.model, made.rank, output)))
        return sums

    def replay_and_check(self, make: Callable[..., Batch], number: int) -> None:
        """With other tokens in it."""
        rank = self.made.rank
        for kept in self.batches:
            new = make(self.made, [self.tokens] * self.made.model.ranks)
            for mine, theirs in ((kept.x, new.x), (kept.ids, new.ids), (kept.weights, new.weights)):
                mine[rank].copy_(theirs[rank])
        self.graph.replay()
        for batch, out in zip(self.batches, self.sums, strict=True):
            check_sums(self.made.model, rank, batch, out, self.made.fp8(False))


def capture(section: Section, made: Rank, tokens: int) -> Graph:
    dist.barrier()
    return Graph(section, made, tokens)


def two_batches(section: Section) -> None:
    """Two-batch overlap in both phases, eager."""
    made = section.make(deepep_mode="auto", enable_two_batch_overlap=True)
    pairs = ((DECODE[0], DECODE[1]), (DECODE[2], DECODE[3]), (DECODE[3], DECODE[4]))
    for _ in range(3):
        for extend in (True, False):
            for pair in zip(PREFILL, reversed(PREFILL), strict=True) if extend else pairs:
                batches = [[section.batch(made, tokens) for _ in range(LAYERS)] for tokens in pair]
                check_overlapped(made, overlapped(made, batches, extend), extend)
            made.step(0, section.batch(made, DECODE[0]), extend)
    # Without checks between dispatch and experts, which wait for the device: this is how it runs.
    for _ in range(20):
        batches = [[section.batch(made, tokens) for _ in range(LAYERS)] for tokens in (PREFILL[0], PREFILL[3])]
        check_overlapped(made, overlapped(made, batches, True, check=False), True)
    section.check()


def two_batches_captured(section: Section) -> None:
    """Two-batch overlap in a decode graph."""
    made = section.make(deepep_mode="auto", enable_two_batch_overlap=True)
    tokens = [64] * section.ranks
    batches = [[section.batch(made, tokens) for _ in range(LAYERS)] for _ in (0, 1)]
    for _ in range(2):
        check_overlapped(made, overlapped(made, batches, False, check=False), False)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        states = overlapped(made, batches, False, check=False)
    for _ in range(10):
        for state in states:
            for kept in state.batches:
                new = section.batch(made, tokens)
                for mine, theirs in ((kept.x, new.x), (kept.ids, new.ids), (kept.weights, new.weights)):
                    mine[made.rank].copy_(theirs[made.rank])
        graph.replay()
        check_overlapped(made, states, False)
        batches = [[section.batch(made, t) for _ in range(LAYERS)] for t in (PREFILL[0], PREFILL[3])]
        check_overlapped(made, overlapped(made, batches, True, check=False), True)
    section.check()


def single_batch(section: Section) -> None:
    """Single-batch overlap: a hook between the halves of a dispatch, and a combine on a stream of SGLang's."""
    made = section.make(deepep_mode="auto")
    dispatcher, stream, calls = made.layers[0], torch.cuda.Stream(), []

    def hook(inner: Any) -> None:
        calls.append(inner)
        for handle in handles:
            handle.remove()

    for number in range(8):
        overlap = CombineOverlapArgs(overlap=number % 2 == 0, stream=stream, wait_event=torch.cuda.Event())
        handles = dispatcher.register_deepep_dispatch_hook(hook)
        batch = section.batch(made, DECODE[number % 5])
        set_is_extend_in_batch(False)
        output = dispatcher.dispatch(hidden_states=batch.x[made.rank], topk_output=batch.topk(made.rank))
        dispatcher.set_overlap_args(combine_overlap_args=overlap, meta_overlap_args={})
        combine_input = run_experts(made.model, made.rank, output)
        overlap.wait_event.record()
        beside = torch.randn(2048, 2048, device=section.device) @ torch.randn(2048, 2048, device=section.device)
        out = dispatcher.combine(combine_input=combine_input)
        dispatcher.clear_overlap_args()
        del combine_input, output, beside
        torch.full((64, 1024, 1024), 7.0, device=section.device)  # takes the memory of what was let go
        check_sums(made.model, made.rank, batch, out, made.fp8(False))
    assert len(calls) == 8
    section.check()


def not_finite(section: Section) -> None:
    """A NaN in rows without a token, and in one token: other tokens keep their sums, and nothing is raised."""
    made = section.make(deepep_mode="auto")
    before = buffers._not_finite
    for extend in (False, True):
        for _ in range(3):
            batch = section.batch(made, [64] * section.ranks)
            for x, ids in zip(batch.x, batch.ids, strict=True):
                ids[5] = -1
                x[5], x[7, 100] = torch.nan, torch.inf
            set_is_extend_in_batch(extend)
            dispatcher = made.layers[0]
            output = dispatcher.dispatch(hidden_states=batch.x[made.rank], topk_output=batch.topk(made.rank))
            out = dispatcher.combine(combine_input=run_experts(made.model, made.rank, output))
            assert bool((out[5] == 0).all())
            keep = torch.tensor([t for t in range(64) if t != 7], device=section.device)
            parts = Batch(*[[t[keep] for t in ts] for ts in (batch.x, batch.ids, batch.weights)])
            for x in parts.x:
                x[5] = 0  # has no experts; but NaN times 0 is NaN
            check_sums(made.model, made.rank, parts, out[keep], made.fp8(extend))
            torch.cuda.synchronize()
            time.sleep(0.1)
            buffers.poll()
    buffers.poll()
    assert buffers._not_finite > before


def times(section: Section) -> None:
    """What a layer's dispatch and combine take, at DeepSeek-V3's sizes."""
    model = Model(experts=256, hidden=7168, top_k=8, decode_tokens=128, prefill_tokens=4096, ranks=section.ranks)
    buffers.close_all()
    made = Rank(model, section.rank, section.device, 1, deepep_mode="auto")
    layer, rank = made.layers[0], section.rank

    def once(batch: Batch, y: Any) -> Any:
        output = layer.dispatch(hidden_states=batch.x[rank], topk_output=batch.topk(rank))
        kind = DeepEPLLCombineInput if len(output) == 6 else DeepEPNormalCombineInput
        rows = torch.empty(output.hidden_states.shape, dtype=torch.bfloat16, device=section.device) if y is None else y
        layer.combine(combine_input=kind(rows, output.topk_ids, output.topk_weights))
        return rows

    for tokens in (16, 64, 128):
        set_is_extend_in_batch(False)
        batch = made.batch(tokens, [tokens] * section.ranks)
        y = once(batch, None)
        once(batch, y)
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(20):
                once(batch, y)
        say(section, f"decode, {tokens} tokens, in a graph: {timed(graph.replay, 10) / 20:.1f} us a layer")
        say(section, f"decode, {tokens} tokens, eager: {timed(lambda b=batch, y=y: once(b, y), 50):.1f} us a layer")
    for tokens in (512, 4096):
        set_is_extend_in_batch(True)
        batch = made.batch(tokens, [tokens] * section.ranks)
        y = once(batch, None)
        say(section, f"prefill, {tokens} tokens, eager: {timed(lambda b=batch, y=y: once(b, y), 20):.1f} us a layer")
    section.check()


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds of a call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats * 1e6


def say(section: Section, text: str) -> None:
    if section.rank == 0:
        print(f"  {text}", flush=True)


SECTIONS = (eager, captured, two_batches, two_batches_captured, single_batch, not_finite, times)


def main(rank: int, ranks: int, port: int, names: Sequence[str], failed: Any) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.cuda.set_device(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    # What an FP8 server has, whether or not DeepGEMM is installed here.
    deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    activation.provide_sms(type("Args", (), {"moe_a2a_backend": "mooncake"}))
    for section in SECTIONS:
        if names and section.__name__ not in names:
            continue
        started, error = time.perf_counter(), ""
        try:
            with torch.inference_mode():
                section(Section(rank, ranks))
        except Exception:
            error = traceback.format_exc()
            failed[rank] += 1
        seconds = time.perf_counter() - started
        if error or rank == 0:
            verdict = f"FAILED\n{error}" if error else "passed"
            print(f"rank {rank}: {section.__name__} {verdict} in {seconds:.1f} s", flush=True)
        if error:  # the other ranks wait for this one in vain, in later sections too
            time.sleep(5)  # for what they have to say
            os._exit(1)
    buffers.close_all()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--only", default="", help="names of sections, with commas")
    given = parser.parse_args()
    counts = mp.get_context("spawn").Array("i", given.ranks)
    mp.spawn(
        main, (given.ranks, 29500 + os.getpid() % 1000, [n for n in given.only.split(",") if n], counts), given.ranks
    )
    sys.exit(sum(counts))
