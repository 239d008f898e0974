"""Checks of DeepEP's normal mode, for CPU ranks (tests/) and GPU ranks (tests/gpu), against a reference in plain loops
that knows nothing of moe_a2a."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ctx
from torch import Tensor

from moe_a2a import HandleError, InputError, Options
from moe_a2a.compat.deep_ep import Buffer, Config
from moe_a2a.gpu.layout import Layout

FP8 = torch.float8_e4m3fn
#: The GPU of each rank; None: CPU ranks.
Gpus = tuple[int, ...] | None


# -------------------------------------------------------------------------------------------------------- the reference


@dataclass
class Brought:
    """What a rank brings: rows [T, H] as they travel, scales or None, ids and weights [T, K]."""

    x: Tensor
    scales: Tensor | None
    ids: Tensor
    weights: Tensor


@dataclass
class Expected:
    """What `dispatch` gives rank `me`."""

    came: list[tuple[int, int]]  # (source rank, token), in that order
    x: Tensor
    scales: Tensor | None
    ids: Tensor
    weights: Tensor
    counts: list[int]
    rank_prefix: Tensor
    channel_prefix: Tensor
    head: Tensor


def _goes(ids: Tensor, rank: int, local: int) -> list[bool]:
    return [any(e >= 0 and e // local == rank for e in row) for row in ids.tolist()]


def expected(all_: Sequence[Brought], me: int, experts: int, channels: int) -> Expected:
    ranks, local = len(all_), experts // len(all_)
    came = [(s, t) for s, b in enumerate(all_) for t, hit in enumerate(_goes(b.ids, me, local)) if hit]

    def rows(pick: Callable[[Brought], Tensor]) -> Tensor:
        mine = pick(all_[me])
        return torch.stack([pick(all_[s])[t] for s, t in came]) if came else mine.new_empty(0, *mine.shape[1:])

    ids = rows(lambda b: b.ids) - me * local
    ids[(ids < 0) | (ids >= local)] = -1
    weights = rows(lambda b: b.weights)
    weights[ids < 0] = 0
    scales = None if all_[me].scales is None else rows(lambda b: b.scales)
    counts = [int((ids == e).sum()) for e in range(local)]
    sent = torch.tensor([[sum(_goes(b.ids, r, local)) for r in range(ranks)] for b in all_])
    tokens = len(all_[me].ids)
    width = -(-tokens // channels)  # DeepEP's ranges of tokens: of equal width, the last ones shorter or empty
    channel_prefix, head = torch.zeros(ranks, channels), torch.full((tokens, ranks), -1)
    for r in range(ranks):
        total, goes = 0, _goes(all_[me].ids, r, local)
        for c in range(channels):
            own = 0
            for t in range(min(c * width, tokens), min((c + 1) * width, tokens)):
                if goes[t]:
                    head[t, r] = own
                    own += 1
            total += own
            channel_prefix[r, c] = total
    x = rows(lambda b: b.x.view(torch.uint8)).view(all_[me].x.dtype)
    return Expected(came, x, scales, ids, weights, counts, sent.cumsum(0).int(), channel_prefix.int(), head.int())


# ---------------------------------------------------------------------------------------------------------- the program


class Program:
    """One rank of a program for DeepEP: a process group, a Buffer for `most` tokens, steps that check themselves."""

    def __init__(
        self,
        ctx: Ctx,
        gpus: Gpus = None,
        experts: int = 8,
        hidden: int = 256,
        top_k: int = 3,
        most: int = 20,
        **more: Any,
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
        self.local = experts // ctx.world
        more.setdefault("options", Options(timeout_s=ctx.timeout_s))
        more.setdefault("num_nvl_bytes", Layout(ctx.world, experts, hidden, top_k, most, 2).region_bytes)
        self.buffer = Buffer(dist.group.WORLD, explicitly_destroy=True, device=self.device, **more)

    def there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def inputs(self, seed: int, tokens: Sequence[int], form: str = "bf16") -> list[Brought]:
        """What every rank brings. Some choices are -1, and some tokens have none."""
        made = []
        for rank, count in enumerate(tokens):
            g = torch.Generator().manual_seed(1000 * seed + rank)
            x = torch.randn(count, self.hidden, generator=g).to(torch.bfloat16)
            scores = torch.rand(count, self.experts, generator=g)
            ids = scores.topk(self.top_k, dim=1).indices if count else torch.zeros(0, self.top_k, dtype=torch.int64)
            ids[torch.rand(ids.shape, generator=g) < 0.3] = -1
            weights, scales = torch.rand(ids.shape, generator=g), None
            if form != "bf16":
                x = x.to(FP8)
                if form == "ue8m0":
                    exponents = torch.randint(100, 140, (count, -(-self.hidden // 512) * 4), generator=g)
                    exponents[:, self.hidden // 128 :] = 0
                    scales = exponents.to(torch.uint8).view(torch.int32)
                else:
                    scales = torch.rand(count, self.hidden // 128, generator=g) + 0.5
            made.append(Brought(x, scales, ids, weights))
        return made

    def outputs(self, seed: int, all_: Sequence[Brought]) -> list[Tensor]:
        """What every rank's experts return, [N, H] each: small whole numbers, so that sums are exact in any order."""
        made = []
        for rank in range(self.world):
            g = torch.Generator().manual_seed(77 * seed + rank)
            rows = sum(sum(_goes(b.ids, rank, self.local)) for b in all_)
            made.append(torch.randint(-8, 9, (rows, self.hidden), generator=g).to(torch.bfloat16))
        return made

    def dispatch(self, all_: Sequence[Brought], end: str = "plain", strided: bool = False, **options: Any) -> Received:
        mine = all_[self.rank]
        x, ids, weights = (self.there(t) for t in (mine.x, mine.ids, mine.weights))
        payload: Any = x
        if mine.scales is not None:
            scales = self.there(mine.scales)
            payload = (x, scales.t().contiguous().t() if strided else scales)
        how = _how(self.buffer, end)
        per_rank, rdma, per_expert, hit, event = self.buffer.get_dispatch_layout(ids, self.experts, **how)
        assert rdma is None
        if end == "chain":
            how["previous_event"] = event
        elif end == "event":
            event.current_stream_wait()
        *got, event = self.buffer.dispatch(
            payload,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=hit,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=weights,
            **how,
            **options,
        )
        _end(end, event)
        return Received(self, all_, payload, got, options)

    def step(self, seed: int, tokens: Sequence[int], form: str = "bf16", end: str = "plain", **options: Any) -> None:
        got = self.dispatch(self.inputs(seed, tokens, form), end, **options)
        got.check()
        got.combine(seed, end)


