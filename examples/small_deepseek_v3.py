"""A small model of the DeepSeek-V3 architecture with random weights, and greedy decoding that keeps the logits.

The model is transformers' own ``DeepseekV3ForCausalLM``: latent attention (MLA), a sigmoid router with group-limited
top-k, one shared expert. Tokens are bytes, so that nothing has to be downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

HIDDEN = 512
EXPERTS = 64
TOP_K = 8


def build(seed: int, layers: int) -> DeepseekV3ForCausalLM:
    """One dense layer and `layers` - 1 MoE layers, fp32, the same weights wherever it is built."""
    config = DeepseekV3Config(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=TOP_K,
        n_group=8,
        topk_group=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    fill_with_random_weights(model, seed)
    return model


@torch.no_grad()
def fill_with_random_weights(model: nn.Module, seed: int) -> None:
    """Normal with variance 1 / fan-in: activations keep their size from layer to layer, so that no part of the model is
    drowned by another and greedy decoding does not settle on one token. Norms keep their weight of 1.

    Every tensor has a generator of its own, seeded with its name: the weights do not depend on the order in which this
    or another release of transformers creates them.
    """
    router_biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    for name, tensor in [*model.named_parameters(), *router_biases.items()]:
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")
        )
        if name in router_biases:
            tensor.normal_(std=0.05, generator=generator)
        elif "embed_tokens" in name:
            tensor.normal_(generator=generator)
        elif tensor.dim() >= 2:
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)


def prompts(count: int) -> list[bytes]:
    """One passage a rank, of different lengths; a token is a byte."""
    text = (Path(__file__).parent / "passages.txt").read_bytes()
    passages = [paragraph.split(b"\n-- ")[0] for paragraph in text.split(b"\n\n")]
    return [passages[i % len(passages)] for i in range(count)]


@torch.no_grad()
def decode_greedily(
    model: nn.Module, prompt: bytes, new_tokens: int, begin_decode: Callable[[], None], progress: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Prefill `prompt`, then take the likeliest token `new_tokens` times.

    begin_decode is called between the two, progress after every forward pass (`new_tokens` of them).
    Returns the new tokens, int64 [new_tokens], and every position's logits, fp32 [len(prompt) + new_tokens - 1, 256].
    """
    out = model(torch.tensor([list(prompt)]), use_cache=True)
    progress()
    begin_decode()
    logits = [out.logits[0]]
    tokens = [int(logits[-1][-1].argmax())]
    while len(tokens) < new_tokens:
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        progress()
        logits.append(out.logits[0])
        tokens.append(int(logits[-1][-1].argmax()))
    return np.array(tokens), torch.cat(logits).numpy()
