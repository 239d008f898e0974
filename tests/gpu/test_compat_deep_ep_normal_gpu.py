"""DeepEP's normal mode on GPU ranks, against a reference in plain loops: processes on one or two GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep_ep_normal_steps import (
    Brought,
    Program,
    Received,
    all_forms,
    dropped,
    handles,
    refused,
    sizes,
    training,
    two_batches,
    wander,
    worst,
)
from ranks import Ctx, run_ranks
from test_compat_deep_ep_normal import EXAMPLE, run_example

from moe_a2a import InputError
from moe_a2a.compat.deep_ep import Buffer, Config
from moe_a2a.compat.normal_config import TOKENS

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
def test_every_form_and_every_way_to_wait_matches_the_reference(gpus: tuple[int, ...]) -> None:
    run_ranks(all_forms, len(gpus), gpus, timeout=240)


@pytest.mark.parametrize("ranks_do", [two_batches, dropped, handles, worst, sizes, training, wander])
def test_what_cpu_ranks_do_gpu_ranks_do(ranks_do: Any) -> None:
    run_ranks(ranks_do, 2, PAIR, timeout=240)


def test_the_example_runs_on_gpus() -> None:
    run_ranks(run_example, 2, EXAMPLE.read_text())


# ------------------------------------------------------------------------------------------------------------- streams


def _streams(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    """Two micro-batches, each on a stream of its own, with work of their own in between: nothing waits on the host but
    for counts, and nothing is checked before the end."""
    program = Program(ctx, gpus, hidden=1024, most=512)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    busy = torch.randn(2048, 2048, device=program.device)
    tokens = [[300, 512], [512, 17]]
    inputs = [program.inputs(n, tokens[n]) for n in range(2)]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(8):
        flights = []
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                busy @ busy  # what dispatch has to wait for
                mine = inputs[n][program.rank]
                x, ids, weights = (program.there(t) for t in (mine.x, mine.ids, mine.weights))
                event = Buffer.capture()
                how = {"async_finish": True, "allocate_on_comm_stream": True}
                *layout, event = program.buffer.get_dispatch_layout(ids, 8, previous_event=event, **how)
                flights.append(
                    program.buffer.dispatch(
                        x,
                        num_tokens_per_rank=layout[0],
                        num_tokens_per_expert=layout[2],
                        is_token_in_rank=layout[3],
                        topk_idx=ids,
                        topk_weights=weights,
                        previous_event=event,
                        **how,
                    )
                )
        for n, (stream, (recv, _, _, _, handle, event)) in enumerate(zip(streams, flights, strict=True)):
            with torch.cuda.stream(stream):
                event.current_stream_wait()
                busy @ busy
                y = recv * 2
                out, _, event = program.buffer.combine(y, handle, previous_event=Buffer.capture(), **how)
                del y, recv, handle  # their memory may be given to others at once
                torch.full((512, 1024), float("nan"), dtype=torch.bfloat16, device=program.device)
                event.current_stream_wait()
                results[n].append(out.clone())
        del flights
    torch.cuda.synchronize()
    for n in range(2):
        mine = inputs[n][program.rank]
        hits = torch.stack([((mine.ids >= 0) & (mine.ids // 4 == r)).any(1) for r in range(2)]).sum(0)
        want = (mine.x.float() * 2 * hits[:, None]).to(torch.bfloat16)
        for out in results[n]:
            assert torch.equal(out.cpu(), want)
    program.buffer.destroy()


def test_batches_on_streams_of_their_own_are_kept_in_order() -> None:
    run_ranks(_streams, 2, PAIR)


# ------------------------------------------------------------------------------------------------------------- graphs


def _graphs(ctx: Ctx, gpus: tuple[int, ...], end: str) -> None:
    """A layer of two micro-batches, captured with num_worst_tokens and replayed with other tokens."""
    program = Program(ctx, gpus)
    chain = end == "chain"
    device, most = program.device, 30 if chain else 40  # with a check on the device that they suffice, and without
    how: dict[str, Any] = {"async_finish": chain, "allocate_on_comm_stream": chain}
    x = [torch.zeros(9, program.hidden, dtype=torch.bfloat16, device=device) for _ in range(2)]
    ids = [torch.full((9, program.top_k), -1, dtype=torch.int64, device=device) for _ in range(2)]
    weights = [torch.zeros(9, program.top_k, device=device) for _ in range(2)]

    def previous() -> Any:
        return Buffer.capture() if chain else None

    def layer() -> list[Any]:
        started, ended = [], []
        for n in range(2):
            per_rank, _, per_expert, hit, event = program.buffer.get_dispatch_layout(
                ids[n], program.experts, previous_event=previous(), **how
            )
            started.append(
                program.buffer.dispatch(
                    x[n],
                    num_tokens_per_rank=per_rank,
                    num_tokens_per_expert=per_expert,
                    is_token_in_rank=hit,
                    topk_idx=ids[n],
                    topk_weights=weights[n],
                    num_worst_tokens=most,
                    previous_event=event if chain else None,
                    **how,
                )
            )
        for *got, event in started:
            if chain:
                event.current_stream_wait()
            y = got[0] * 2
            kept = got[0].clone()
            out, _, event = program.buffer.combine(y, got[4], previous_event=previous(), **how)
            ended.append((kept, *got[1:], out, event))
        for *_, event in ended:
            if chain:
                event.current_stream_wait()
        return ended

    for _ in range(2):
        layer()
    per_rank, _, per_expert, hit, _ = program.buffer.get_dispatch_layout(ids[0], program.experts)

    def waits() -> None:
        program.buffer.dispatch(x[0], None, per_rank, None, hit, per_expert, ids[0], weights[0])

    text = refused(InputError, lambda: _captured(waits))
    assert "give num_worst_tokens" in text
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = layer()
    for turn in range(12):
        batches: list[list[Brought]] = [program.inputs(2 * turn + n, [9, 9]) for n in range(2)]
        for n, batch in enumerate(batches):
            mine = batch[program.rank]
            x[n].copy_(mine.x)
            ids[n].copy_(mine.ids)
            weights[n].copy_(mine.weights)
        graph.replay()
        torch.cuda.synchronize()
        for n, batch in enumerate(batches):
            *got, out, _ = outputs[n]
            received = Received(program, batch, x[n], got, {"num_worst_tokens": most})
            received.check()
            goes = got[4][4].sum(1, keepdim=True)
            assert torch.equal(out, x[n] * (2 * goes).to(torch.bfloat16))
        if turn % 3 == 2:  # steps outside of the graph, in between
            program.step(turn, [turn, 20])
    program.buffer.destroy()


def _captured(call: Any) -> None:
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
        call()


@pytest.mark.parametrize("end", ["plain", "chain"])
def test_layers_are_captured_and_replayed(end: str) -> None:
    run_ranks(_graphs, 2, PAIR, end, timeout=240)


# ------------------------------------------------------------------------------------------------------------- others


def _memory(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    hint = Config().get_nvl_buffer_size_hint(2 * 4096, 2)
    program = Program(ctx, gpus, experts=64, hidden=4096, top_k=8, num_nvl_bytes=hint)
    program.step(0, [64, 3])
    (steps,) = program.buffer._normal._all.values()  # type: ignore[union-attr]
    assert steps.a2a.buffer_bytes <= hint + (2 << 20)
    assert TOKENS <= steps.a2a.config.max_tokens_per_rank < 1.1 * TOKENS
    assert isinstance(program.buffer.get_comm_stream(), torch.cuda.Stream)
    program.buffer.destroy()


def test_the_size_hint_is_what_is_allocated() -> None:
    run_ranks(_memory, 2, PAIR)
