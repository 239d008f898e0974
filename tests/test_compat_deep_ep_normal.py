"""DeepEP's normal mode on CPU ranks, against a reference in plain loops."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_ep_normal_steps import (
    Program,
    all_forms,
    dropped,
    expected,
    handles,
    refused,
    same,
    sizes,
    training,
    two_batches,
    wander,
    worst,
)
from ranks import Ctx, run_ranks
from test_docs import run_program

from moe_a2a import ConfigError, HandleError, InputError
from moe_a2a.compat.deep_ep import Buffer, Config
from moe_a2a.compat.normal_config import TOKENS, tokens_in
from moe_a2a.compat.normal_tables import dispatch_layout, ids_for
from moe_a2a.fp8 import pack_ue8m0, unpack_ue8m0
from moe_a2a.gpu.layout import Layout

EXAMPLE = Path(__file__).parents[1] / "examples" / "deep_ep_prefill.py"


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_form_and_every_way_to_wait_matches_the_reference(ranks: int) -> None:
    run_ranks(all_forms, ranks)


def test_two_batches_take_turns_in_one_buffer() -> None:
    run_ranks(two_batches, 2)


def test_steps_that_are_not_combined_make_room_for_later_ones() -> None:
    run_ranks(dropped, 2)


def test_handles_may_be_used_again_and_again() -> None:
    run_ranks(handles, 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_calls_come_in_any_order(ranks: int) -> None:
    run_ranks(wander, ranks)


def test_a_number_of_rows_may_be_named_in_place_of_counts() -> None:
    run_ranks(worst, 2)


def test_sizes_follow_from_bytes_and_may_be_several() -> None:
    run_ranks(sizes, 2)


def test_layers_are_trained_through_handles() -> None:
    run_ranks(training, 2)


def run_example(ctx: Ctx, source: str) -> None:
    """Run the example as torchrun would have started it."""
    run_program(ctx, source, "deep_ep_prefill.py")


def test_a_program_for_deep_ep_runs_by_changing_its_import() -> None:
    source = EXAMPLE.read_text()
    ours = "from moe_a2a.compat.deep_ep import Buffer\n"
    assert source.count("moe_a2a") == source.count(ours) == 1
    run_ranks(run_example, 2, source)


def test_one_rank_is_enough() -> None:
    run_ranks(_alone, 1)


def _alone(ctx: Ctx) -> None:
    program = Program(ctx, experts=4, hidden=128, top_k=3, most=5)
    program.step(0, [5], "fp8")
    program.buffer.destroy()


# -------------------------------------------------------------------------------------------------------- several hosts


def _hosts(ctx: Ctx) -> None:
    from moe_a2a import Options

    program = Program(ctx, options=Options(timeout_s=ctx.timeout_s, host=f"host-{ctx.rank // 2}"))
    for number, form in enumerate(("bf16", "fp8")):
        inputs = program.inputs(number, [5, 0, 20, 3], form)
        got = program.dispatch(inputs)
        want = expected(inputs, ctx.rank, program.experts, 10)
        got.rows(got.recv, want.scales)
        assert same(got.ids, want.ids) and same(got.weights, want.weights) and got.counts == want.counts
        here = [2 * (ctx.rank // 2), 2 * (ctx.rank // 2) + 1]
        there = [rank for rank in range(4) if rank not in here]
        prefix = got.handle[0]
        assert torch.equal(prefix[:, here], want.rank_prefix[:, here])
        assert (prefix[:, there] == -1).all()
        got.combine(number, columns=3)
        got.again()
        got.combine(number)
    program.buffer.destroy()


def test_cpu_ranks_may_be_on_several_hosts() -> None:
    pytest.importorskip("mooncake.engine", reason="needs the Transfer Engine")
    run_ranks(_hosts, 4)


# ------------------------------------------------------------------------------------------------------------ bad input


def _bad_input(ctx: Ctx) -> None:
    program = Program(ctx)
    buffer, mine = program.buffer, program.inputs(0, [6, 2])[ctx.rank]
    x, ids, weights = mine.x, mine.ids, mine.weights
    per_rank, _, per_expert, hit, _ = buffer.get_dispatch_layout(ids, 8)

    def dispatch(x: Any = x, **changed: Any) -> str:
        given = {
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": hit,
            "num_tokens_per_expert": per_expert,
            "topk_idx": ids,
            "topk_weights": weights,
            **changed,
        }
        return refused(changed.pop("error", InputError), lambda: buffer.dispatch(x, **given))

    program.step(0, [6, 2])
    assert "x is torch.float32" in dispatch(x.float())
    assert "x is not a tensor with two dimensions" in dispatch(x[0] if len(x) else x.flatten())
    fp8 = x.to(torch.float8_e4m3fn)
    assert "x is torch.float8_e4m3fn" in dispatch(fp8)
    assert "x is a tuple of 3" in dispatch((fp8, fp8, fp8))
    assert "give scales" in dispatch((fp8, torch.ones(len(x), 3)))
    assert "x[1] has dtype torch.float64" in dispatch((fp8, torch.ones(len(x), 2, dtype=torch.float64)))
    assert "topk_idx is torch.int32" in dispatch(topk_idx=ids.int())
    assert "both needed" in dispatch(topk_weights=None)
    assert "by is_token_in_rank alone is not served" in dispatch(topk_idx=None, topk_weights=None)
    assert "topk_weights is torch.float64" in dispatch(topk_weights=weights.double())
    assert "is_token_in_rank is torch.bool" in dispatch(is_token_in_rank=hit[:, :1])
    assert "is_token_in_rank is a NoneType" in dispatch(is_token_in_rank=None)
    assert "num_tokens_per_rank is a NoneType" in dispatch(num_tokens_per_rank=None)
    assert "num_tokens_per_expert is missing" in dispatch(num_tokens_per_expert=None)
    assert "num_tokens_per_expert is torch.int64" in dispatch(num_tokens_per_expert=per_expert.long())
    assert "topk_idx" in dispatch(torch.zeros(len(x) + 1, 256, dtype=torch.bfloat16))
    assert "give at least 1 and 0" in dispatch(expert_alignment=0)
    assert "allowed are 0 to 7, and -1" in dispatch(topk_idx=torch.full_like(ids, 8))
    assert "num_sms=0" in dispatch(config=Config(0))
    assert "num_sms=7" in dispatch(config=Config(7))
    assert "goes with previous_event= and async_finish=True" in dispatch(allocate_on_comm_stream=True)
    assert "does not divide by 2 ranks" in refused(InputError, lambda: buffer.get_dispatch_layout(ids, 7))
    for call in (buffer.internode_dispatch, buffer.internode_combine):
        assert "is not served" in refused(InputError, lambda call=call: call(x))  # type: ignore[misc]

    got = program.dispatch(program.inputs(1, [6, 2]))
    y = program.outputs(1, got.all)[ctx.rank]
    again = {"handle": got.handle}
    assert "leave topk_idx and topk_weights out" in dispatch(**again)
    assert "the handle's dispatch had" in refused(
        InputError, lambda: buffer.dispatch(torch.zeros(20, 256, dtype=torch.bfloat16), got.handle)
    )

    def combine(y: Any = y, error: type[Exception] = InputError, handle: Any = got.handle, **given: Any) -> str:
        return refused(error, lambda: buffer.combine(y, handle, **given))

    n = len(y)
    assert "x is torch.float32" in combine(y.float())
    assert "x is torch.bfloat16" in combine(torch.zeros(n + 1, 256, dtype=torch.bfloat16))
    assert "bias is torch.float32" in combine(bias=torch.zeros(len(got.all[ctx.rank].x), 256))
    assert "topk_weights is torch.float64" in combine(topk_weights=torch.zeros(n, 3, dtype=torch.float64))
    assert "has 129 columns" in combine(topk_weights=torch.zeros(n, 129))
    assert "not the tuple of six" in combine(error=HandleError, handle=None)
    assert "is_token_in_rank is" in combine(handle=(*got.handle[:4], hit.int(), got.handle[5]))
    got.combine(1)
    program.step(2, [6, 2])
    buffer.destroy()


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_ranks(_bad_input, 2)


def _too_few_rows(ctx: Ctx) -> None:
    program = Program(ctx)
    got = program.dispatch(program.inputs(0, [9, 9]))
    most = len(got.ids) - 1
    got.combine(0)
    text = refused(InputError, lambda: program.dispatch(got.all, num_worst_tokens=most))
    assert f"num_worst_tokens={most}, but more tokens came" in text


def test_more_rows_than_were_named_are_an_error() -> None:
    run_ranks(_too_few_rows, 2)


# --------------------------------------------------------------------------------------------- what needs no other rank


def test_a_config_asks_for_the_memory_that_its_tokens_take() -> None:
    config = Buffer.get_dispatch_config(8)
    assert config == Buffer.get_combine_config(8) == Config(Buffer.num_sms, 6, 256, 6, 256)
    hint = config.get_nvl_buffer_size_hint(2 * 7168, 8)
    real = Layout(8, 256, 7168, 8, TOKENS, 2).region_bytes
    assert hint % (2 << 20) == 0 and real <= hint < 1.02 * real + (2 << 20)
    assert config.get_rdma_buffer_size_hint(2 * 7168, 8) == 0
    for shape in ((7168, 256, 8), (2048, 64, 6)):
        held = tokens_in(config.get_nvl_buffer_size_hint(2 * shape[0], 8), shape, 8, False)
        assert TOKENS <= held < 1.1 * TOKENS
    assert tokens_in(real, (7168, 256, 8), 8, False) == TOKENS
    assert tokens_in(real - 1, (7168, 256, 8), 8, False) == TOKENS - 1
    assert tokens_in(0, (7168, 256, 8), 8, False) == 0
    for wrong in ((-2,), (20, 0), (20, 8, 8), (20, 6, 256, 9, 4)):
        with pytest.raises(ConfigError):
            Config(*wrong)
    with pytest.raises(ConfigError, match="144 ranks in one domain"):
        config.get_nvl_buffer_size_hint(2 * 7168, 144)


def test_set_num_sms_sets_what_configs_say() -> None:
    before = Buffer.num_sms
    Buffer.set_num_sms(12)
    assert Buffer.get_dispatch_config(3).num_sms == Buffer.get_combine_config(3).num_sms == 12
    Buffer.set_num_sms(before)


def test_a_layout_counts_what_is_an_expert() -> None:
    ids = torch.tensor([[0, 3, -1], [5, 4, 99], [-1, -1, -7], [2, 3, 4]])
    per_rank, per_expert, hit = dispatch_layout(ids, 3, 6)
    assert per_rank.tolist() == [1, 2, 2] and per_expert.tolist() == [1, 0, 1, 2, 2, 1]
    assert hit.int().tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert per_rank.dtype == per_expert.dtype == torch.int32 and hit.dtype == torch.bool and hit.is_contiguous()
    empty = dispatch_layout(ids[:0], 3, 6)
    assert empty[0].tolist() == [0] * 3 and empty[1].tolist() == [0] * 6 and empty[2].shape == (0, 3)


@pytest.mark.parametrize("top_k", [2, 3, 6])
def test_ids_can_be_made_from_ranks(top_k: int) -> None:
    hit = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    ids = ids_for(hit, 2, top_k)
    assert ids.shape == (4, top_k) and torch.equal(dispatch_layout(ids, 3, 6)[2], hit)


def test_packed_scales_are_unpacked() -> None:
    scales = torch.tensor([[1.0, 2.0, 0.25, 8.0, 0.5], [4.0, 1.0, 1.0, 16.0, 2.0]])
    words = pack_ue8m0(scales)
    assert torch.equal(unpack_ue8m0(words, 5), scales)
    assert torch.equal(unpack_ue8m0(words.t().contiguous().t(), 5), scales)


def test_the_parameters_are_those_of_deep_ep_1_2_1() -> None:
    """Names, order and defaults, so that positional calls mean the same."""
    signatures = {
        "get_dispatch_layout": "topk_idx num_experts previous_event=None async_finish=False "
        "allocate_on_comm_stream=False",
        "dispatch": "x handle=None num_tokens_per_rank=None num_tokens_per_rdma_rank=None is_token_in_rank=None "
        "num_tokens_per_expert=None topk_idx=None topk_weights=None expert_alignment=1 num_worst_tokens=0 config=None "
        "previous_event=None async_finish=False allocate_on_comm_stream=False",
        "combine": "x handle topk_weights=None bias=None config=None previous_event=None async_finish=False "
        "allocate_on_comm_stream=False",
        "get_dispatch_config": "num_ranks",
        "get_combine_config": "num_ranks",
    }
    for name, text in signatures.items():
        found = [
            p.name if p.default is p.empty else f"{p.name}={p.default}"
            for p in inspect.signature(getattr(Buffer, name)).parameters.values()
            if p.name != "self"
        ]
        assert " ".join(found) == text, name
