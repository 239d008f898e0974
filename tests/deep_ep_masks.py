"""Ranks that DeepEP's `Buffer` leaves out and takes back: for GPUs (tests/gpu), and for GPU ranks without a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from deep_ep_steps import Gpus, Program
from ranks import Ctx

from moe_a2a import Options


def _program(ctx: Ctx, gpus: Gpus, **options: Any) -> Program:
    program = Program(ctx, gpus, enable_shrink=gpus is not None, **options)
    if gpus is None:  # an interpreted GPU rank, which Buffer takes for a CPU rank and refuses masks
        program.buffer._low_latency._masked = 0  # type: ignore[union-attr]
    return program


def masked_by_hand(ctx: Ctx, gpus: Gpus = None) -> None:
    """Each rank goes on alone, and together again when both have taken the other back."""
    program = _program(ctx, gpus)
    buffer, other = program.buffer, 1 - ctx.rank
    buffer.low_latency_update_mask_buffer(other, True)  # before there are any buffers
    for turn in range(2):
        for number in range(3):
            inputs = program.inputs(number, [4, 4])
            for i in inputs:
                i.topk_ids[i.topk_ids // 4 != ctx.rank] = -1  # what is left for a rank that is alone
            inputs[other].topk_ids.fill_(-1)
            got = program.dispatch(inputs, "fp8")
            got.check()
            got.combine(number)
        status = torch.zeros(2, dtype=torch.int32, device=program.device)
        buffer.low_latency_query_mask_buffer(status)
        assert status[other] == 1 and status[ctx.rank] == 0
        torch.cuda.synchronize()
        ctx.barrier(f"together again {turn}")
        if turn == 0:
            buffer.low_latency_update_mask_buffer(other, False)
        else:
            buffer.low_latency_clean_mask_buffer()
        torch.cuda.synchronize()
        ctx.barrier(f"taken back {turn}")
        for number in range(3):
            program.step(number, [6, 2], "fp8", "hook")
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0]
        torch.cuda.synchronize()
        ctx.barrier(f"apart {turn}")
        buffer.low_latency_update_mask_buffer(other, True)
    buffer.destroy()


def hangs(ctx: Ctx, gpus: Gpus) -> float:
    """Rank 1 comes when rank 0 has given it up. Both go on alone, and together again when all is clean.

    Returns the longest that one of its turns alone took, in seconds.
    """
    program = _program(ctx, gpus, options=Options(timeout_s=1.0))
    buffer, other = program.buffer, 1 - ctx.rank
    status = torch.zeros(2, dtype=torch.int32, device=program.device)

    def masked() -> list[int]:
        buffer.low_latency_query_mask_buffer(status)
        return status.tolist()

    def all_here(where: str) -> None:
        torch.cuda.synchronize()
        ctx.barrier(where)

    took = 0.0
    for number in range(3):
        program.step(number, [6, 2], "fp8")
    for turn in range(2):
        all_here(f"well {turn}")
        if ctx.rank == 1:
            ctx.barrier(f"given up {turn}")
        began = time.monotonic()
        for number in range(3):
            inputs = program.inputs(number, [4, 4])
            for i in inputs:
                i.topk_ids[i.topk_ids // 4 != ctx.rank] = -1  # what is left for a rank that is alone
            inputs[other].topk_ids.fill_(-1)
            got = program.dispatch(inputs, "fp8")
            got.check()
            got.combine(number)
        torch.cuda.synchronize()
        took = max(took, time.monotonic() - began)
        time.sleep(0.1)  # for the threads that hear from kernels
        assert masked()[other] == 1 and masked()[ctx.rank] == 0
        if ctx.rank == 0:
            ctx.barrier(f"given up {turn}")
        all_here(f"apart {turn}")
        buffer.low_latency_clean_mask_buffer()
        all_here(f"clean {turn}")
        for number in range(3):
            program.step(number, [6, 2], "fp8")
        time.sleep(0.1)
        assert masked() == [0, 0]
    all_here("done")
    buffer.destroy()
    return took
