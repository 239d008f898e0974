"""The oracle of bench/sglang_server.py, by the same checks as our dispatcher, and against it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import servers
import sglang_oracle
import torch
import torch.distributed as dist
from ranks import Ctx
from servers import MOONCAKE, in_child, resolve
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_ranks import on_ranks
from sglang_steps import Model, Rank, check_dispatch, check_sums, run_experts


def steps(ctx: Ctx) -> None:
    deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    model = Model(ranks=ctx.world)
    sglang_oracle.DECODE_TOKENS = model.decode_tokens
    ours = Rank(model, ctx.rank, torch.device("cpu"))
    oracle = sglang_oracle.dispatcher_class()(
        group=dist.group.WORLD,
        router_topk=model.top_k,
        num_experts=model.experts,
        num_local_experts=model.experts // ctx.world,
        hidden_size=model.hidden,
        deepep_mode=ours.layers[0]._inners[0].deepep_mode,
    )
    for seed, (extend, tokens) in enumerate(
        [(False, (8, 3)), (True, (24, 7)), (False, (0, 5)), (True, (0, 0)), (True, (0, 9))]
    ):
        batch = ours.batch(seed, tokens)
        got = ours.layers[0]
        outs = []
        for dispatcher in (got, oracle):
            set_is_extend_in_batch(extend)
            output = dispatcher.dispatch(hidden_states=batch.x[ctx.rank], topk_output=batch.topk(ctx.rank))
            check_dispatch(model, ctx.rank, batch, output, "fp32")
            outs.append(dispatcher.combine(combine_input=run_experts(model, ctx.rank, output)))
            check_sums(model, ctx.rank, batch, outs[-1], "fp32")
        # CPU ranks round bf16 ties away from zero; GPU ranks and the oracle to even.
        torch.testing.assert_close(outs[0], outs[1], rtol=2.0**-7, atol=0.0)


def test_the_oracle_says_what_our_dispatcher_says() -> None:
    on_ranks(steps, 2)


def test_the_oracle_takes_upstreams_place_in_a_scheduler() -> None:
    def child() -> str:
        sglang_oracle.register()
        HookRegistry.apply_hooks()
        import sglang.srt.batch_overlap.two_batch_overlap as two_batch_overlap

        resolve(*MOONCAKE)  # upstream refuses no mode before a dispatcher is built
        return two_batch_overlap.MooncakeEPDispatcher.__name__

    assert in_child(child) == "OracleDispatcher"


def test_the_benchmarks_flags_are_known_to_this_release() -> None:
    import sglang_server

    for variant, flags in sglang_server.VARIANTS.items():
        args: Any = in_child(_chunk, *sglang_server._FLAGS.split(), *flags)
        assert args == (4096 if "8192" in flags else 128), variant


def _chunk(*flags: str) -> int:
    from moe_a2a.sglang_plugin import adapter

    return int(adapter.view(resolve(*flags)).chunked_prefill_size)


def test_the_benchmarks_servers_fit_the_plugins_checks() -> None:
    import sglang_server

    def child(flags: list[str]) -> Any:
        servers.load_plugins()
        from moe_a2a.sglang_plugin import adapter, limits

        return limits.limits_from_server_args(adapter.view(resolve(*sglang_server._FLAGS.split(), *flags)))

    for variant, wanted in {"moe-a2a": (32, 4096), "moe-a2a-ll": (128, 128), "moe-a2a-tbo": (32, 4096)}.items():
        got = in_child(child, sglang_server.VARIANTS[variant])
        assert (got.max_tokens_per_rank_decode, got.max_tokens_per_rank_prefill) == wanted
