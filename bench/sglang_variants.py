"""The servers that bench/sglang_server.py compares: their flags and environments."""

from __future__ import annotations

import os

#: Flags of all servers.
COMMON = """--skip-tokenizer-init --skip-server-warmup --tp-size 2 --dp-size 2 --enable-dp-attention
    --moe-dense-tp-size 1 --enable-dp-lm-head --attention-backend triton --sampling-backend pytorch
    --grammar-backend none --disable-custom-all-reduce --disable-radix-cache --mem-fraction-static 0.3
    --max-total-tokens 262144 --cuda-graph-max-bs-decode 32 --max-running-requests 64"""
_MOONCAKE = ["--moe-a2a-backend", "mooncake"]
#: Flags of each variant. Chunks are of both ranks together.
VARIANTS = {
    "moe-a2a": [*_MOONCAKE, "--deepep-mode", "auto", "--chunked-prefill-size", "8192"],
    "moe-a2a-tbo": [
        *[*_MOONCAKE, "--deepep-mode", "auto", "--chunked-prefill-size", "8192"],
        "--enable-two-batch-overlap",
    ],
    "moe-a2a-ll": [*_MOONCAKE, "--deepep-mode", "low_latency", "--chunked-prefill-size", "256"],
    "oracle": [*_MOONCAKE, "--deepep-mode", "auto", "--chunked-prefill-size", "8192"],
    "upstream": [
        *[*_MOONCAKE, "--deepep-mode", "low_latency", "--chunked-prefill-size", "256"],
        *["--elastic-ep-backend", "none"],
    ],
    "none": ["--moe-a2a-backend", "none", "--chunked-prefill-size", "8192"],
}
_EXACT = "-exact"
for _variant in ("moe-a2a", "oracle"):
    VARIANTS[_variant + _EXACT] = [*VARIANTS[_variant], "--enable-deterministic-inference"]


def flags(variant: str, model: str) -> list[str]:
    return ["--model-path", model, *COMMON.split(), *VARIANTS[variant]]


def reference_of(variant: str) -> str:
    """The variant whose answers this one is compared with."""
    return "oracle" + (_EXACT if is_exact(variant) else "")


def is_exact(variant: str) -> bool:
    """Whether rows do not depend on their batch. Such servers are slow, and only compared."""
    return variant.endswith(_EXACT)


def plugin_of(variant: str) -> str:
    """The plug-in that a variant runs with, as `Server.says` knows it."""
    return next((plugin for plugin in ("moe-a2a", "oracle") if variant.startswith(plugin)), variant)


def environment(variant: str, paths: list[str]) -> dict[str, str]:
    plugin = plugin_of(variant)
    env = {
        "PYTHONPATH": ":".join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
        "MOONCAKE_PROTOCOL": "tcp",
        "SGLANG_PLUGINS": "moe-a2a-oracle" if plugin == "oracle" else "moe-a2a",
        "MOE_A2A_SGLANG": "0" if plugin == "upstream" else "1",
    }
    if plugin in ("oracle", "upstream"):
        env["SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = "128"
    return env
