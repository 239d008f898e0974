"""Two-batch overlap: two micro-batches in flight through SGLang's dispatcher, in the order of its own strategies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import sglang_env
import torch
from ranks import Ctx
from sglang.srt.batch_overlap import operations_strategy
from sglang.srt.layers import deep_gemm_wrapper
from sglang_ranks import on_ranks
from sglang_steps import Model, Rank, check_overlapped, interleaved, overlapped

from moe_a2a import ConfigError
from moe_a2a.sglang_plugin import buffers, limits

CPU = torch.device("cpu")
#: T by rank of each micro-batch.
BATCHES = (((8, 3, 0, 5), (0, 8, 2, 1)), ((0, 0, 0, 0), (4, 0, 8, 8)), ((8, 8, 8, 8), (8, 8, 8, 8)))


def pretend_gpu() -> None:
    """What SGLang's prefill strategy asks for, to share out a GPU."""
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    operations_strategy.DeepEPConfig = SimpleNamespace(get_instance=lambda: SimpleNamespace(num_sms=24))


def micro_batches(ctx: Ctx, mode: str) -> None:
    pretend_gpu()
    deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    layers = 3
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU, layers, enable_two_batch_overlap=True, deepep_mode=mode)
    assert [len(layer._inners) for layer in rank.layers] == [2] * layers
    seed = 0
    for extend in (True, False, False, True):
        for tokens in BATCHES:
            batches = [[rank.batch(seed := seed + 1, t[: ctx.world]) for _ in range(layers)] for t in tokens]
            check_overlapped(rank, overlapped(rank, batches, extend), extend)
        # A batch that cannot be split goes through the first micro-batch's dispatcher, whole.
        for layer in range(layers):
            rank.step(layer, rank.batch(seed := seed + 1, BATCHES[0][0][: ctx.world]), extend)
    used = {
        name for kept in (buffers._decode, buffers._prefill) for s in kept.values() for name in s.a2a.config.channels
    }
    assert {name.rsplit(".", 1)[1] for name in used} == {"0", "1"}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mode", ["auto", "low_latency", "normal"])
def test_two_micro_batches_do_not_disturb_each_other(world: int, mode: str) -> None:
    on_ranks(micro_batches, world, mode)


def test_the_order_is_that_of_sglang() -> None:
    """Of its executor, which needs whole forward batches."""
    from sglang.srt.batch_overlap import operations

    seen: list[tuple[int, int]] = []

    class Executor:
        num_stages = 5

        def __init__(self, name: str, *args: object, **kwargs: object) -> None:
            self.which, self.stage, self.done, self.output = "ab".index(name), 0, False, None

        def next(self) -> None:
            seen.append((self.which, self.stage))
            self.stage += 1
            self.done = self.stage == self.num_stages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "_StageExecutor", Executor)
        if hasattr(operations, "_resolve_tbo_child_contexts"):
            patch.setattr(operations, "_resolve_tbo_child_contexts", lambda: (None, None))
        for delta in (0, 2):
            seen.clear()
            operations.execute_overlapped_operations([{}, {}], [[print], [print]], [0, delta])
            assert seen == list(interleaved(5, delta))


def too_few_channels(ctx: Ctx) -> None:
    rank = Rank(Model(ranks=ctx.world), ctx.rank, CPU, enable_two_batch_overlap=True)
    limits.use(limits.Limits(8, 24))
    with pytest.raises(ConfigError, match="--enable-two-batch-overlap keeps two micro-batches in flight"):
        sglang_env.make_dispatcher(None, 16, 256, 4, ctx.world)
    assert rank.layers


def test_two_batch_overlap_without_a_channel_for_each_micro_batch_is_refused() -> None:
    on_ranks(too_few_channels, 2)