def _how(buffer: Buffer, end: str) -> dict[str, Any]:
    """plain: synchronous; event: asynchronous; chain: after an event, with memory of the communication stream."""
    if end == "chain":
        return {"async_finish": True, "previous_event": buffer.capture(), "allocate_on_comm_stream": True}
    return {"async_finish": end == "event"}


def _end(end: str, event: Any) -> None:
    assert (event.event is not None) == (end != "plain")
    if end != "plain":
        event.current_stream_wait()


def same(got: Tensor, want: Tensor) -> bool:
    """Equal in dtype, shape and bits."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if not want.numel():
        return True
    return torch.equal(got.cpu().contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


class Received:
    """What a dispatch returned."""

    def __init__(
        self, program: Program, all_: Sequence[Brought], payload: Any, got: Sequence[Any], options: dict[str, Any]
    ) -> None:
        self.program, self.all, self.payload, self.options = program, all_, payload, options
        self.recv, self.ids, self.weights, self.counts, self.handle = got
        config = options.get("config") or Config(Buffer.num_sms)
        self.want = expected(all_, program.rank, program.experts, config.num_sms // 2)

    def rows(self, recv: Any, scales: Tensor | None) -> None:
        """Received rows and scales, to the bit."""
        x = recv if scales is None else recv[0]
        n = len(self.want.came)
        assert same(x[:n], self.want.x)
        if scales is not None:
            assert recv[1].is_contiguous() and len(recv[1]) == len(x) and same(recv[1][:n], scales)

    def check(self) -> None:
        program, want = self.program, self.want
        n, most = len(want.came), self.options.get("num_worst_tokens") or len(want.came)
        self.rows(self.recv, want.scales)
        x = self.recv if want.scales is None else self.recv[0]
        assert len(x) == len(self.ids) == len(self.weights) == most
        assert same(self.ids[:n], want.ids) and same(self.weights[:n], want.weights)
        assert (self.ids[n:] == -1).all()
        alignment = self.options.get("expert_alignment", 1)
        padded = [-(-count // alignment) * alignment for count in want.counts]
        assert self.counts == ([] if self.options.get("num_worst_tokens") else padded)

        rank_prefix, channel_prefix, recv_channel, src, hit, head = self.handle
        assert same(rank_prefix, want.rank_prefix)
        assert same(channel_prefix, want.channel_prefix) and same(head, want.head)
        assert recv_channel.shape == channel_prefix.shape and recv_channel.dtype == torch.int32
        assert len(src) == most and same(src[:n], torch.tensor([t for _, t in want.came], dtype=torch.int32))
        local = program.local
        goes = [_goes(self.all[program.rank].ids, r, local) for r in range(program.world)]
        assert same(hit, torch.tensor(goes, dtype=torch.bool).t().reshape(len(head), program.world))

    def again(self, end: str = "plain") -> Any:
        """A dispatch with this handle. Returns what it received."""
        how = _how(self.program.buffer, end)
        recv, ids, weights, counts, handle, event = self.program.buffer.dispatch(self.payload, self.handle, **how)
        _end(end, event)
        assert (ids, weights, counts, handle) == (None, None, None, None)
        self.rows(recv, self.want.scales)
        return recv

    def combine(self, seed: int, end: str = "plain", handle: Any = None, columns: int = 0, biases: int = 0) -> None:
        """Combine what `outputs(seed)` says, and check the sums to the bit."""
        program, me = self.program, self.program.rank
        outputs = program.outputs(seed, self.all)
        y = torch.full((len(self.ids), program.hidden), float("nan"), dtype=torch.bfloat16)
        y[: len(outputs[me])] = outputs[me]
        given: dict[str, Any] = {}
        tokens = len(self.all[me].ids)
        want = self._sums([o.float() for o in outputs], program.hidden)
        if biases:
            bias = [torch.full((tokens, program.hidden), 3.0 * (n + 1), dtype=torch.bfloat16) for n in range(biases)]
            want += sum(b.float() for b in bias)
            given["bias"] = program.there(bias[0]) if biases == 1 else tuple(program.there(b) for b in bias)
        if columns:
            weights = [self._weights(seed, rank, len(o), columns) for rank, o in enumerate(outputs)]
            rows = torch.zeros(len(y), columns)
            rows[: len(weights[me])] = weights[me]
            given["topk_weights"] = program.there(rows)
        out, sums, event = program.buffer.combine(
            program.there(y), handle or self.handle, **given, **_how(program.buffer, end)
        )
        _end(end, event)
        assert same(out, want.to(torch.bfloat16))
        assert (sums is None) == (not columns)
        if columns:
            assert same(sums, self._sums(weights, columns))

    def _weights(self, seed: int, rank: int, rows: int, columns: int) -> Tensor:
        """With few bits, so that sums are exact in any order: several hosts add up in two stages."""
        generator = torch.Generator().manual_seed(seed * 31 + rank)
        return torch.randint(0, 1 << 16, (rows, columns), generator=generator) / (1 << 16)

    def _sums(self, per_rank: Sequence[Tensor], columns: int) -> Tensor:
        """For each of this rank's tokens, the sum in fp32, in rank order, of what the ranks that it went to have."""
        program, me = self.program, self.program.rank
        sums = torch.zeros(len(self.all[me].ids), columns)
        for rank, rows in enumerate(per_rank):
            came = [
                (s, t) for s, b in enumerate(self.all) for t, hit in enumerate(_goes(b.ids, rank, program.local)) if hit
            ]
            for row, (source, token) in enumerate(came):
                if source == me:
                    sums[token] += rows[row]
        return sums


