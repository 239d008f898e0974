"""What SGLang's layers, runners and flags can bring that does not work, and ranks that are lost: all is raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import sglang_env
import torch
from ranks import Ctx
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLCombineInput, DeepEPNormalCombineInput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang_ranks import on_ranks
from sglang_steps import Model, Rank, run_experts

from moe_a2a import ConfigError, HandleError, InputError, MoeA2AError, NotFinite, RankLost
from moe_a2a.sglang_plugin import buffers, limits
from moe_a2a.sglang_plugin.dispatcher import MooncakeDispatcher

CPU = torch.device("cpu")


def alone(fn: Callable[..., Any]) -> None:
    """One rank is enough."""
    on_ranks(fn, 1)


def brought(tokens: int, hidden: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    ids = torch.arange(4, dtype=torch.int32).repeat(tokens, 1)
    topk = StandardTopKOutput(torch.ones(tokens, 4), ids, None)
    return {"hidden_states": torch.ones(tokens, hidden, dtype=dtype), "topk_output": topk}


def too_many_tokens(ctx: Ctx) -> None:
    rank = Rank(Model(ranks=1), ctx.rank, CPU)
    for extend, phase, limit, flag in ((False, "decode", 8, "--max-running"), (True, "prefill", 24, "--chunked-pre")):
        set_is_extend_in_batch(extend)
        with pytest.raises(InputError, match=f"a {phase} batch brings {limit + 1} tokens .* hold {limit},.*{flag}"):
            rank.layers[0].dispatch(**brought(limit + 1))
        with pytest.raises(InputError, match=f"a {phase} batch brings"):
            rank.layers[0].dispatch_a(**brought(limit + 1))
        rank.step(0, rank.batch(1, (limit,)), extend)  # nothing was sent, and no step is left open


def test_more_tokens_than_the_flags_allowed_names_the_flags() -> None:
    alone(too_many_tokens)


def wrong_hidden_states(ctx: Ctx) -> None:
    rank = Rank(Model(ranks=1), ctx.rank, CPU)
    for bad in ({"dtype": torch.float16}, {"hidden": 384}):
        with pytest.raises(InputError, match=r"takes torch.bfloat16 \[T, 256\]"):
            rank.layers[0].dispatch(**brought(2, **bad))


def test_hidden_states_of_another_dtype_or_width_are_refused() -> None:
    alone(wrong_hidden_states)


def calls_out_of_order(ctx: Ctx) -> None:
    dispatcher = Rank(Model(ranks=1), ctx.rank, CPU).layers[0]
    set_is_extend_in_batch(False)
    with pytest.raises(HandleError, match="dispatch_b comes after dispatch_a, and the last call was a combine"):
        dispatcher.dispatch_b()
    output = dispatcher.dispatch(**brought(2))
    with pytest.raises(HandleError, match="a dispatch began after dispatch_b"):
        dispatcher.dispatch_a(**brought(2))
    with pytest.raises(HandleError, match="combine_b comes after combine_a, and the last call was dispatch_b"):
        dispatcher.combine_b()
    dispatcher.combine(combine_input=run_experts(Model(ranks=1), 0, output))


def test_calls_out_of_order_are_refused() -> None:
    alone(calls_out_of_order)


def other_combine_inputs(ctx: Ctx) -> None:
    model = Model(ranks=1)
    dispatcher = Rank(model, ctx.rank, CPU).layers[0]
    for extend, other in ((False, DeepEPNormalCombineInput), (True, DeepEPLLCombineInput)):
        set_is_extend_in_batch(extend)
        good = run_experts(model, 0, dispatcher.dispatch(**brought(2)))
        with pytest.raises(HandleError, match=r"step was dispatched, and combine was given .*DEEPEP_"):
            dispatcher.combine(combine_input=other(*good))
        dispatcher._inners[0]._step = None
        buffers.close_all()
    set_is_extend_in_batch(False)
    for name, changed in (("topk_weights", {"topk_weights": torch.ones(2, 4)}), ("topk_ids", {"topk_ids": None})):
        good = run_experts(model, 0, dispatcher.dispatch(**brought(2)))
        changed = {key: good.topk_ids.clone() if value is None else value for key, value in changed.items()}
        with pytest.raises(HandleError, match=f"combine was given {name} .* not those of the dispatch"):
            dispatcher.combine(combine_input=good._replace(**changed))
        dispatcher._inners[0]._step = None
        buffers.close_all()


def test_a_combine_input_of_another_format_or_routing_is_refused() -> None:
    alone(other_combine_inputs)


def forms_that_are_not_sent(ctx: Ctx) -> None:
    rank = Rank(Model(ranks=1), ctx.rank, CPU, deepep_dispatcher_output_dtype="nvfp4")
    with pytest.raises(InputError, match=r"want hidden states as nvfp4.*--deepep-dispatcher-output-dtype bf16 or fp8"):
        rank.layers[0].dispatch(**brought(2))


def test_rows_of_another_form_than_bf16_and_fp8_are_refused() -> None:
    alone(forms_that_are_not_sent)


def uneven_experts(ctx: Ctx) -> None:
    Rank(Model(ranks=1), ctx.rank, CPU)
    with pytest.raises(ConfigError, match="num_experts=16, num_local_experts=None, hidden_size=256"):
        MooncakeDispatcher(None, 4, num_experts=16, hidden_size=256)
    dispatcher = sglang_env.make_dispatcher(torch.distributed.group.WORLD, 16, 256, 4, 2)
    with pytest.raises(InputError, match="a layer has 8 local experts and 16 in all, which 1 ranks would hold by 16"):
        dispatcher.dispatch(**brought(2))


def test_experts_that_the_ranks_do_not_share_equally_are_refused() -> None:
    alone(uneven_experts)


def without_limits(ctx: Ctx) -> None:
    sglang_env.publish()
    with pytest.raises(MoeA2AError, match="no token limits are set"):
        sglang_env.make_dispatcher(torch.distributed.group.WORLD, 16, 256, 4, 1)


def test_a_process_in_which_the_plug_in_is_not_active_gets_no_dispatcher() -> None:
    alone(without_limits)


def lost_in_a_step(ctx: Ctx) -> list[int]:
    buffers.TIMEOUT_S = 2.0
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    rank.step(0, rank.batch(1, (3, 4)), False)
    rank.step(0, rank.batch(2, (3, 4)), True)
    buffers.poll()
    if ctx.rank == 1:
        return []
    set_is_extend_in_batch(False)
    with pytest.raises(RankLost) as lost:
        rank.layers[0].dispatch(**brought(3))
    with pytest.raises(HandleError, match="failed and cannot be used further"):
        buffers.poll()
    return list(lost.value.ranks)


def test_a_rank_that_does_not_come_to_a_step_is_named() -> None:
    assert on_ranks(lost_in_a_step, 2) == [[1], []]


def lost_at_the_start(ctx: Ctx) -> None:
    buffers.MEETING_S = 2.0
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    if ctx.rank == 0:
        with pytest.raises(RankLost, match="not every rank came to the meeting within 2 s"):
            rank.layers[0].dispatch(**brought(3))


def test_a_rank_that_does_not_come_to_the_first_dispatch_is_reported() -> None:
    on_ranks(lost_at_the_start, 2)


def not_finite_once(ctx: Ctx) -> tuple[int, list[str]]:
    """As GPU ranks raise it: of a step before, by a call that has not begun its own."""
    rank = Rank(Model(ranks=1), ctx.rank, CPU)
    rank.step(0, rank.batch(1, (3,)), False)
    (shared,) = buffers._decode.values()
    send, poll, raised = shared.a2a.dispatch_send, shared.a2a.poll, iter([True, False, False])

    def reporting(*args: Any, **kwargs: Any) -> Any:
        if next(raised):
            raise NotFinite("x: token 1, columns 0 to 127 has scale nan")
        return send(*args, **kwargs)

    shared.a2a.dispatch_send = reporting
    rank.step(0, rank.batch(2, (3,)), False)
    rank.step(0, rank.batch(3, (3,)), False)
    shared.a2a.dispatch_send = send

    def polled() -> None:
        poll()
        raise NotFinite("topk_weights[0, 0] = nan")

    shared.a2a.poll = polled
    buffers.poll()
    return buffers._not_finite, []


def test_values_that_are_not_finite_do_not_end_the_server() -> None:
    assert on_ranks(not_finite_once, 1) == [(2, [])]


def test_limits_are_rounded_up_to_whole_vectors_of_scales() -> None:
    assert on_ranks(odd_limits, 2) == [(8, 16), (8, 16)]


def odd_limits(ctx: Ctx) -> tuple[int, int]:
    rank = Rank(Model(ranks=2, decode_tokens=7, prefill_tokens=15), ctx.rank, CPU)
    assert limits.current().max_tokens_per_rank_decode == 7
    for extend in (False, True):
        rank.step(0, rank.batch(1, (7, 7)), extend)
    (decode,), (prefill,) = buffers._decode.values(), buffers._prefill.values()
    return decode.a2a.config.max_tokens_per_rank, prefill.a2a.config.max_tokens_per_rank
