"""DeepEP's Buffer on CPU ranks, against the oracle; and its kernel outputs with virtual ranks in the interpreter."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import pytest
import torch
from deep_ep_steps import ENDS, FORMS, Program
from ranks import Ctx, run_ranks

from moe_a2a import ConfigError, HandleError, InputError, Options
from moe_a2a.compat import deep_ep
from moe_a2a.compat.deep_ep import Buffer, EventHandle, EventOverlap
from moe_a2a.gpu.layout import Layout


def _all_forms(ctx: Ctx) -> None:
    program = Program(ctx, "cpu")
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


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_form_and_every_way_to_wait_matches_the_oracle(ranks: int) -> None:
    run_ranks(_all_forms, ranks)


def _two_batches(ctx: Ctx) -> None:
    """Two micro-batches through one Buffer, each a phase behind the other, as two-batch overlap runs them."""
    program = Program(ctx, "cpu")
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


def test_two_batches_take_turns_in_one_buffer() -> None:
    run_ranks(_two_batches, 2)


def _dropped(ctx: Ctx) -> None:
    program = Program(ctx, "cpu")
    got = []
    for number in range(7):  # a program that only dispatches, as a benchmark does
        got.append(program.dispatch(program.inputs(number, [4, 3]), "bf16", "hook" if number % 3 == 0 else "plain"))
        if number % 2:
            got[-1].finish()
            got[-1].check()
    got[-2].check()  # two results are valid
    assert "at most two results are valid" in _refused(HandleError, lambda: got[-3].combine(0))
    got[-1].finish()
    got[-1].combine(1)
    got[-2].combine(2)
    assert "was combined already" in _refused(HandleError, lambda: got[-1].combine(1))
    # A combine whose hook nobody called is finished when its buffers are needed.
    left = program.dispatch(program.inputs(8, [4, 3]))
    mine = left.inputs[ctx.rank]
    out, _, hook = program.buffer.low_latency_combine(
        program.outputs(8)[ctx.rank], mine.topk_ids, mine.topk_weights, left.handle, return_recv_hook=True
    )
    program.step(9, [1, 6])
    program.step(10, [6, 1])
    assert out.isfinite().all()
    assert "is finished" in _refused(HandleError, hook)
    program.buffer.destroy()


def test_steps_that_are_not_combined_make_room_for_later_ones() -> None:
    run_ranks(_dropped, 2)


def _parts(ctx: Ctx) -> None:
    program = Program(ctx, "cpu")
    world, experts = ctx.world, program.experts // ctx.world
    # A handle taken apart and put together again; out; zero_copy; a wire format that is an optimisation only.
    got = program.dispatch(program.inputs(0, [6, 2]))
    src_info, layout_range, *sizes = got.handle
    out = torch.full((len(got.x), program.hidden), float("nan"), dtype=torch.bfloat16)
    assert got.combine(0, handle=(src_info, layout_range, *sizes), out=out) is out
    program.dispatch(program.inputs(1, [6, 2])).combine(1, zero_copy=True)
    one, two = (program.dispatch(program.inputs(n, [1, 5]), "fp8") for n in (2, 3))
    two.combine(3, zero_copy=True)
    one.combine(2, zero_copy=True, use_logfmt=True)
    # Callers empty what they have used.
    got = program.dispatch(program.inputs(4, [6, 6]), "fp8")
    for tensor in (*got.recv, got.count, got.handle[1]):
        tensor.set_(torch.empty(0, dtype=tensor.dtype))
    got.combine(4)
    for number in range(5, 8):
        program.step(number, [6, 6], "fp8")
    # Statistics add up.
    stats = torch.zeros(experts, dtype=torch.int32)
    waits, more = torch.zeros(world, dtype=torch.int64), torch.zeros(world, dtype=torch.int64)
    counts = torch.zeros(experts, dtype=torch.int32)
    for end in ("plain", "hook", "plain"):
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
        got.combine(9, end, combine_wait_recv_cost_stats=more)
        assert (more > 0).all() and torch.equal(waits, before) and (waits > 0).all()
    program.buffer.destroy()


def test_handles_results_and_statistics_are_deep_eps() -> None:
    run_ranks(_parts, 2)


def _sizes(ctx: Ctx) -> None:
    """Any sizes through one Buffer, several Buffers on one group, and ids on the rank's own terms."""
    small, large = Program(ctx, "cpu"), Program(ctx, "cpu", experts=4, hidden=512, top_k=2, most=9)
    for number in range(3):
        small.step(number, [6, 1])
        large.step(number, [2, 9], "fp8", "hook")
    wide = Program(ctx, "cpu", most=11)
    wide.buffer.destroy()
    wide.buffer = small.buffer
    for number in range(3):
        wide.step(number, [11, 3])
        small.step(number, [4, 4])
    small.buffer.destroy()
    large.buffer.destroy()
    assert "is destroyed" in _refused(HandleError, lambda: small.step(0, [1, 1]))
    again = Program(ctx, "cpu")
    again.buffer.clean_low_latency_buffer(6, 256, 8)
    again.step(0, [1, 1])
    again.buffer.explicitly_destroy = False
    with pytest.raises(AssertionError, match="explicitly_destroy"):
        again.buffer.destroy()
    del again
    gc.collect()