# ------------------------------------------------------------------------------------------------------- what ranks do


def refused(error: type[Exception], call: Callable[[], object]) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def all_forms(ctx: Ctx, gpus: Gpus = None) -> None:
    program = Program(ctx, gpus)
    most, number = program.most, 0
    for form in ("bf16", "fp8", "ue8m0"):
        for end in ("plain", "event", "chain"):
            number += 1
            tokens = [(7 * r + 5 * number) % (most + 1) for r in range(ctx.world)]
            program.step(number, tokens, form, end, expert_alignment=1 if number % 2 else 48, strided=number % 2 == 0)
        program.step(number, [most] * ctx.world, form, config=Config(8, 2, 9, 1, 4))
        program.step(number, [0] * (ctx.world - 1) + [1], form)
    program.step(0, [0] * ctx.world)
    program.buffer.destroy()


def two_batches(ctx: Ctx, gpus: Gpus = None) -> None:
    """Two micro-batches through one Buffer, each a phase behind the other, as two-batch overlap runs them."""
    program = Program(ctx, gpus)
    first = program.dispatch(program.inputs(0, [9, 2]), "chain", expert_alignment=128)
    for layer in range(5):
        second = program.dispatch(program.inputs(2 * layer + 1, [5, 20], "fp8"), "chain")
        first.check()
        first.combine(layer, "chain")
        following = program.dispatch(program.inputs(2 * layer + 2, [layer, 7]), "chain")
        second.check()
        second.combine(layer, "chain")
        first = following
    first.combine(9)
    program.buffer.destroy()


