"""Config and Options: what is allowed, and what a refusal says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_a2a import Config, ConfigError, Options

GOOD = {"num_experts": 256, "hidden_size": 7168, "top_k": 8, "max_tokens_per_rank": 128}


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 1024, "top_k": 32},
        {"num_experts": 1, "top_k": 1},
        {"hidden_size": 128},
        {"max_tokens_per_rank": 10**9},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"channels": ("a", "b", "c")},
        {"channels": ["a"]},
    ],
    ids=str,
)
def test_the_limits_themselves_are_allowed(change):
    config = Config(**{**GOOD, **change})
    assert isinstance(config.channels, tuple)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts": 0}, ["num_experts=0", "1 to 1024"]),
        ({"num_experts": 1025}, ["num_experts=1025", "1 to 1024"]),
        ({"num_experts": 8.0}, ["num_experts=8.0", "float", "int"]),
        ({"num_experts": True}, ["num_experts=True", "bool", "int"]),
        ({"hidden_size": 100}, ["hidden_size=100", "128 or more"]),
        ({"hidden_size": 7168 + 64}, ["hidden_size=7232", "multiple of 128"]),
        ({"top_k": 0}, ["top_k=0", "1 to 32"]),
        ({"top_k": 33}, ["top_k=33", "1 to 32"]),
        ({"num_experts": 4, "top_k": 5}, ["top_k=5", "num_experts=4"]),
        ({"max_tokens_per_rank": 0}, ["max_tokens_per_rank=0", "1 or more"]),
        ({"max_tokens_per_rank": "128"}, ["max_tokens_per_rank='128'", "int"]),
        ({"dtype": torch.float64}, ["torch.float64", "torch.bfloat16", "torch.float16", "torch.float32"]),
        ({"dtype": "bfloat16"}, ["dtype=bfloat16", "torch.bfloat16"]),
        ({"dtype": torch.float8_e4m3fn}, ["float8_e4m3fn", "torch.bfloat16"]),
        ({"channels": ()}, ["channels=()", "one or more"]),
        ({"channels": "default"}, ["channels='default'", "tuple"]),
        ({"channels": 5}, ["channels=5", "tuple"]),
        ({"channels": ("",)}, ["channels=('',)", "non-empty"]),
        ({"channels": ("a", "b", "a")}, ["channels=('a', 'b', 'a')", "twice"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_size_names_the_field_the_value_and_what_is_allowed(change, words):
    with pytest.raises(ConfigError) as caught:
        Config(**{**GOOD, **change})
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"timeout_s": 0}, ["timeout_s=0", "above 0"]),
        ({"timeout_s": -1.0}, ["timeout_s=-1.0", "above 0"]),
        ({"timeout_s": float("nan")}, ["timeout_s=nan", "finite"]),
        ({"timeout_s": float("inf")}, ["timeout_s=inf", "finite"]),
        ({"timeout_s": "30"}, ["timeout_s='30'"]),
        ({"protocol": ""}, ["protocol=''", "non-empty"]),
        ({"metadata_server": None}, ["metadata_server=None", "non-empty"]),
    ],
    ids=str,
)
def test_a_bad_option_names_the_field_and_the_value(change, words):
    with pytest.raises(ConfigError) as caught:
        Options(**change)
    for word in words:
        assert word in str(caught.value)


def test_experts_are_shared_out_equally_or_refused():
    config = Config(num_experts=12, hidden_size=128, top_k=2, max_tokens_per_rank=1)
    assert [config.local_experts(ranks) for ranks in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    with pytest.raises(ConfigError) as caught:
        config.local_experts(5)
    assert "num_experts=12" in str(caught.value) and "5 ranks" in str(caught.value)
    assert "1, 2, 3, 4, 6" in str(caught.value)


def test_a_config_cannot_be_changed_once_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**GOOD).top_k = 4  # type: ignore[misc]