def test_sizes_may_change_and_buffers_are_many() -> None:
    run_ranks(_sizes, 2)


def _refused(error: type[Exception], call: Any) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def _bad_input(ctx: Ctx) -> None:
    program = Program(ctx, "cpu")
    buffer = program.buffer
    inputs = program.inputs(0, [6, 2])
    mine = inputs[ctx.rank]
    x, ids, weights = mine.x, mine.topk_ids, mine.topk_weights

    def dispatch(x: Any = x, ids: Any = ids, most: int = 6, experts: int = 8, **options: Any) -> str:
        return _refused(InputError, lambda: buffer.low_latency_dispatch(x, ids, most, experts, **options))

    program.step(0, [6, 2])
    assert "x has dtype torch.float32; give torch.bfloat16" in dispatch(x.float())
    assert "topk_idx has dtype torch.int32; give torch.int64" in dispatch(ids=ids.int())
    assert "topk_idx is not a tensor with two dimensions" in dispatch(ids=ids[0])
    assert "x is not a tensor" in dispatch(x.tolist())
    assert "use_nvfp4 and x_global_scale are not served" in dispatch(use_nvfp4=True)
    assert "give round_scale=True with it" in dispatch(use_ue8m0=True)
    assert "cannot both be set" in dispatch(async_finish=True, return_recv_hook=True)
    assert "max_tokens_per_rank=6, but this call brings 7 tokens" in dispatch(
        torch.zeros(7, 256, dtype=torch.bfloat16), torch.zeros(7, 3, dtype=torch.int64)
    )
    assert "allowed are 0 to 7, and -1" in dispatch(ids=torch.full_like(ids, 8))
    for name, wrong in (
        ("cumulative_local_expert_recv_stats", torch.zeros(8, dtype=torch.int32)),
        ("dispatch_wait_recv_cost_stats", torch.zeros(2, 2, dtype=torch.int64)),
    ):
        assert f"{name} is {wrong.dtype} {list(wrong.shape)}" in dispatch(**{name: wrong})
    assert "num_experts=9 does not divide by 2 ranks" in _refused(
        ConfigError, lambda: buffer.low_latency_dispatch(x, ids, 6, 9)
    )
    program.step(1, [6, 2])

    got = program.dispatch(inputs, end="hook")
    y = program.outputs(0)[ctx.rank]

    def combine(y: Any = y, ids: Any = ids, weights: Any = weights, handle: Any = got.handle, **options: Any) -> str:
        error = options.pop("error", InputError)
        return _refused(error, lambda: buffer.low_latency_combine(y, ids, weights, handle, **options))

    assert "sent, not received" in combine(error=HandleError)
    got.finish()
    assert "is received, not combined; this call needs a step that is sent" in _refused(HandleError, got.finish)
    assert "x is torch.float32" in combine(y.float())
    assert "topk_idx is torch.int64 [1, 3]" in combine(ids=ids[:1])
    assert "topk_weights is torch.float64" in combine(weights=weights.double())
    assert "router weights must be finite" in combine(weights=torch.full_like(weights, float("nan")))
    assert "out is torch.bfloat16 [1, 256]" in combine(out=torch.zeros(1, 256, dtype=torch.bfloat16))
    assert "which was never asked for" in combine(zero_copy=True)
    assert "overlap and src_signals are not served" in combine(overlap=True)
    assert "combine_wait_recv_cost_stats is a list" in combine(combine_wait_recv_cost_stats=[0, 0])
    assert "not the tuple of five" in combine(handle=None, error=HandleError)
    assert "no open step has this handle" in combine(handle=(*_copies(got.handle[:2]), 6, 256, 8), error=HandleError)
    got.combine(0)
    assert "enable_shrink=True" in _refused(HandleError, buffer.low_latency_clean_mask_buffer)
    buffer.destroy()
    with pytest.raises(HandleError, match="low_latency_mode=False"):
        Buffer(buffer.group, device="cpu").low_latency_dispatch(x, ids, 6, 8)
    with pytest.raises(ConfigError, match="enable_shrink=True needs GPU ranks"):
        Buffer(buffer.group, low_latency_mode=True, enable_shrink=True, device="cpu")