def dropped(ctx: Ctx, gpus: Gpus = None) -> None:
    """Programs that dispatch and do not combine."""
    program = Program(ctx, gpus)
    got = []
    for number in range(5):  # as a benchmark does
        got.append(program.dispatch(program.inputs(number, [4, 3])))
        got[-1].check()
    got[-2].check()  # two results are valid
    for late in got[:3]:
        text = refused(HandleError, lambda late=late: late.combine(4))  # type: ignore[misc]
        assert "have overwritten what it received" in text
    got[-1].combine(4)
    got[-2].combine(3)
    got[0].again()
    got[0].combine(0)
    got[0].combine(0)
    assert "overwritten" in refused(HandleError, lambda: got[1].combine(4))
    # What autograd may keep is not overwritten.
    kept = []
    for number in range(3):
        inputs = program.inputs(number, [4, 3])
        inputs[ctx.rank].x.requires_grad_()
        kept.append(program.dispatch(inputs))
    for number, late in enumerate(kept):
        late.check()
        late.combine(number)
    program.step(10, [1, 1])
    program.buffer.destroy()


def handles(ctx: Ctx, gpus: Gpus = None) -> None:
    """Handles are used again, in any order, and taken apart."""
    program = Program(ctx, gpus)
    a = program.dispatch(program.inputs(1, [12, 20]))
    b = program.dispatch(program.inputs(2, [3, 0], "fp8"), "event")
    a.combine(1)
    b.combine(2, handle=[*b.handle])
    for number in range(3, 6):
        program.step(number, [6, 6])
    a.combine(3)  # a combine of a step that is long over, and once more
    a.combine(4, "event", columns=3)
    b.again("chain")
    a.again()
    b.combine(5, columns=1)
    a.combine(6, "chain", columns=128, biases=1)
    # A dispatch with a handle whose own step is still open.
    c = program.dispatch(program.inputs(7, [8, 9], "ue8m0"))
    kept = c.again()
    c.again("event")
    c.rows(kept, c.want.scales)
    c.combine(7, biases=2)
    program.step(8, [20, 1])
    c.combine(8)
    foreign = tuple(tensor.clone() for tensor in c.handle)
    assert "but not from copies" in refused(HandleError, lambda: c.combine(8, handle=foreign))
    assert "not the tuple of six" in refused(HandleError, lambda: c.combine(8, handle=foreign[:5]))
    program.buffer.destroy()
    assert "is destroyed" in refused(HandleError, lambda: c.combine(8))


