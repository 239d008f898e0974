"""The arithmetic of weights, against sizes that the models' makers publish."""

from __future__ import annotations

import pytest

from moe_a2a.recipes import memory, models
from moe_a2a.recipes.models import Model

#: Parameters in billions, as published (without DeepSeek's multi-token-prediction layer; Qwen2.5-VL-7B counts 8.29).
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "amd/Llama-3.1-405B-Instruct-FP8-KV": 405.9,
    "amd/Llama-3.3-70B-Instruct-FP8-KV": 70.6,
    "Qwen/Qwen3-32B": 32.8,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.7,
    "deepseek-ai/DeepSeek-V3": 671,
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": 7.62,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    assert memory.parameters(models.load(name)) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.003)


def test_every_known_model_is_one_of_these_or_like_one() -> None:
    for name in models.known():
        assert memory.parameters(models.load(name)) in {memory.parameters(models.load(other)) for other in PUBLISHED}


def test_what_is_quantised_takes_a_byte_or_half_of_one() -> None:
    deepseek = memory.weights(models.load("deepseek-ai/DeepSeek-V3"))
    assert deepseek.experts == 58 * 256 * 3 * 7168 * 2048  # FP8
    assert deepseek.embeddings == 2 * 2 * 129280 * 7168  # bf16
    four_bits = models.load("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4")
    matrices = memory.weights(four_bits, bytes_each=1.0).layers
    assert memory.weights(four_bits).layers == pytest.approx(matrices * (0.5 + 2.5 / 128))


def test_with_expert_parallelism_everything_but_experts_is_on_every_gpu() -> None:
    model = models.load("deepseek-ai/DeepSeek-V3")
    whole = memory.weights(model)
    rest = whole.total - whole.experts
    assert memory.share(model, 8, 139, expert_parallel=True).weights == pytest.approx(rest + whole.experts / 8)
    with_redundant = memory.share(model, 8, 139, expert_parallel=True, redundant=40).weights
    assert with_redundant == pytest.approx(rest + whole.experts * 296 / 256 / 8)
    assert memory.share(model, 8, 139).weights == pytest.approx(whole.total / 8)


def test_key_value_heads_may_be_copied() -> None:
    memory.check_parts(models.load("meta-llama/Llama-3.1-8B-Instruct"), 16)


def test_a_tied_vocabulary_is_counted_once() -> None:
    config = {**models.load("meta-llama/Llama-3.1-8B-Instruct").config, "tie_word_embeddings": True}
    assert memory.weights(Model("m", config)).embeddings == 2 * 128256 * 4096