def _copies(tensors: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_ranks(_bad_input, 2)


def test_a_buffer_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="mpi4py communicator cannot be used"):
        Buffer(None, comm=object())
    with pytest.raises(ConfigError, match="group is None"):
        Buffer(None)


def test_the_size_hint_is_what_gpu_ranks_allocate() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    real = Layout(8, 256, 7168, 8, 128, 2).region_bytes
    assert hint % (2 << 20) == 0
    assert real <= hint < 1.02 * real + (2 << 20)


def test_statics_and_events_are_there() -> None:
    assert Buffer.is_sm90_compiled() is True
    assert deep_ep.topk_idx_t == torch.int64
    before = Buffer.num_sms
    Buffer.set_num_sms(before + 4)
    assert Buffer.num_sms == before + 4
    Buffer.set_num_sms(before)
    with pytest.raises(AssertionError, match="even"):
        Buffer.set_num_sms(3)
    calls: list[int] = []
    event = Buffer.capture()
    event.register_hook_after_wait(lambda: calls.append(1))
    with event(release_handle=True):
        assert calls == []
    assert calls == [1] and event.event is None
    EventOverlap(EventHandle()).current_stream_wait()
    with pytest.raises(AssertionError, match="not asynchronous"):
        EventOverlap().current_stream_wait()


def test_the_parameters_are_those_of_deep_ep_1_2_1() -> None:
    """Names, order and defaults, so that positional calls mean the same."""
    signatures = {
        "__init__": "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False num_qps_per_rank=24 "
        "allow_nvlink_for_low_latency_mode=True allow_mnnvl=False use_fabric=None explicitly_destroy=False "
        "enable_shrink=False comm=None",
        "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts "
        "cumulative_local_expert_recv_stats=None dispatch_wait_recv_cost_stats=None x_global_scale=None use_fp8=True "
        "round_scale=False use_ue8m0=False use_nvfp4=False async_finish=False return_recv_hook=False",
        "low_latency_combine": "x topk_idx topk_weights handle use_logfmt=False zero_copy=False async_finish=False "
        "return_recv_hook=False out=None combine_wait_recv_cost_stats=None overlap=False src_signals=None "
        "src_signal_expect_value=0",
        "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank hidden num_experts",
        "get_next_low_latency_combine_buffer": "handle",
        "low_latency_update_mask_buffer": "rank_to_mask mask=False",
        "low_latency_query_mask_buffer": "mask_status",
        "low_latency_clean_mask_buffer": "",
        "destroy": "",
    }
    for name, text in signatures.items():
        found = [
            p.name if p.default is p.empty else f"{p.name}={p.default}"
            for p in inspect.signature(getattr(Buffer, name)).parameters.values()
            if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert " ".join(found) == text, name


def _options_reach_the_core(ctx: Ctx) -> None:
    program = Program(ctx, "cpu", options=Options(timeout_s=7.5, host=f"host-{ctx.rank}"))
    program.dispatch(program.inputs(0, [1, 1]))
    (steps,) = program.buffer._low_latency._all.values()
    assert steps.a2a.options.timeout_s == 7.5 and steps.a2a.hosts == ((0,), (1,))
    program.buffer.destroy()


def test_options_of_the_core_can_be_given() -> None:
    pytest.importorskip("mooncake.engine", reason="needs the Transfer Engine")
    run_ranks(_options_reach_the_core, 2)