def worst(ctx: Ctx, gpus: Gpus = None) -> None:
    """Rows of a number that the caller names, without waiting for counts."""
    program = Program(ctx, gpus)
    for number, form in enumerate(("bf16", "fp8", "ue8m0")):
        for most in (40, 33):
            got = program.dispatch(program.inputs(number, [9, 20], form), num_worst_tokens=most)
            got.check()
            got.combine(number, columns=2)
            got.again()
            got.combine(number)
    inputs = program.inputs(1, [9, 20])
    text = refused(InputError, lambda: program.dispatch(inputs, num_worst_tokens=41))
    assert "no more than 40 tokens can arrive" in text
    program.step(5, [3, 4])
    program.buffer.destroy()


def sizes(ctx: Ctx, gpus: Gpus = None) -> None:
    """What fits, several sizes in one Buffer, and both modes in one Buffer."""
    program = Program(ctx, gpus)
    text = refused(InputError, lambda: program.step(1, [21, 21]))
    needed = int(text.split("num_nvl_bytes=")[1].split(" ")[0])
    assert "brings 21 tokens, and the buffers take 20" in text
    larger = Program(ctx, gpus, num_nvl_bytes=needed)
    larger.step(1, [21, 21])
    larger.buffer.destroy()
    program.step(2, [20, 1])
    wide = Program(ctx, gpus, hidden=512, experts=4, top_k=2, num_nvl_bytes=0, max_tokens_per_rank=33)
    assert wide.buffer.num_nvl_bytes == 0
    wide.step(3, [33, 5], "fp8")
    own, wide.buffer = wide.buffer, program.buffer
    wide.step(4, [8, 5], "fp8")  # two sizes in turn
    program.step(5, [20, 1])
    own.destroy()
    program.buffer.destroy()
    none = Program(ctx, gpus, num_nvl_bytes=0)
    assert "num_nvl_bytes=0 holds no token" in refused(ValueError, lambda: none.step(1, [1, 1]))
    none.buffer.destroy()
    both = Program(ctx, gpus, low_latency_mode=True)
    for number in range(3):
        both.step(number, [4, 20])
        x = torch.ones(2, both.hidden, dtype=torch.bfloat16, device=both.device)
        ids = torch.tensor([[0, 1, 7], [0, -1, -1]], device=both.device)
        rows, _, handle, _, _ = both.buffer.low_latency_dispatch(x, ids, 4, both.experts, use_fp8=False)
        out, _, _ = both.buffer.low_latency_combine(rows, ids, torch.ones(2, 3, device=both.device), handle)
        assert out[:, 0].tolist() == [3.0, 1.0]
    both.buffer.destroy()


def wander(ctx: Ctx, gpus: Gpus = None) -> None:
    """Calls in any order: what is refused is what two sets of buffers do not allow, and nothing else goes wrong."""
    program = Program(ctx, gpus)
    chance = random.Random(3)  # the same on every rank
    held: list[Received] = []
    opened: dict[Received, int] = {}  # -> the number of its open step
    late: set[Received] = set()
    count = refusals = 0

    def begin(got: Received) -> None:
        nonlocal count
        count += 1
        opened[got] = count
        late.discard(got)
        for other in [other for other, number in opened.items() if number < count - 1]:
            del opened[other]
            late.add(other)

    for turn in range(120):
        end = chance.choice(["plain", "event", "chain"])
        act = chance.choice(["new", "new", "again", "combine", "combine", "combine", "drop"])
        if act == "new" or not held:
            tokens = [chance.randrange(21) for _ in range(ctx.world)]
            got = program.dispatch(program.inputs(turn, tokens, chance.choice(["bf16", "fp8"])), end)
            got.check()
            held.append(got)
            begin(got)
            continue
        got = chance.choice(held[-4:])
        if act == "drop":
            held.remove(got)
        elif act == "again":
            got.again(end)
            begin(got)
        elif got in late:
            refusals += 1
            refused(HandleError, lambda got=got, turn=turn: got.combine(turn))  # type: ignore[misc]
        else:
            if got not in opened:
                begin(got)
            got.combine(turn, end, columns=chance.choice([0, 2]), biases=chance.choice([0, 1]))
            del opened[got]
    assert refusals > 5 and count > 50, (refusals, count)
    program.buffer.destroy()


