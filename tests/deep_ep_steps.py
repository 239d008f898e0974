"""Checks of steps made through DeepEP's `Buffer`, for CPU ranks (tests/) and GPU ranks (tests/gpu)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ctx
from torch import Tensor

from moe_a2a import Options, workload
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


class Program:
    """One rank of a program for DeepEP: a process group, a Buffer, and steps that check themselves."""

    def __init__(
        self, ctx: Ctx, device: str, experts: int = 8, hidden: int = 256, top_k: int = 3, most: int = 6, **options: Any
    ) -> None:
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", store=ctx.store, rank=ctx.rank, world_size=ctx.world, timeout=timedelta(seconds=60)
            )
        self.rank, self.world, self.device = ctx.rank, ctx.world, torch.device(device)
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
            device=device,
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
        ids = [i.topk_ids for i in self.inputs]
        want = ref.combine_masked(program.sizes, y, ids, mine.topk_weights, program.rank)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out.cpu().view(torch.uint8), want.view(torch.uint8))
        return out
