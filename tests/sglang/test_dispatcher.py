"""SGLang's dispatcher layer with our dispatcher in it, on CPU ranks: decode, prefill, and both mixed."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import torch
from ranks import Ctx
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang_ranks import on_ranks
from sglang_steps import Batch, Model, Rank, check_sums, make_batch, run_experts

from moe_a2a.sglang_plugin import buffers

CPU = torch.device("cpu")
WORLDS = (2, 4)
#: T by rank of a few steps, cut to the number of ranks: unequal, full, with empty ranks, all empty.
DECODE = ((8, 3, 0, 5), (0, 8, 8, 1), (0, 0, 0, 0), (1, 0, 2, 0))
PREFILL = ((24, 7, 0, 13), (0, 0, 24, 1), (0, 0, 0, 0), (5, 24, 24, 24))


def use_jit_flags(jit: bool, blackwell: bool = False) -> None:
    """What SGLang finds out about the GPU, in which rows are FP8 in prefill steps too."""
    wrapper = deep_gemm_wrapper
    wrapper.ENABLE_JIT_DEEPGEMM = jit
    wrapper.DEEPGEMM_BLACKWELL = wrapper.DEEPGEMM_SCALE_UE8M0 = blackwell


def steps_of_mode(ctx: Ctx, mode: str, dtype: str, blackwell: bool) -> None:
    use_jit_flags(True, blackwell)
    model = Model(ranks=ctx.world)
    rank = Rank(model, ctx.rank, CPU, layers=3, deepep_mode=mode, deepep_dispatcher_output_dtype=dtype)
    expected = None if dtype == "bf16" else "ue8m0" if blackwell else "fp32"
    seed = 0
    for decode, prefill in zip(DECODE, PREFILL, strict=True):
        # A low_latency server's limit holds its prefill batches; here both are within the smaller one.
        for extend, tokens in ((True, decode if mode == "low_latency" else prefill), (False, decode), (False, decode)):
            assert rank.fp8(extend) == expected
            for layer in range(3):
                seed += 1
                rank.step(layer, rank.batch(seed, tokens[: ctx.world]), extend)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("mode", ["auto", "normal", "low_latency"])
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_every_mode_dispatches_and_combines_what_the_oracle_says(world: int, mode: str, dtype: str) -> None:
    on_ranks(steps_of_mode, world, mode, dtype, False)


def test_blackwell_gets_packed_exponents_as_scales() -> None:
    on_ranks(steps_of_mode, 2, "auto", "fp8", True)


def first_dispatch(ctx: Ctx, mode: str) -> tuple[int, int]:
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU, layers=2, deepep_mode=mode)
    for seed, layer in enumerate((0, 0, 1)):
        rank.step(layer, rank.batch(seed, (3, 4)), False)
    return len(buffers._decode), len(buffers._prefill)


@pytest.mark.parametrize("mode, built", [("auto", (1, 1)), ("normal", (0, 1)), ("low_latency", (1, 0))])
def test_the_first_dispatch_builds_all_buffers_that_the_mode_can_need(mode: str, built: tuple[int, int]) -> None:
    assert on_ranks(first_dispatch, 2, mode) == [built, built]


# what decides the form of rows


def forms_of_rows(ctx: Ctx) -> None:
    use_jit_flags(True)
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    dispatcher = rank.layers[0]
    assert rank.fp8(False) == rank.fp8(True) == "fp32"
    dispatcher.set_quant_config({"dispatcher_output_dtype": "bf16"})
    assert rank.fp8(False) is None and rank.fp8(True) is None
    rank.step(0, rank.batch(1, (3, 4)), False)
    rank.step(0, rank.batch(2, (3, 4)), True)
    dispatcher.set_quant_config({"weight_dtype": torch.float8_e4m3fn})
    rank.step(0, rank.batch(3, (3, 4)), False)
    rank.step(0, rank.batch(4, (3, 4)), True)
    assert rank.fp8(False) == rank.fp8(True) == "fp32"
    use_jit_flags(False)
    dispatcher.set_quant_config({})
    assert rank.fp8(False) == "fp32" and rank.fp8(True) is None  # no runner takes FP8 rows of a prefill without it
    rank.step(0, rank.batch(5, (3, 4)), True)


def test_the_layers_quantisation_decides_the_form_of_rows() -> None:
    on_ranks(forms_of_rows, 2)


def by_mode(ctx: Ctx) -> bool:
    use_jit_flags(True)
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    config = {"normal_dispatcher_output_dtype": "bf16", "low_latency_dispatcher_output_dtype": "fp8"}
    rank.layers[0].set_quant_config(config)
    rank.step(0, rank.batch(1, (3, 4)), False)
    rank.step(0, rank.batch(2, (3, 4)), True)
    return rank.fp8(False) == "fp32" and rank.fp8(True) is None


def test_a_layer_can_want_another_form_in_each_mode() -> None:
    from sglang.srt.layers.moe.token_dispatcher.deepep import _DeepEPDispatcherImplNormal

    known = hasattr(_DeepEPDispatcherImplNormal, "dispatch_mode")  # not in 0.5.17
    assert on_ranks(by_mode, 2) == [known, known]


# what a dispatch hands out


def padded_rows(ctx: Ctx) -> None:
    """Rows of a graph's batch that hold no token: they go nowhere, and their sums are zeros."""
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    for extend in (False, True):
        rank.step(0, make_batch(rank.model, 1, (8, 8), padded=1.0), extend)
        rank.step(0, make_batch(rank.model, 2, (8, 8), padded=0.7), extend)


def test_rows_without_experts_go_nowhere_and_give_zeros() -> None:
    on_ranks(padded_rows, 2)