def brief(ctx: Ctx, gpus: Gpus = None) -> None:
    """A little of everything, for ranks that are slow."""
    Buffer.set_num_sms(2)
    program = Program(ctx, gpus, experts=4, hidden=128, top_k=2, most=3)
    for number, form in enumerate(("bf16", "ue8m0")):
        got = program.dispatch(program.inputs(number, [3, 2], form), num_worst_tokens=5 if number else 0)
        got.check()
        got.combine(number, columns=2)
        got.again()
        got.combine(number)
        got.combine(number)
    program.buffer.destroy()


# ------------------------------------------------------------------------------------------------------------- training


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, x: Tensor, weights: Tensor, ids: Tensor) -> Any:
        buffer = program.buffer
        per_rank, _, per_expert, hit, _ = buffer.get_dispatch_layout(ids, program.experts)
        got = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=hit,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=weights,
        )
        ctx.program, ctx.handle = program, got[4]
        ctx.mark_non_differentiable(got[1])
        ctx.set_materialize_grads(True)
        return got[0], got[1], got[2], got[4]

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, _ids: Any, grad_weights: Tensor, _handle: Any) -> Any:
        out, weights, _ = ctx.program.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.contiguous()
        )
        return None, out, weights, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, y: Tensor, handle: Any) -> Tensor:
        ctx.program, ctx.handle = program, handle
        return program.buffer.combine(y, handle)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        recv, *_ = ctx.program.buffer.dispatch(grad.contiguous(), ctx.handle)
        return None, recv.clone(), None


def training(ctx: Ctx, gpus: Gpus = None) -> None:
    """Forward and backward of three layers, whose activations are kept until backward, against dense layers."""
    program = Program(ctx, gpus)
    layers, tokens = 3, [11, 6]
    batches = [program.inputs(layer, tokens) for layer in range(layers)]
    generator = torch.Generator().manual_seed(5)
    factors = 0.5 + torch.rand(layers, program.experts, program.hidden, generator=generator)

    def run(x: Tensor, weights: list[Tensor], layer_of: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        for layer in range(layers):
            x = x + layer_of(layer, x, weights[layer])
        return x

    def dense(rank: int) -> Callable[[int, Tensor, Tensor], Tensor]:
        def layer_of(layer: int, x: Tensor, weights: Tensor) -> Tensor:
            ids = batches[layer][rank].ids
            scale = wanted_factors[layer][ids.clamp(min=0)] * torch.where(ids >= 0, weights, 0.0)[..., None]
            return x * scale.sum(1)

        return layer_of

    wanted_factors = factors.clone().requires_grad_()
    starts = [b.x.float().requires_grad_() for b in batches[0]]
    scores = [[batches[layer][r].weights.clone().requires_grad_() for layer in range(layers)] for r in range(ctx.world)]
    for r in range(ctx.world):
        run(starts[r], scores[r], dense(r)).sum().backward()

    me, first = program.rank, program.local * program.rank
    own = program.there(factors[:, first : first + program.local]).requires_grad_()

    def exchanged(layer: int, x: Tensor, weights: Tensor) -> Tensor:
        ids = program.there(batches[layer][me].ids)
        recv, recv_ids, recv_weights, handle = _Dispatch.apply(program, x, weights, ids)
        scale = own[layer][recv_ids.clamp(min=0)] * torch.where(recv_ids >= 0, recv_weights, 0.0)[..., None]
        return _Combine.apply(program, recv * scale.sum(1).to(torch.bfloat16), handle)  # autograd keeps recv

    x = program.there(batches[0][me].x).requires_grad_()
    weights = [program.there(batches[layer][me].weights).requires_grad_() for layer in range(layers)]
    run(x, weights, exchanged).float().sum().backward()

    def near(got: Tensor | None, want: Tensor | None) -> None:
        assert got is not None and want is not None
        difference = (got.float().cpu() - want.float()).norm() / want.norm()
        assert difference < 0.03, difference

    near(x.grad, starts[me].grad)
    near(own.grad, wanted_factors.grad[:, first : first + program.local])  # type: ignore[index]
    for got, want in zip(weights, scores[me], strict=True):
        near(got.grad, want.grad)
    program.buffer.destroy()
