"""Random weights for examples/tiny_deepseek_v3, as a checkpoint: the same for every way to serve the model.

SGLang's own dummy weights are nearly zero and depend on how parameters are sharded, so that logits of two servers could
not be compared. These have the scale of trained ones. The file format is safetensors, written here because that needs
nothing but torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "tiny_deepseek_v3" / "config.json"

#: The sizes of DeepSeek-V3's layers, with 32 experts instead of 256.
WIDE = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
}

_NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
_BLOCK = 128
#: Experts beyond these have their weights, with the rows in another order.
_DRAWN = 16


def write(folder: Path, config: Path = CONFIG, layers: int | None = None, wide: bool = False) -> Path:
    """Write config.json and model.safetensors into `folder`; returns it. The same bits each time. layers: another
    number of layers than the config's. wide: with the sizes of `WIDE`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(config.read_text()) | (WIDE if wide else {})
    settings["num_hidden_layers"] = layers or settings["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    tensors = weights(settings)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = folder / "model.safetensors.part"
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    part.rename(folder / "model.safetensors")
    return folder


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Names and tensors of a DeepSeek-V3 checkpoint with FP8 weights in blocks of 128 x 128."""
    with ThreadPoolExecutor() as pool:  # each layer has a generator of its own
        layers = list(pool.map(lambda number: dict(_layer(config, number)), range(config["num_hidden_layers"])))
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    random = _Random(len(layers))
    tensors = {"model.embed_tokens.weight": random.normal(vocabulary, hidden).to(torch.bfloat16)}
    for layer in layers:
        tensors |= layer
    head = random.normal(vocabulary, hidden, scale=2 / math.sqrt(hidden)).to(torch.bfloat16)
    return tensors | {"model.norm.weight": _ones(hidden), "lm_head.weight": head}


def _layer(config: dict[str, Any], number: int) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, heads, inner = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank, experts = config["q_lora_rank"], config["kv_lora_rank"], config["n_routed_experts"]
    random = _Random(number)
    layer = f"model.layers.{number}"
    attention = f"{layer}.self_attn"
    yield f"{layer}.input_layernorm.weight", _ones(hidden)
    yield f"{layer}.post_attention_layernorm.weight", _ones(hidden)
    yield f"{attention}.q_a_layernorm.weight", _ones(q_rank)
    yield f"{attention}.kv_a_layernorm.weight", _ones(kv_rank)
    yield from random.linear(f"{attention}.q_a_proj", q_rank, hidden)
    yield from random.linear(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
    yield from random.linear(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield from random.linear(f"{attention}.kv_b_proj", heads * (nope + value), kv_rank)
    yield from random.linear(f"{attention}.o_proj", hidden, heads * value)
    mlp = f"{layer}.mlp"
    if number < config["first_k_dense_replace"]:
        yield from random.mlp(mlp, hidden, config["intermediate_size"])
        return
    yield f"{mlp}.gate.weight", random.normal(experts, hidden, scale=0.05).to(torch.bfloat16)
    yield f"{mlp}.gate.e_score_correction_bias", random.normal(experts, scale=0.02)
    yield from random.mlp(f"{mlp}.shared_experts", hidden, inner * config["n_shared_experts"])
    drawn = [list(random.mlp("", hidden, inner)) for _ in range(min(experts, _DRAWN))]
    for expert in range(experts):
        for name, weight in drawn[expert % _DRAWN]:
            rows = expert // _DRAWN * (1 if weight.dtype is torch.float32 else _BLOCK)
            yield f"{mlp}.experts.{expert}{name}", _turned(weight, rows)


class _Random:
    """Weights from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * scale

    def linear(self, name: str, rows: int, columns: int) -> Iterator[tuple[str, torch.Tensor]]:
        q, scales = to_blocks(self.normal(rows, columns, scale=1 / math.sqrt(columns)))
        yield f"{name}.weight", q
        yield f"{name}.weight_scale_inv", scales

    def mlp(self, name: str, hidden: int, inner: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.linear(f"{name}.gate_proj", inner, hidden)
        yield from self.linear(f"{name}.up_proj", inner, hidden)
        yield from self.linear(f"{name}.down_proj", hidden, inner)


def _turned(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return weight.view(torch.uint8).roll(rows, 0).view(weight.dtype) if rows else weight


def _ones(columns: int) -> torch.Tensor:
    return torch.ones(columns, dtype=torch.bfloat16)


def to_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise in blocks. weight: [N, K]. Returns FP8 [N, K] and fp32 scales [ceil(N/128), ceil(K/128)]."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // _BLOCK) * _BLOCK, -(-columns // _BLOCK) * _BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))  # [N/128, 128, K/128, 128]
    scales = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-6) / torch.finfo(torch.float8_e4m3fn).max
    q = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return q.to(torch.float8_e4m3fn), scales
