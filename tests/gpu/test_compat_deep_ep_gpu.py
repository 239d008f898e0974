"""DeepEP's Buffer on GPU ranks, against the oracle: processes on one or two GPUs."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from deep_ep_masks import hangs, masked_by_hand
from deep_ep_steps import FORMS, Program, Received, all_forms, dropped, parts, refused, sizes, two_batches
from ranks import Ctx, run_ranks
from test_compat_deep_ep import EXAMPLE, run_example

from moe_a2a import HandleError, InputError, Options
from moe_a2a.compat.deep_ep import Buffer

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU"),
    pytest.mark.timeout(300),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
PLACES = [
    pytest.param((0, 1), id="two GPUs", marks=two_gpus),
    pytest.param((0, 1, 0, 1), id="four ranks on two GPUs", marks=two_gpus),
    pytest.param((0, 0), id="two ranks on one GPU"),
]
PAIR = (0, GPUS - 1)


@pytest.mark.parametrize("gpus", PLACES)
def test_every_form_and_every_way_to_wait_matches_the_oracle(gpus: tuple[int, ...]) -> None:
    run_ranks(all_forms, len(gpus), gpus)


@pytest.mark.parametrize("ranks_do", [two_batches, dropped, parts, sizes])
def test_what_cpu_ranks_do_gpu_ranks_do(ranks_do: Any) -> None:
    run_ranks(ranks_do, 2, PAIR)


# ----------------------------------------------------------------------------------------------------------- captures


class Captured:
    """A layer of one or two micro-batches in a CUDA graph, with static inputs, as SGLang captures a decode step."""

    def __init__(self, program: Program, tokens: int, form: str, how: str, batches: int) -> None:
        self.program, self.tokens, self.form = program, tokens, form
        device = program.device
        self.x = [torch.zeros(tokens, program.hidden, dtype=torch.bfloat16, device=device) for _ in range(batches)]
        self.ids = [torch.zeros(tokens, program.top_k, dtype=torch.int64, device=device) for _ in range(batches)]
        self.weights = [torch.zeros(tokens, program.top_k, device=device) for _ in range(batches)]
        self.y = program.there(program.outputs(0)[program.rank])
        self.stats = torch.zeros(program.experts // program.world, dtype=torch.int32, device=device)
        self.options = {"return_recv_hook": how == "hook", "async_finish": how == "event"}
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self._layer()

    def _end(self, event: Any, hook: Any) -> None:
        if hook is not None:
            hook()
        elif event.event is not None:
            event.current_stream_wait()

    def _layer(self) -> list[Any]:
        buffer, program = self.program.buffer, self.program
        started = [
            buffer.low_latency_dispatch(
                x,
                ids,
                program.most,
                program.experts,
                cumulative_local_expert_recv_stats=self.stats,
                **FORMS[self.form][0],
                **self.options,
            )
            for x, ids in zip(self.x, self.ids, strict=True)
        ]
        sums = []
        for (recv, count, handle, event, hook), ids, weights in zip(started, self.ids, self.weights, strict=True):
            self._end(event, hook)
            out, event, hook = buffer.low_latency_combine(self.y, ids, weights, handle, **self.options)
            sums.append((recv, count, handle, out, event, hook))
        for *_, event, hook in sums:
            self._end(event, hook)
        return [entry[:4] for entry in sums]

    def replay(self, batches: list[Any]) -> None:
        """Fill, replay and check one step of each micro-batch."""
        rank = self.program.rank
        for n, inputs in enumerate(batches):
            self.x[n].copy_(inputs[rank].x)
            self.ids[n].copy_(inputs[rank].topk_ids)
            self.weights[n].copy_(inputs[rank].topk_weights)
        before = self.stats.clone()
        self.graph.replay()
        for n, inputs in enumerate(batches):
            recv, count, handle, out = self.outputs[n]
            got = Received(self.program, inputs, self.form, self.x[n], self.ids[n], (recv, count, handle), lambda: None)
            got.check()
            got.check_sums(0, out)
            before += count
        assert torch.equal(self.stats, before)


def _graphs(ctx: Ctx, gpus: tuple[int, ...], how: str) -> None:
    program = Program(ctx, gpus)
    for form in ("bf16", "fp8"):
        for number in range(2):  # both sets of buffers
            program.step(number, [2] * ctx.world, form, how)
    kinds = [(tokens, form, batches) for tokens in (0, 1, 6) for form in ("bf16", "fp8") for batches in (1, 2)]
    captured = {kind: Captured(program, kind[0], kind[1], how, kind[2]) for kind in kinds}
    chance = torch.Generator().manual_seed(5)  # the same on every rank
    for turn in range(60):
        form, batches = ("bf16", "fp8")[turn % 2], 1 + turn // 2 % 2
        tokens = [(0, 1, 6)[int(torch.randint(3, (1,), generator=chance))] for _ in range(ctx.world)]
        captured[tokens[ctx.rank], form, batches].replay(
            [program.inputs(10 * turn + n, tokens, holes=0.2) for n in range(batches)]
        )
        if turn % 7 == 6:
            program.step(turn, [turn % 7] * ctx.world, form, how)
    program.buffer.destroy()


@pytest.mark.parametrize("how", ["hook", "plain", "event"])
def test_layers_captured_at_several_sizes_are_replayed_in_any_mixture(how: str) -> None:
    run_ranks(_graphs, 2, PAIR, how)


def _capture_refused(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    program = Program(ctx, gpus)

    def capture(most: int) -> None:
        x = torch.zeros(1, program.hidden, dtype=torch.bfloat16, device=program.device)
        ids = torch.full((1, program.top_k), -1, dtype=torch.int64, device=program.device)
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=program.device)
            program.buffer.low_latency_dispatch(x, ids, most, program.experts)

    assert "make one before the capture" in refused(HandleError, lambda: capture(program.most))
    program.step(0, [2, 1])
    program.step(1, [2, 1])
    program.dispatch(program.inputs(2, [2, 1]))
    left = program.dispatch(program.inputs(3, [2, 1]))
    assert "made before a graph capture and not combined" in refused(HandleError, lambda: capture(program.most))
    left.combine(3)
    program.step(4, [2, 1])
    program.buffer.destroy()


def test_what_cannot_be_captured_is_refused() -> None:
    run_ranks(_capture_refused, 2, PAIR)


# -------------------------------------------------------------------------------------------------------------- masks


def _mask(ctx: Ctx, gpus: tuple[int, ...]) -> float | None:
    """A rank dies in the middle of it all; the others go on without it."""
    program = Program(ctx, gpus, enable_shrink=True, options=Options(timeout_s=30.0))
    buffer = program.buffer
    status = torch.full((ctx.world,), 7, dtype=torch.int32, device=program.device)

    def masked() -> list[int]:
        buffer.low_latency_query_mask_buffer(status)
        return status.tolist()

    assert masked() == [0] * ctx.world
    for number in range(3):
        program.step(number, [3] * ctx.world, "fp8", "hook")
    victim = ctx.world - 1
    torch.cuda.synchronize()
    ctx.barrier("all is well")
    if ctx.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    x = torch.ones(2, program.hidden, dtype=torch.bfloat16, device=program.device)
    ids = torch.tensor([[0, 1, 7], [0, 7, -1]], device=program.device)  # expert 7 is the victim's
    weights = torch.ones(2, 3, device=program.device)
    for _ in range(40):
        got = buffer.low_latency_dispatch(x, ids, program.most, program.experts, use_fp8=False)
        out, *_ = buffer.low_latency_combine(got[0], ids, weights, got[2])
    assert out[:, 0].tolist() == [2.0, 1.0]  # what the living experts add
    took = time.monotonic() - began
    assert masked() == [0] * victim + [1]
    buffer.low_latency_clean_mask_buffer()
    assert masked() == [0] * victim + [1]  # the dead stay masked
    for wrong in (ctx.rank, ctx.world, -1):
        with pytest.raises(InputError, match="give another rank"):
            buffer.low_latency_update_mask_buffer(wrong, True)
    with pytest.raises(InputError, match=r"mask_status is torch\.int64"):
        buffer.low_latency_query_mask_buffer(status.long())
    ctx.barrier("seen", victim)  # who has destroyed its buffer is masked too
    buffer.destroy()
    return took


@pytest.mark.parametrize("gpus", PLACES[:2])
def test_the_others_go_on_when_a_rank_dies(gpus: tuple[int, ...]) -> None:
    times = run_ranks(_mask, len(gpus), gpus, dies=[len(gpus) - 1])
    assert all(took < 10 for took in times[:-1]), times


def test_ranks_are_masked_and_taken_back_by_hand() -> None:
    run_ranks(masked_by_hand, 2, PAIR)


def test_a_rank_that_was_given_up_is_taken_back() -> None:
    times = run_ranks(hangs, 2, PAIR)
    assert 1.0 <= times[0] < 2.0 and times[1] < 1.0, times  # one budget, whatever comes after


# -------------------------------------------------------------------------------------------------------------- others


def _bad_input(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    program = Program(ctx, gpus)
    mine = program.inputs(0, [3, 3])[ctx.rank]
    x, ids = program.there(mine.x), program.there(mine.topk_ids)

    def dispatch(x: Any = x, ids: Any = ids, **options: Any) -> str:
        return refused(InputError, lambda: program.buffer.low_latency_dispatch(x, ids, 6, 8, **options))

    assert "x is on cpu" in dispatch(mine.x)
    assert "topk_idx has dtype torch.int32" in dispatch(ids=ids.int())
    assert "topk_ids is on cpu" in dispatch(ids=mine.topk_ids)
    wrong = torch.zeros(4, dtype=torch.int32)
    assert "on cpu with strides" in dispatch(cumulative_local_expert_recv_stats=wrong)
    program.step(1, [3, 3])
    assert isinstance(program.buffer.get_comm_stream(), torch.cuda.Stream)
    program.buffer.destroy()


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_ranks(_bad_input, 2, PAIR)


def test_the_example_runs_captured_on_gpus() -> None:
    run_ranks(run_example, 2, EXAMPLE.read_text())


@two_gpus
def test_the_size_hint_holds_for_what_is_allocated() -> None:
    run_ranks(_hint, 2, PAIR)


def _hint(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    program = Program(ctx, gpus, experts=64, hidden=4096, top_k=8, most=64)
    program.step(0, [64, 3], "fp8")
    (steps,) = program.buffer._low_latency._all.values()  # type: ignore[union-attr]
    hint = Buffer.get_low_latency_rdma_size_hint(64, 4096, 2, 64)
    assert 0.97 * hint - (2 << 20) < steps.a2a.buffer_bytes <= hint
    program.buffer.destroy()
