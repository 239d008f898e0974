"""AllToAll on GPU ranks: processes on one or two GPUs against the oracle. Ranks that share a GPU take turns on it."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ranks import Ctx, run_ranks
from torch import Tensor
from virtual_steps import bits, check_combine, check_dispatch, check_rows, expert_outputs, make_inputs

from moe_a2a import AllToAll, Config, ConfigError, Handle, HandleError, InputError, Masked, Options, RankLost
from moe_a2a import reference as ref
from moe_a2a.fp8 import FP8
from moe_a2a.gpu.layout import Layout
from moe_a2a.workload import Inputs

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU"),
    pytest.mark.timeout(300),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
#: The GPU of each rank.
PLACES = [
    pytest.param((0, 1), id="two GPUs", marks=two_gpus),
    pytest.param((0, 1, 0, 1), id="four ranks on two GPUs", marks=two_gpus),
    pytest.param((0, 0), id="two ranks on one GPU"),
]
BUDGET_S = 60.0  # ranks that share a GPU wait for their turn
SMALL = Config(64, 256, 6, 24)
POISON = 0x7F


@dataclass
class Group:
    """What the checks of virtual ranks want to know of a group."""

    config: Config
    layout: Layout
    ranks: range
    device: torch.device


class Member:
    """One rank of a test, with what it needs to make checked steps."""

    def __init__(self, ctx: Ctx, gpus: tuple[int, ...], config: Config, **options: Any) -> None:
        self.rank, self.world, self.steps = ctx.rank, ctx.world, 0
        torch.cuda.set_device(gpus[ctx.rank])
        options.setdefault("timeout_s", BUDGET_S)
        self.a2a = AllToAll(
            config, store=ctx.store, rank=ctx.rank, world_size=ctx.world, device="cuda", options=Options(**options)
        )
        device = torch.device("cuda", gpus[ctx.rank])
        assert self.a2a.device == device
        self.group = Group(config, Layout.of(config, ctx.world), range(ctx.world), device)
        self.y = expert_outputs(self.group, 0)
        self.own_y = self.y[ctx.rank].to(device)

    def inputs(self, seed: int, tokens: list[int], **options: Any) -> list[Inputs]:
        """What every rank brings."""
        return make_inputs(self.group.config, seed, 0, tokens, **options)

    def send(self, inputs: list[Inputs], weights: bool = True, **options: Any) -> Handle:
        mine, device = inputs[self.rank], self.group.device
        given = mine.topk_weights.to(device) if weights else None
        return self.a2a.dispatch_send(mine.x.to(device), mine.topk_ids.to(device), given, **options)

    def poisoned(self, fp8: str | None) -> Tensor:
        layout = self.group.layout
        dtype = FP8 if fp8 else self.group.config.dtype
        out = torch.empty((layout.E_L, layout.CAP, layout.H), dtype=dtype, device=self.group.device)
        out.view(torch.uint8).fill_(POISON)
        return out

    def in_place(self, got: Any) -> list[Any]:
        return [got if rank == self.rank else None for rank in self.group.ranks]

    def check_got(self, inputs: list[Inputs], got: Masked, fp8: Any = None) -> None:
        check_dispatch(self.group, inputs, self.in_place(got), fp8, [self.rank])  # type: ignore[arg-type]

    def check_sums(self, inputs: list[Inputs], out: Tensor) -> None:
        check_combine(self.group, inputs, self.y, self.in_place(out), [self.rank])  # type: ignore[arg-type]

    def step(self, inputs: list[Inputs], fp8: Any = None, weights: bool = True, channel: str | None = None) -> None:
        """One eager step, checked to the bit; rows that hold no token must keep their poison. Halves are split at every
        second step."""
        self.steps += 1
        mine, device = inputs[self.rank], self.group.device
        got: Any
        if self.steps % 2:
            given = mine.topk_weights.to(device) if weights else None
            x, ids = mine.x.to(device), mine.topk_ids.to(device)
            got = self.a2a.dispatch(x, ids, given, fp8=fp8, channel=channel, out=self.poisoned(fp8))
            handle = got.handle
        else:
            handle = self.send(inputs, weights, fp8=fp8, channel=channel)
            got = self.a2a.dispatch_recv(handle, out=self.poisoned(fp8))
        later = None if weights else mine.topk_weights.to(self.group.device)
        out = torch.full_like(mine.x, float("nan"), device=self.group.device)
        assert self.a2a.combine(self.own_y, handle, later, out=out) is out
        self.check_got(inputs, got, fp8)
        self.check_sums(inputs, out)

    def end(self) -> None:
        self.a2a.check()
        self.a2a.close()
        self.a2a.close()


def _all_forms(ctx: Ctx, gpus: tuple[int, ...], config: Config) -> None:
    member = Member(ctx, gpus, config)
    most = config.max_tokens_per_rank
    for number, fp8 in enumerate((None, "fp32", "pow2", "ue8m0")):
        for tokens in ([most] * ctx.world, [(17 * r + 5) % (most + 1) for r in range(ctx.world)]):
            member.step(member.inputs(number, tokens, holes=0.15, padding=0.1), fp8, weights=number != 1)
        member.step(member.inputs(number, [0] * (ctx.world - 1) + [1]), fp8)
        member.step(member.inputs(number, [0] * ctx.world), fp8)
    assert member.a2a.hosts == (tuple(range(ctx.world)),)
    assert 0 <= member.a2a.buffer_bytes - member.group.layout.region_bytes < 2 << 20
    member.end()


@pytest.mark.parametrize("gpus", PLACES)
def test_all_forms_of_rows_and_sizes_match_the_oracle(gpus: tuple[int, ...]) -> None:
    run_ranks(_all_forms, len(gpus), gpus, Config(64, 1024, 8, 40))


@two_gpus
def test_the_sizes_of_deepseek_v3_match_the_oracle() -> None:
    run_ranks(_all_forms, 2, (0, 1), Config(256, 7168, 8, 16))


def _random_steps(ctx: Ctx, gpus: tuple[int, ...], steps: int) -> None:
    member = Member(ctx, gpus, SMALL)
    chance = random.Random(7)  # the same on every rank
    for number in range(steps):
        inputs = member.inputs(
            number,
            [chance.choice([0, 1, chance.randint(0, 24), 24]) for _ in range(ctx.world)],
            routing=chance.choice(["uniform", "zipf", "k-hot"]),
            holes=chance.choice([0.0, 0.3]),
            padding=chance.choice([0.0, 0.3]),
        )
        member.step(inputs, chance.choice([None, "fp32", "pow2", "ue8m0"]), chance.random() < 0.7)
    member.end()


@pytest.mark.parametrize("gpus", PLACES)
def test_random_steps_match_the_oracle(gpus: tuple[int, ...]) -> None:
    run_ranks(_random_steps, len(gpus), gpus, 400 if len(gpus) == 2 else 150, timeout=200)


def _graphs(ctx: Ctx, gpus: tuple[int, ...], turns: int) -> None:
    """Every rank captures several sizes over one set of buffers; in a turn, each replays the size that chance gives."""
    member = Member(ctx, gpus, SMALL)
    device = member.group.device
    member.step(member.inputs(0, [4] * ctx.world))  # compiles
    sizes = (0, 1, 3, 8, 24)
    captured = {}
    for size in sizes:
        x = torch.zeros(size, 256, dtype=torch.bfloat16, device=device)
        ids = torch.full((size, 6), -1, dtype=torch.int64, device=device)
        weights = torch.zeros(size, 6, device=device)
        into = member.poisoned(None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = member.a2a.dispatch(x, ids, weights, out=into)
            out = member.a2a.combine(member.own_y, got.handle)
        captured[size] = (graph, x, ids, weights, into, got, out)
    chance = random.Random(3)
    for turn in range(turns):
        tokens = [chance.choice(sizes) for _ in range(ctx.world)]
        inputs = member.inputs(100 + turn, tokens, holes=0.2)
        graph, x, ids, weights, into, got, out = captured[tokens[ctx.rank]]
        mine = inputs[ctx.rank]
        for static, new in ((x, mine.x), (ids, mine.topk_ids), (weights, mine.topk_weights)):
            static.copy_(new)
        into.view(torch.uint8).fill_(POISON)
        graph.replay()
        member.check_got(inputs, got)
        member.check_sums(inputs, out)
        if turn % 5 == 4:
            member.step(member.inputs(turn, [turn % 25] * ctx.world), "fp32")
    member.end()


@pytest.mark.parametrize("gpus", PLACES)
def test_graphs_of_different_sizes_share_buffers_and_meet_in_one_step(gpus: tuple[int, ...]) -> None:
    run_ranks(_graphs, len(gpus), gpus, 60 if len(gpus) == 2 else 30)


def _two_channels(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    """Two micro-batches in flight, each with its own sizes, and two open steps in one channel."""
    member = Member(ctx, gpus, Config(64, 256, 6, 24, channels=("a", "b")))
    for turn in range(12):
        batches = [
            member.inputs(10 * turn + n, [(7 * turn + 11 * n + r) % 25 for r in range(ctx.world)]) for n in (0, 1)
        ]
        handles = [member.send(batch, channel=name) for batch, name in zip(batches, "ab", strict=True)]
        assert [handle.channel for handle in handles] == ["a", "b"]
        got = [member.a2a.dispatch_recv(handle, out=member.poisoned(None)) for handle in handles]
        for handle in handles:
            member.a2a.combine_send(member.own_y, handle)
        outs = [member.a2a.combine_recv(handle) for handle in handles]
        for batch, received, out in zip(batches, got, outs, strict=True):
            member.check_got(batch, received)
            member.check_sums(batch, out)
    first, second = member.inputs(1, [5] * ctx.world), member.inputs(2, [24] * ctx.world)
    one, two = member.send(first), member.send(second)
    assert (one.step, two.step) == (13, 14)
    with pytest.raises(HandleError, match="is still open"):
        member.send(first)
    received = [member.a2a.dispatch_recv(handle, out=member.poisoned(None)) for handle in (one, two)]
    member.check_got(first, received[0])
    member.check_got(second, received[1])
    member.check_sums(second, member.a2a.combine(member.own_y, two))
    member.check_sums(first, member.a2a.combine(member.own_y, one))
    member.end()


@pytest.mark.parametrize("gpus", PLACES)
def test_two_channels_and_two_open_steps(gpus: tuple[int, ...]) -> None:
    run_ranks(_two_channels, len(gpus), gpus)


def _twice(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    seen = []
    for turn in range(2):
        member = Member(ctx, gpus, Config(64, 1024, 8, 40, channels=(f"turn {turn}",)))
        inputs = member.inputs(5, [40] * ctx.world)
        for _ in range(3):  # in other steps, other parities
            got = member.a2a.dispatch_recv(member.send(inputs, fp8="fp32"), out=member.poisoned("fp32"))
            out = member.a2a.combine(member.own_y, got.handle)
            seen.append([bits(got.x).clone(), got.counts.clone(), bits(out)])
        member.end()
    assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(seen[0], later, strict=True))


def test_the_same_inputs_give_the_same_bits() -> None:
    run_ranks(_twice, 2, (0, GPUS - 1))


def _bad_input(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    member = Member(ctx, gpus, SMALL)
    device, a2a = member.group.device, member.a2a
    inputs = member.inputs(0, [8] * ctx.world)
    mine = inputs[ctx.rank]
    x, ids, weights = mine.x.to(device), mine.topk_ids.to(device), mine.topk_weights.to(device)
    for given, says in (
        ((mine.x, ids, weights), rf"x is on cpu; this rank's device is cuda:{device.index}: give a tensor there"),
        ((x, mine.topk_ids, weights), "topk_ids is on cpu"),
        ((x, ids, mine.topk_weights), "topk_weights is on cpu"),
        ((x.float(), ids, weights), "x has dtype torch.float32"),
        ((torch.cat([x] * 4), ids, weights), "max_tokens_per_rank=24, but this call brings 32 tokens"),
    ):
        with pytest.raises(InputError, match=says):
            a2a.dispatch(*given)
    with pytest.raises(InputError, match="channel='b'"):
        a2a.dispatch(x, ids, weights, channel="b")
    with pytest.raises(InputError, match="out has shape"):
        a2a.dispatch(x, ids, weights, out=torch.empty(3, 3, dtype=torch.bfloat16, device=device))
    member.step(inputs)  # nothing of this was sent
    handle = member.send(inputs, weights=False)
    with pytest.raises(HandleError, match="sent, not received"):
        a2a.combine(member.own_y, handle)
    a2a.dispatch_recv(handle)
    with pytest.raises(InputError, match="y is on cpu"):
        a2a.combine(member.own_y.cpu(), handle, weights)
    with pytest.raises(InputError, match="topk_weights were not given at dispatch"):
        a2a.combine(member.own_y, handle)
    member.check_sums(inputs, a2a.combine(member.own_y, handle, weights))
    # A wrong id is found by the kernel: its token loses that choice, and somebody hears of it later.
    for ask in (True, False):
        ids[5, 2] = 64 if ctx.rank == 1 else ids[5, 2]
        inputs[1].topk_ids[5, 2] = -1
        handle = a2a.dispatch_send(x, ids, weights)
        got = a2a.dispatch_recv(handle, out=member.poisoned(None))
        out = a2a.combine(member.own_y, handle)
        member.check_got(inputs, got)
        member.check_sums(inputs, out)
        if ctx.rank == 1:
            with pytest.raises(InputError, match=r"topk_ids\[5, 2\] = 64; allowed are 0 to 63"):
                a2a.check() if ask else _dispatch_until_it_is_raised(member)
        elif not ask:
            _dispatch_until_it_is_raised(member)
    a2a.check()
    a2a.close()
    with pytest.raises(HandleError, match="is closed"):
        member.send(inputs)


def _dispatch_until_it_is_raised(member: Member) -> None:
    """As many steps on every rank: an error that a call raises of its own accord has sent nothing, so it is made up."""
    raised: InputError | None = None
    for number in range(40):
        inputs = member.inputs(number, [3] * member.world)
        try:
            handle = member.send(inputs)
        except InputError as error:
            raised = error
            handle = member.send(inputs)
        member.a2a.dispatch_recv(handle)
        member.a2a.combine(member.own_y, handle)
        torch.cuda.synchronize()
    if raised is not None:
        raise raised


def test_bad_input_is_refused_and_what_kernels_find_is_reported_later() -> None:
    run_ranks(_bad_input, 2, (0, GPUS - 1))


def _given_fp8(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    member = Member(ctx, gpus, Config(64, 512, 6, 512, dtype=torch.float16), fp8_only=True)
    device = member.group.device
    inputs = member.inputs(0, [24, 3])
    for form in ("fp32", "pow2", "ue8m0"):
        rows, scales = zip(*[ref.quantise(i.x, form) for i in inputs], strict=True)
        given = [ref.unpack_ue8m0(s, 4) if form == "ue8m0" else s for s in scales]
        mine = inputs[ctx.rank]
        got = member.a2a.dispatch(
            rows[ctx.rank].to(device),
            mine.topk_ids.to(torch.int32).to(device),
            mine.topk_weights.to(device),
            scales=given[ctx.rank].contiguous().to(device),
            fp8=form,
            out=member.poisoned(form),
        )
        check_rows(member.group, inputs, rows, scales, member.in_place(got), [ctx.rank])  # type: ignore[arg-type]
        member.check_sums(inputs, member.a2a.combine(member.own_y, got.handle))
    with pytest.raises(InputError, match="FP8 rows only"):
        member.send(inputs)
    assert member.a2a.buffer_bytes < member.group.layout.region_bytes
    member.end()


def test_rows_that_are_fp8_already_in_buffers_for_fp8_only() -> None:
    run_ranks(_given_fp8, 2, (0, GPUS - 1))


def _discard(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    member = Member(ctx, gpus, SMALL)
    for turn in range(6):
        inputs = member.inputs(turn, [24, 5])
        member.step(inputs)
        handle = member.send(inputs, weights=turn % 2 == 0)
        if turn % 3:
            member.a2a.dispatch_recv(handle)
        member.a2a.discard(handle)
        with pytest.raises(HandleError, match="finished"):
            member.a2a.discard(handle)
        member.a2a.check()  # a discard is no fault
    # One rank combines what the other discards: it is told, and gets no rows of an older step.
    handle = member.send(inputs)
    if ctx.rank == 0:
        member.a2a.discard(handle)
        member.a2a.check()
        ctx.barrier("told")
    else:
        member.a2a.dispatch_recv(handle)
        member.a2a.combine(member.own_y, handle)
        with pytest.raises(RankLost) as caught:
            member.a2a.check()
        assert caught.value.ranks == (0,)
        ctx.barrier("told")
    member.a2a.close()


def test_a_step_can_be_discarded() -> None:
    run_ranks(_discard, 2, (0, GPUS - 1))


def _a_few_steps(member: Member, inputs: list[Inputs]) -> None:
    for _ in range(3):  # what a victim has sent already may be enough for one step's dispatch
        handle = member.send(inputs)
        member.a2a.dispatch_recv(handle)
        member.a2a.combine(member.own_y, handle)
        torch.cuda.synchronize()


def _death(ctx: Ctx, gpus: tuple[int, ...], place: str) -> float | None:
    member = Member(ctx, gpus, SMALL)
    for turn in range(5):
        member.step(member.inputs(turn, [9] * ctx.world))
    ctx.barrier("all is well")
    victim = ctx.world - 1
    inputs = member.inputs(9, [9] * ctx.world)
    if ctx.rank == victim:
        if place == "sent":
            member.send(inputs)
            torch.cuda.synchronize()
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankLost, match="is gone") as caught:
        _a_few_steps(member, inputs)
    took = time.monotonic() - started
    assert caught.value.ranks == (victim,), caught.value
    with pytest.raises(HandleError, match="cannot be used further"):
        member.send(inputs)
    member.a2a.close()
    return took


@pytest.mark.parametrize("place", ["between steps", "sent"])
@pytest.mark.parametrize("gpus", PLACES)
def test_a_rank_that_dies_is_named_by_the_others_long_before_their_budget_ends(
    gpus: tuple[int, ...], place: str
) -> None:
    times = run_ranks(_death, len(gpus), gpus, place, dies=[len(gpus) - 1])
    assert all(took < 5.0 for took in times[:-1]), times


def _absence(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    member = Member(ctx, gpus, SMALL, timeout_s=1.5)
    inputs = member.inputs(0, [9] * ctx.world)
    for _ in range(2):  # in one launch, and in two: kernels that are compiled have the budget and no more
        member.step(inputs)
    ctx.barrier("all is well")
    if ctx.rank == 0:
        ctx.store.wait(["told"])
        with pytest.raises(RankLost, match="rank 0 is missing, as rank 1 reports"):
            member.send(inputs)
        member.a2a.close()
        return
    handle = member.send(inputs)
    got = member.a2a.dispatch_recv(handle)
    out = member.a2a.combine(member.own_y, handle)
    started = time.monotonic()
    with pytest.raises(RankLost) as caught:
        member.a2a.check()
    assert caught.value.ranks == (0,)
    assert 1.0 < time.monotonic() - started < 8.0
    assert int(got.counts.sum()) > 0 and out.isfinite().all()  # of the rank's own tokens, and nothing stale
    time.sleep(0.2)
    ctx.store.set("told", "1")
    member.a2a.close()


def test_a_rank_that_does_not_come_is_named_when_the_budget_ends() -> None:
    run_ranks(_absence, 2, (0, GPUS - 1))


def _refused(ctx: Ctx, kind: str) -> None:
    options = {"host": f"host {ctx.rank}"} if kind == "hosts" else {}
    device = "cuda:99" if kind == "gpu" and ctx.rank == 1 else "cuda:0"
    if kind == "devices" and ctx.rank == 1:
        device = "cpu"
    says = {
        "hosts": "GPU ranks across hosts come later",
        "gpu": "cuda:99",
        "devices": "device differs between ranks",
    }[kind]
    with pytest.raises(ConfigError, match=says):
        AllToAll(SMALL, store=ctx.store, rank=ctx.rank, world_size=2, device=device, options=Options(**options))


@pytest.mark.parametrize("kind", ["hosts", "gpu", "devices"])
def test_what_cannot_work_is_refused_by_all_ranks(kind: str) -> None:
    run_ranks(_refused, 2, kind)


def _other_current_device(ctx: Ctx) -> None:
    """The object's device need not be the current one."""
    torch.cuda.set_device(0)
    a2a = AllToAll(SMALL, store=ctx.store, rank=ctx.rank, world_size=2, device=f"cuda:{ctx.rank}")
    inputs = make_inputs(SMALL, 0, 0, [9, 9])
    mine = inputs[ctx.rank]
    with a2a:
        got = a2a.dispatch(*(t.to(a2a.device) for t in (mine.x, mine.topk_ids, mine.topk_weights)))
        out = a2a.combine(got.x, got.handle)
        a2a.check()
        expected = ref.moe_output(
            ref.Sizes(2, 64, 24), mine.x, mine.topk_ids, mine.topk_weights, ctx.rank, lambda e, x: x, a2a.hosts
        )
    torch.testing.assert_close(out.cpu(), expected, rtol=2**-6, atol=2**-6)


@two_gpus
def test_the_device_need_not_be_the_current_one() -> None:
    run_ranks(_other_current_device, 2)