def redundant_experts(ctx: Ctx) -> None:
    """EPLB: ids are physical, and an expert may be on several ranks; how they are spread changes between steps."""
    rank = Rank(Model(experts=24, ranks=ctx.world), ctx.rank, CPU, layers=2, ep_num_redundant_experts=8)
    for seed in range(4):
        rank.step(seed % 2, rank.batch(seed, (8, 5, 0, 3)), seed >= 2)


def test_redundant_experts_are_physical_experts() -> None:
    on_ranks(redundant_experts, 4)


def fused_shared_experts(ctx: Ctx) -> None:
    """SGLang gives a rank without tokens a routing without the shared expert's choice."""
    model = Model(ranks=ctx.world)
    rank = Rank(model, ctx.rank, CPU)
    for extend in (False, True):
        batch = rank.batch(7, (0, 6))
        brought = batch.topk(ctx.rank)
        if ctx.rank == 0:
            brought = brought._replace(
                topk_ids=brought.topk_ids.new_empty((0, model.top_k - 1)),
                topk_weights=brought.topk_weights.new_empty((0, model.top_k - 1)),
            )
        set_is_extend_in_batch(extend)
        dispatcher = rank.layers[0]
        output = dispatcher.dispatch(hidden_states=batch.x[ctx.rank], topk_output=brought)
        out = dispatcher.combine(combine_input=run_experts(model, ctx.rank, output))
        check_sums(model, ctx.rank, batch, out, rank.fp8(extend))


def test_a_rank_without_tokens_may_leave_the_shared_experts_choice_out() -> None:
    on_ranks(fused_shared_experts, 2)


# statistics of experts


class Recorder:
    """In place of SGLang's ExpertDistributionRecorder."""

    def __init__(self, recording: bool) -> None:
        self.recording, self.seen = recording, []

    def on_deepep_dispatch_low_latency(self, local_physical_count_of_layer: torch.Tensor) -> None:
        self.seen.append(local_physical_count_of_layer.tolist())

    def on_deepep_dispatch_normal(
        self,
        local_physical_count_of_layer: list[int],
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_rdma_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor,
    ) -> None:
        assert num_tokens_per_rdma_rank is None
        per_rank, per_expert = num_tokens_per_rank.cpu().tolist(), num_tokens_per_expert.cpu().tolist()
        self.seen.append((local_physical_count_of_layer, per_rank, per_expert))


def statistics(ctx: Ctx) -> None:
    from sglang.srt.eplb.expert_distribution import set_global_expert_distribution_recorder

    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    here = rank.model.experts // ctx.world
    batch = rank.batch(3, (8, 5, 0, 7))
    for recording in (True, False):
        recorder = Recorder(recording)
        set_global_expert_distribution_recorder(recorder)
        low = rank.step(0, batch, False)
        normal = rank.step(0, batch, True)
        assert recorder.seen[0] == low.masked_m.tolist()
        if not recording:
            assert len(recorder.seen) == 1
            continue
        local, per_rank, per_expert = recorder.seen[1]
        assert local == normal.num_recv_tokens_per_expert
        ids = batch.ids[ctx.rank]
        assert per_expert == [int((ids == e).sum()) for e in range(rank.model.experts)]
        spread = [((ids >= r * here) & (ids < (r + 1) * here)).any(dim=1) for r in range(ctx.world)]
        assert per_rank == [int(s.sum()) for s in spread]


def test_the_expert_recorder_hears_of_every_dispatch_that_it_records() -> None:
    on_ranks(statistics, 4)


# a batch in halves


def halves(ctx: Ctx) -> None:
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    dispatcher = rank.layers[0]
    for extend in (False, True, False):
        batch: Batch = rank.batch(5, (8, 2))
        set_is_extend_in_batch(extend)
        dispatcher.dispatch_a(hidden_states=batch.x[ctx.rank], topk_output=batch.topk(ctx.rank))
        set_is_extend_in_batch(not extend)  # the mode is that of the batch's start
        output = dispatcher.dispatch_b()
        dispatcher.combine_a(combine_input=run_experts(rank.model, ctx.rank, output))
        check_sums(rank.model, ctx.rank, batch, dispatcher.combine_b(), rank.fp8(extend))


def test_halves_give_what_the_whole_calls_give() -> None:
    on_ranks(halves, 2)


def shared_experts_hook(ctx: Ctx) -> None:
    """Single-batch overlap: shared experts run between the halves of a dispatch, then the hook removes itself."""
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU)
    dispatcher, stages = rank.layers[0], []

    def hook(inner: Any) -> None:
        stages.append(inner._step.stage)
        for handle in handles:
            handle.remove()

    for extend in (False, True):
        handles = dispatcher.register_deepep_dispatch_hook(hook)
        # Overlap with the down GEMM, by its signals: combine then follows the GEMM.
        post = dispatcher.register_post_dispatch_hook(
            lambda d, output: d.set_overlap_args(combine_overlap_args=OVERLAP, meta_overlap_args={})
        )
        done = dispatcher.register_post_combine_hook(lambda d, hidden_states: d.clear_overlap_args())
        rank.step(0, rank.batch(6, (8, 2)), extend)
        post.remove()
        done.remove()
        rank.step(0, rank.batch(7, (8, 2)), extend)
        assert dispatcher._inners[0].overlap_args is None
    assert stages == ["dispatch_a", "dispatch_a"]


class OVERLAP:
    """SGLang's CombineOverlapArgs with `overlap`."""

    overlap, stream, wait_event = True, None, None


def test_single_batch_overlaps_hook_runs_between_the_halves() -> None:
    on_ranks(shared_experts_hook, 2)
