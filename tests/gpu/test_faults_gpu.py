"""GPU ranks when one is late, hangs or dies, when steps overlap, and how large their buffers are."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from ranks import Ctx, run_ranks
from test_all_to_all_gpu import GPUS, SMALL, Member, two_gpus
from virtual_steps import Steps, check_combine, check_dispatch, make_inputs, without

from moe_a2a import AllToAll, Config, Handle, HandleError, Masked, NotFinite, Options, RankLost
from moe_a2a.gpu.layout import Layout
from moe_a2a.virtual import VirtualGroup
from moe_a2a.workload import Inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU"),
    pytest.mark.timeout(300),
]
MIB2 = 2 << 20


class Graph:
    """A captured step of a rank, with its own tokens in static tensors."""

    def __init__(self, member: Member, mine: Inputs) -> None:
        device = member.group.device
        self.arguments = [t.to(device) for t in (mine.x, mine.topk_ids, mine.topk_weights)]
        self.into = member.poisoned(None)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.got: Masked = member.a2a.dispatch(*self.arguments, out=self.into)
            self.out = member.a2a.combine(member.own_y, self.got.handle)

    def replay(self) -> None:
        self.into.view(torch.uint8).fill_(0x7F)
        self.out.fill_(torch.nan)
        self.graph.replay()


def whole(member: Member, inputs: list[Inputs]) -> tuple[Handle, Masked, torch.Tensor]:
    handle = member.send(inputs)
    got = member.a2a.dispatch_recv(handle, out=member.poisoned(None))
    assert isinstance(got, Masked)
    return handle, got, member.a2a.combine(member.own_y, handle)


# ------------------------------------------------------------------------------------------------------- who is missing


def _hang(ctx: Ctx, gpus: tuple[int, ...], budget_s: float) -> None:
    """Rank 0 makes no more steps. It costs rank 1 one budget, however many steps and replays follow."""
    member = Member(ctx, gpus, SMALL, timeout_s=budget_s)
    inputs = member.inputs(0, [9] * ctx.world)
    member.step(inputs)
    good, _, _ = whole(member, inputs)
    assert member.a2a.missing(good) == []
    graph = Graph(member, inputs[ctx.rank])
    graph.replay()
    member.check_got(inputs, graph.got)
    member.check_sums(inputs, graph.out)
    assert member.a2a.missing(graph.got.handle) == []
    ctx.barrier("all is well")
    if ctx.rank == 0:
        ctx.store.wait(["told"])
        member.a2a.close()
        return
    started = time.monotonic()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    took = time.monotonic() - started
    assert budget_s * 0.9 < took < budget_s * 1.7, took
    assert member.a2a.missing(graph.got.handle) == [0]
    # Of its own tokens, and nothing stale.
    check_dispatch(member.group, without(inputs, 0), member.in_place(graph.got), None, [1])  # type: ignore[arg-type]
    local = member.group.layout.E_L
    kept = [type(i)(i.x, i.topk_ids.masked_fill(i.topk_ids // local == 0, -1), i.topk_weights) for i in inputs]
    check_combine(member.group, without(kept, 0), member.y, member.in_place(graph.out), [1])  # type: ignore[arg-type]
    time.sleep(0.2)
    with pytest.raises(RankLost) as caught:  # nobody has asked the device: the host was told
        member.send(inputs)
    assert caught.value.ranks == (0,)
    assert member.a2a.missing(graph.got.handle) == [0]
    ctx.store.set("told", "1")
    member.a2a.close()
    with pytest.raises(HandleError, match="is closed"):
        member.a2a.missing(graph.got.handle)


def test_a_rank_that_hangs_costs_one_budget_also_where_graphs_are_replayed() -> None:
    run_ranks(_hang, 2, (0, GPUS - 1), 2.0)


def _dead_and_late(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    """Rank 2 dies while rank 1 is two seconds late: rank 0 goes on without rank 2, and with rank 1."""
    member = Member(ctx, gpus, Config(48, 256, 6, 24))
    inputs = member.inputs(3, [9] * ctx.world)
    member.step(inputs)
    member.step(inputs)
    ctx.barrier("all is well")
    if ctx.rank == 2:
        ctx.barrier("sent")
        os.kill(os.getpid(), signal.SIGKILL)
    mine, device = inputs[ctx.rank], member.group.device
    x, ids, weights = (t.to(device) for t in (mine.x, mine.topk_ids, mine.topk_weights))
    out = member.poisoned(None)
    torch.cuda.synchronize()
    if ctx.rank == 1:  # nothing below waits for the device before `started`
        torch.cuda._sleep(int(2 * 1.5e9))  # cycles: some two seconds
    handle = member.a2a.dispatch_send(x, ids, weights)
    started = time.monotonic()
    got = member.a2a.dispatch_recv(handle, out=out)
    ctx.barrier("sent")
    torch.cuda.synchronize()
    took = time.monotonic() - started
    assert isinstance(got, Masked)
    assert 0.7 < took < 20.0, took
    assert member.a2a.missing(handle) == [2]
    check_dispatch(member.group, without(inputs, 2), member.in_place(got), None, [ctx.rank])  # type: ignore[arg-type]
    with pytest.raises(RankLost, match="rank 2 died") as caught:
        member.a2a.check()
    assert caught.value.ranks == (2,)
    member.a2a.close()


@two_gpus
def test_a_death_takes_no_time_from_a_rank_that_is_late() -> None:
    run_ranks(_dead_and_late, 3, (0, 1, 0), dies=[2])


def test_a_masked_rank_is_left_out_and_a_late_one_waited_for_on_one_gpu() -> None:
    """Three virtual ranks; the late one sends from another stream while the first one's receive is running."""
    config = Config(6, 128, 2, 3)
    group = VirtualGroup(config, 3, timeout_s=60.0)
    steps = Steps(group)
    steps.step([3, 3, 3])
    inputs = make_inputs(config, 1, 0, [3, 2, 3])
    there = [steps.there([i.x, i.topk_ids, i.topk_weights]) for i in inputs]
    out = steps.poisoned(None)[0]
    # The late rank makes the same calls on its stream before: new memory for a stream is cudaMalloc's, which may wait
    # for the device, and so does the first launch of a kernel. Streams of one priority may share a hardware queue.
    other = torch.cuda.Stream(priority=-1)
    handles = [rank.dispatch_send(*given) for rank, given in zip(group.ranks[:2], there[:2], strict=True)]
    with torch.cuda.stream(other):
        other.wait_stream(torch.cuda.default_stream())
        handles.append(group.ranks[2].dispatch_send(*there[2]))
    torch.cuda.default_stream().wait_stream(other)
    group.dispatch_recv(handles)
    group.discard(handles)
    torch.cuda.synchronize()
    handle = group.ranks[0].dispatch_send(*there[0])
    got = group.ranks[0].dispatch_recv(handle, out=out)
    ended = torch.cuda.Event()
    ended.record()
    group.alive.fill_(0b101)
    time.sleep(0.5)
    assert not ended.query()
    with torch.cuda.stream(other):
        group.ranks[2].dispatch_send(*there[2])
    ended.synchronize()
    check_dispatch(group, without(inputs, 1), [got, None, None], None, [0])
    assert group.ranks[0].missing(handle) == [1]
    assert group.told[0] == 0b010


