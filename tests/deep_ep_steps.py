"""Checks of steps made through DeepEP's `Buffer`, for CPU ranks (tests/) and GPU ranks (tests/gpu)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ctx
from torch import Tensor

from moe_a2a import HandleError, Options, workload
from moe_a2a import reference as ref
from moe_a2a.compat.deep_ep import Buffer
from moe_a2a.workload import Inputs

#: use_fp8, round_scale, use_ue8m0, and the oracle's name of that form.
FORMS: dict[str, tuple[dict[str, bool], Any]] = {
    "bf16": ({"use_fp8": False}, None),
    "fp8": ({"use_fp8": True}, "fp32"),
    "rounded": ({"use_fp8": True, "round_scale": True}, "pow2"),
    "ue8m0": ({"use_fp8": True, "round_scale": True, "use_ue8m0": True}, "ue8m0"),
}
ENDS = ("plain", "hook", "event")
#: The GPU of each rank; None: CPU ranks.
Gpus = tuple[int, ...] | None


class Program:
    """One rank of a program for DeepEP: a process group, a Buffer, and steps that check themselves."""

    def __init__(
        self,
        ctx: Ctx,
        gpus: Gpus = None,
        experts: int = 8,
        hidden: int = 256,
        top_k: int = 3,
        most: int = 6,
        **options: Any,
    ) -> None:
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", store=ctx.store, rank=ctx.rank, world_size=ctx.world, timeout=timedelta(seconds=60)
            )
        self.rank, self.world = ctx.rank, ctx.world
        self.device = torch.device("cpu") if gpus is None else torch.device("cuda", gpus[ctx.rank])
        if gpus is not None:
            torch.cuda.set_device(self.device)
        self.experts, self.hidden, self.top_k, self.most = experts, hidden, top_k, most
        options.setdefault("options", Options(timeout_s=ctx.timeout_s))
        size = Buffer.get_low_latency_rdma_size_hint(most, hidden, ctx.world, experts)
        group = dist.group.WORLD
        self.buffer = Buffer(
            group,
            0,
            size,
            low_latency_mode=True,
            num_qps_per_rank=experts // ctx.world,
            explicitly_destroy=True,
            device=self.device,
            **options,
        )
        self.sizes = ref.Sizes(ctx.world, experts, most)

    def inputs(self, seed: int, tokens: Sequence[int], **options: Any) -> list[Inputs]:
        """What every rank brings to a step. Router weights are halves and ones, so that sums are exact in any order."""
        made = [
            workload.make_inputs(
                seed,
                rank,
                0,
                count,
                hidden=self.hidden,
                experts=self.experts,
                top_k=self.top_k,
                dtype=torch.bfloat16,
                **options,
            )
            for rank, count in enumerate(tokens)
        ]
        return [Inputs(i.x, i.topk_ids, torch.where(i.topk_ids % 2 == 0, 0.5, 1.0)) for i in made]

    def outputs(self, seed: int) -> list[Tensor]:
        """What every rank's experts return, [E_l, R*M, hidden], small whole numbers: rows with tokens or not."""
        made = []
        for rank in range(self.world):
            generator = torch.Generator().manual_seed(1000 * seed + rank)
            shape = (self.experts // self.world, self.world * self.most, self.hidden)
            made.append(torch.randint(-8, 9, shape, generator=generator).to(torch.bfloat16))
        return made

    def there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def dispatch(self, inputs: Sequence[Inputs], form: str = "bf16", end: str = "plain", **options: Any) -> Received:
        mine = inputs[self.rank]
        x, ids = self.there(mine.x), self.there(mine.topk_ids)
        *got, event, hook = self.buffer.low_latency_dispatch(
            x, ids, self.most, self.experts, **FORMS[form][0], **_how(end), **options
        )
        return Received(self, inputs, form, x, ids, got, _ending(end, event, hook))

    def step(self, seed: int, tokens: Sequence[int], form: str = "bf16", end: str = "plain", **routing: Any) -> None:
        got = self.dispatch(self.inputs(seed, tokens, **routing), form, end)
        got.finish()
        got.check()
        got.combine(seed, end)


def _how(end: str) -> dict[str, bool]:
    return {"return_recv_hook": end == "hook", "async_finish": end == "event"}


def _ending(end: str, event: Any, hook: Any) -> Callable[[], object]:
    assert (hook is not None) == (end == "hook")
    assert (event.event is not None) == (end == "event")
    return hook if end == "hook" else event.current_stream_wait if end == "event" else lambda: None


class Received:
    """What a dispatch returned. finish: the hook, or the wait for the event."""

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Inputs],
        form: str,
        x: Tensor,
        ids: Tensor,
        got: Sequence[Any],
        finish: Callable[[], object],
    ) -> None:
        self.program, self.inputs, self.form, self.x, self.ids = program, inputs, form, x, ids
        (self.recv, self.count, self.handle), self.finish = got, finish

    def expected(self) -> ref.MaskedRows:
        program, fp8 = self.program, FORMS[self.form][1]
        rows = [i.x for i in self.inputs]
        payload, scales = (rows, None) if fp8 is None else zip(*[ref.quantise(x, fp8) for x in rows], strict=True)
        return ref.dispatch_masked(program.sizes, payload, [i.topk_ids for i in self.inputs], program.rank, scales)

    def check(self) -> None:
        """Rows, scales, counts and the handle, to the bit."""
        program, want = self.program, self.expected()
        assert self.count.dtype == torch.int32 and torch.equal(self.count.cpu(), want.counts)
        valid = torch.arange(want.source.shape[1])[None, :] < want.counts[:, None]
        x = self.recv[0] if want.scales is not None else self.recv
        assert x.shape == want.x.shape and x.dtype == want.x.dtype
        assert torch.equal(x.cpu().view(torch.uint8)[valid], want.x.view(torch.uint8)[valid])
        if want.scales is not None:
            scales = self.recv[1]
            assert scales.dtype == want.scales.dtype and scales.stride() == want.scales.stride()
            assert torch.equal(scales.cpu()[valid], want.scales[valid])

        src_info, layout_range, most, hidden, experts = self.handle
        assert (most, hidden, experts) == (program.most, program.hidden, program.experts)
        assert src_info.dtype == torch.int32 and src_info.shape == want.source.shape
        assert torch.equal(src_info.cpu()[valid], (want.source % most)[valid])
        assert layout_range.dtype == torch.int64
        assert layout_range.shape == (program.experts // program.world, program.world)
        for expert, ranges in enumerate(layout_range.tolist()):
            owners = (want.source // most)[expert][valid[expert]].tolist()
            begin = 0
            for source, packed in enumerate(ranges):
                assert (packed >> 32, packed & 0xFFFFFFFF) == (begin, owners.count(source))
                begin += owners.count(source)

    def combine(self, seed: int, end: str = "plain", handle: Any = None, **options: Any) -> Tensor:
        """Combine what `outputs(seed)` says, and check the sums to the bit."""
        program = self.program
        y, mine = program.outputs(seed), self.inputs[program.rank]
        x = program.there(y[program.rank])
        weights = program.there(mine.topk_weights)
        if options.get("zero_copy"):
            program.buffer.get_next_low_latency_combine_buffer(self.handle).copy_(x)
            x = torch.full_like(x, float("nan"))
        out, event, hook = program.buffer.low_latency_combine(
            x, self.ids, weights, handle or self.handle, **_how(end), **options
        )
        _ending(end, event, hook)()
        self.check_sums(seed, out)
        return out

    def check_sums(self, seed: int, out: Tensor) -> None:
        """What combine returned for `outputs(seed)`, to the bit."""
        program, ids = self.program, [i.topk_ids for i in self.inputs]
        weights = self.inputs[program.rank].topk_weights
        want = ref.combine_masked(program.sizes, program.outputs(seed), ids, weights, program.rank)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out.cpu().view(torch.uint8), want.view(torch.uint8))


# ------------------------------------------------------------------------------------------------- what ranks do


def refused(error: type[Exception], call: Callable[[], object]) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def all_forms(ctx: Ctx, gpus: Gpus = None) -> None:
    program = Program(ctx, gpus)
    most = program.most
    number = 0
    for form in FORMS:
        for end in ENDS:
            number += 1
            program.step(number, [(5 * r + number) % (most + 1) for r in range(ctx.world)], form, end, holes=0.2)
        program.step(number, [most] * ctx.world, form)
        program.step(number, [0] * (ctx.world - 1) + [1], form)
    program.step(0, [0] * ctx.world)
    program.buffer.destroy()


def two_batches(ctx: Ctx, gpus: Gpus = None) -> None:
    """Two micro-batches through one Buffer, each a phase behind the other, as two-batch overlap runs them."""
    program = Program(ctx, gpus)
    tokens = [5, 2]
    first = program.dispatch(program.inputs(0, tokens), "fp8", "hook")
    for layer in range(6):
        second = program.dispatch(program.inputs(2 * layer + 1, tokens), "bf16", "hook")
        first.finish()
        first.check()
        first.combine(layer, "hook")
        following = program.dispatch(program.inputs(2 * layer + 2, tokens), "fp8", "hook")
        second.finish()
        second.check()
        second.combine(layer, "hook")
        first = following
    first.finish()
    first.combine(9)
    program.buffer.destroy()


def dropped(ctx: Ctx, gpus: Gpus = None) -> None:
    program = Program(ctx, gpus)
    got = []
    for number in range(7):  # a program that only dispatches, as a benchmark does
        got.append(program.dispatch(program.inputs(number, [4, 3]), "bf16", "hook" if number % 3 == 0 else "plain"))
        if number % 2:
            got[-1].finish()
            got[-1].check()
    got[-2].check()  # two results are valid
    assert "at most two results are valid" in refused(HandleError, lambda: got[-3].combine(0))
    got[-1].finish()
    got[-1].combine(1)
    got[-2].combine(2)
    assert "was combined already" in refused(HandleError, lambda: got[-1].combine(1))
    # A combine whose hook nobody called is finished when its buffers are needed.
    left = program.dispatch(program.inputs(8, [4, 3]))
    mine = left.inputs[ctx.rank]
    y, weights = program.there(program.outputs(8)[ctx.rank]), program.there(mine.topk_weights)
    out, _, hook = program.buffer.low_latency_combine(y, left.ids, weights, left.handle, return_recv_hook=True)
    program.step(9, [1, 6])
    program.step(10, [6, 1])
    assert out.isfinite().all()
    assert "finished" in refused(HandleError, hook)
    program.buffer.destroy()


def parts(ctx: Ctx, gpus: Gpus = None) -> None:
    program = Program(ctx, gpus)
    world, experts, device = ctx.world, program.experts // ctx.world, program.device
    # A handle taken apart and put together again; out; zero_copy; a wire format that is an optimisation only.
    got = program.dispatch(program.inputs(0, [6, 2]))
    src_info, layout_range, *sizes = got.handle
    out = torch.full((len(got.x), program.hidden), float("nan"), dtype=torch.bfloat16, device=device)
    assert got.combine(0, handle=(src_info, layout_range, *sizes), out=out) is out
    program.dispatch(program.inputs(1, [6, 2])).combine(1, zero_copy=True)
    one, two = (program.dispatch(program.inputs(n, [1, 5]), "fp8") for n in (2, 3))
    two.combine(3, zero_copy=True)
    one.combine(2, zero_copy=True, use_logfmt=True)
    # Callers empty what they have used.
    got = program.dispatch(program.inputs(4, [6, 6]), "fp8")
    for tensor in (*got.recv, got.count, got.handle[1]):
        tensor.set_(torch.empty(0, dtype=tensor.dtype, device=device))
    got.combine(4)
    for number in range(5, 8):
        program.step(number, [6, 6], "fp8")
    # Statistics add up.
    stats, counts = (torch.zeros(experts, dtype=torch.int32, device=device) for _ in range(2))
    waits, more = (torch.zeros(world, dtype=torch.int64, device=device) for _ in range(2))
    for turn, end in enumerate(("plain", "hook", "event", "plain")):
        if turn == 1:  # the first compiles kernels, which takes as long as it takes
            waits.zero_()
            more.zero_()
        if ctx.rank == 1:
            time.sleep(0.05)
        got = program.dispatch(
            program.inputs(9, [6, 4]),
            end=end,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waits,
        )
        got.finish()
        counts += got.count
        assert torch.equal(stats, counts)
        before = waits.clone()
        if ctx.rank == 0:
            time.sleep(0.05)
        got.combine(9, end, combine_wait_recv_cost_stats=more)
        assert torch.equal(waits, before)
    slow, quick = (waits, more) if ctx.rank == 0 else (more, waits)
    assert slow[1 - ctx.rank] > 100_000_000 > quick.max() >= 0 and slow[ctx.rank] < 50_000_000, (waits, more)
    program.buffer.destroy()


def sizes(ctx: Ctx, gpus: Gpus = None) -> None:
    """Several sizes through one Buffer, and several Buffers on one group."""
    small, large = Program(ctx, gpus), Program(ctx, gpus, experts=4, hidden=512, top_k=2, most=9)
    for number in range(3):
        small.step(number, [6, 1])
        large.step(number, [2, 9], "fp8", "hook")
    wide = Program(ctx, gpus, most=11)
    wide.buffer.destroy()
    wide.buffer = small.buffer
    for number in range(3):
        wide.step(number, [11, 3])
        small.step(number, [4, 4])
    small.buffer.destroy()
    large.buffer.destroy()
    assert "is destroyed" in refused(HandleError, lambda: small.step(0, [1, 1]))
    again = Program(ctx, gpus)
    again.buffer.clean_low_latency_buffer(6, 256, 8)
    again.step(0, [1, 1])
    again.buffer.explicitly_destroy = False
    with pytest.raises(AssertionError, match="explicitly_destroy"):
        again.buffer.destroy()
    del again
    gc.collect()