# ------------------------------------------------------------------------------------------------- steps that overlap


def _replays_inside_an_open_step(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    """One replay fits between the halves of an eager step, whatever turn each of them has; two do not."""
    member = Member(ctx, gpus, SMALL)
    a2a = member.a2a
    first, second = member.inputs(1, [24, 3]), member.inputs(2, [5, 24])
    member.step(first)
    graphs = []
    for _ in range(2):
        graphs.append(Graph(member, second[ctx.rank]))
        member.step(first)  # so that the graphs are captured at either turn of the host's count
    for turn in range(8):
        graph = graphs[turn % 2]
        handle = member.send(first)
        if turn % 3 == 0:
            graph.replay()
        got = a2a.dispatch_recv(handle, out=member.poisoned(None))
        if turn % 3 == 1:
            graph.replay()
        a2a.combine_send(member.own_y, handle)
        if turn % 3 == 2:
            graph.replay()
        out = a2a.combine_recv(handle)
        assert isinstance(got, Masked)
        member.check_got(first, got)
        member.check_sums(first, out)
        member.check_got(second, graph.got)
        member.check_sums(second, graph.out)
        if turn % 2:
            member.step(second, "fp32")
    a2a.check()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = a2a.dispatch_send(*graphs[0].arguments)
    with pytest.raises(HandleError, match="its other calls belong into a capture too"):
        a2a.dispatch_recv(captured)
    handle = member.send(first)
    got = a2a.dispatch_recv(handle, out=member.poisoned(None))
    for _ in range(3):  # the second finds the eager step's buffers in use, and the third may go again
        graphs[0].replay()
    out = a2a.combine(member.own_y, handle)
    assert isinstance(got, Masked)
    member.check_got(first, got)
    member.check_sums(first, out)
    with pytest.raises(HandleError, match="while the one before the last was open: it sent nothing"):
        a2a.check()
    with pytest.raises(HandleError, match="cannot be used further"):
        member.send(first)
    a2a.close()


def test_replays_inside_an_open_step_work_or_are_reported() -> None:
    run_ranks(_replays_inside_an_open_step, 2, (0, GPUS - 1))


def _discards_in_graphs(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    """A captured dispatch and discard, replayed between eager steps and discards."""
    member = Member(ctx, gpus, SMALL)
    inputs = member.inputs(1, [24, 3])
    mine = inputs[ctx.rank]
    given = [t.to(member.group.device) for t in (mine.x, mine.topk_ids, mine.topk_weights)]
    member.step(inputs)
    member.a2a.discard(member.send(inputs))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        member.a2a.discard(member.a2a.dispatch_send(*given))
    for turn in range(6):
        graph.replay()
        if turn % 2:
            graph.replay()
        member.step(member.inputs(turn, [turn, 24 - turn]))
        handle = member.send(inputs)
        graph.replay()
        member.a2a.discard(handle)
        assert member.a2a.missing(handle) == []
    member.end()


def test_discards_can_be_captured_and_mixed_with_steps() -> None:
    run_ranks(_discards_in_graphs, 2, (0, GPUS - 1))


# ------------------------------------------------------------------------------------------------------- bad inputs


def poll_for(a2a: AllToAll, seconds: float) -> None:
    """What a program that only replays graphs calls."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        a2a.poll()
        time.sleep(0.01)


def _not_finite(ctx: Ctx, gpus: tuple[int, ...]) -> None:
    member = Member(ctx, gpus, SMALL)
    inputs = member.inputs(0, [8] * ctx.world)
    for spoil, says, late in (
        ("x", r"x: token 5, columns 128 to 255 has scale nan; scales must be finite", False),
        ("weights", r"topk_weights\[5, 2\] = inf; router weights must be finite", False),
        ("weights", r"topk_weights\[5, 2\] = inf; router weights must be finite", True),
    ):
        mine = inputs[ctx.rank]
        x, weights = mine.x.clone(), mine.topk_weights.clone()
        if ctx.rank == 1 and spoil == "x":
            x[5, 200] = torch.nan
        if ctx.rank == 1 and spoil == "weights":
            weights[5, 2] = torch.inf
        device = member.group.device
        x, ids, weights = x.to(device), mine.topk_ids.to(device), weights.to(device)
        got = member.a2a.dispatch(x, ids, None if late else weights, fp8="fp32" if spoil == "x" else None)
        member.a2a.combine(member.own_y, got.handle, weights if late else None)
        if ctx.rank == 1:
            with pytest.raises(NotFinite, match=says):
                member.a2a.check() if late else poll_for(member.a2a, 2.0)
        else:
            poll_for(member.a2a, 0.3)
            member.a2a.check()
        ctx.barrier(f"{spoil} {late}")
    member.step(inputs)
    member.end()


def test_what_is_not_finite_is_reported_as_on_cpu_ranks() -> None:
    run_ranks(_not_finite, 2, (0, GPUS - 1))


# ----------------------------------------------------------------------------------------------------- devices, memory


@two_gpus
def test_virtual_ranks_use_their_device_and_a_rank_alone_says_that_it_is_not_the_current_one() -> None:
    with torch.cuda.device(0):
        group = VirtualGroup(Config(8, 128, 2, 3), 2, "cuda:1")
        steps = Steps(group)
        steps.step([3, 2])
        steps.step([1, 3], "fp32", weights=False)
        given = steps.there([getattr(make_inputs(group.config, 0, 0, [2])[0], n) for n in ("x", "topk_ids")])
        with pytest.raises(HandleError, match="the current device is cuda:0, and this rank is on cuda:1"):
            group.ranks[0].dispatch_send(*given)


def _buffers(ctx: Ctx, gpus: tuple[int, ...], tokens: int, fp8_only: bool, most: float) -> int:
    torch.cuda.set_device(gpus[ctx.rank])
    config = Config(256, 7168, 8, tokens, channels=("a", "b"))
    one = Layout.of(config, ctx.world, fp8_only).region_bytes
    assert one <= most
    options = Options(fp8_only=fp8_only)
    with AllToAll(config, store=ctx.store, rank=ctx.rank, world_size=ctx.world, device="cuda", options=options) as a2a:
        assert a2a.buffer_bytes == 2 * -(-one // MIB2) * MIB2  # memory is mapped in steps of 2 MiB
        return a2a.buffer_bytes // 2


@pytest.mark.parametrize(
    "tokens, fp8_only, most", [(128, True, 12e6), (128, False, 16e6), (1024, True, 100e6), (1024, False, 120e6)]
)
def test_buffers_are_as_small_as_the_layout_says(tokens: int, fp8_only: bool, most: float) -> None:
    print(run_ranks(_buffers, 2, (0, GPUS - 1), tokens, fp8_only, most))
