"""How many tokens a rank can bring to one dispatch, from SGLang's chunked prefill and batch settings.

Nothing here imports SGLang or torch: the arguments are any object with the fields of SGLang's resolved `ServerArgs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_a2a.errors import MoeA2AError

#: Requests in a decode batch of a rank where neither --max-running-requests nor a CUDA graph says how many.
DEFAULT_RUNNING_REQUESTS = 256

#: Limits are rounded up to this: scales of R * M rows must fill whole vectors.
_STEP = 8


class FlagError(MoeA2AError, ValueError):
    """Server flags with which this package cannot work. Raised at start-up; the message names flag and value."""


@dataclass(frozen=True)
class Limits:
    """Sizes of the communication buffers of a scheduler process.

    max_tokens_per_rank_decode: M of masked steps (DEEPEP_LL).
    max_tokens_per_rank_prefill: M of contiguous steps (DEEPEP_NORMAL).
    channels: one for each micro-batch that may be in flight, "0" and, under two-batch overlap, "1".
    """

    max_tokens_per_rank_decode: int
    max_tokens_per_rank_prefill: int
    channels: tuple[str, ...] = ("0",)


_current: Limits | None = None


def use(limits: Limits) -> None:
    """Set what `current` returns in this process."""
    global _current
    _current = limits


def current() -> Limits:
    """The limits of this process. Raises FlagError if `use` has not been called: then the plug-in is not active."""
    if _current is None:
        raise FlagError(
            "no token limits are set in this process: the plug-in sets them when a scheduler starts; "
            "in a program of your own call moe_a2a.sglang_plugin.limits.use(Limits(...)) first"
        )
    return _current


def attention_data_parallel(args: Any) -> int:
    """Ranks over which the requests of one TP group are spread: its attention data parallelism, 1 without."""
    if args.enable_dp_attention:
        return int(args.dp_size)
    # 0.5.23 has the width under a name of its own, and leaves the older flag False.
    return int(getattr(args, "attn_dp_size", 1))


def running_requests(args: Any) -> int:
    """The most requests that one rank decodes at a time."""
    ranks = attention_data_parallel(args)
    if args.max_running_requests is not None:
        return max(1, int(args.max_running_requests) // ranks)
    return default_running_requests(args)


def default_running_requests(args: Any) -> int:
    """The largest batch of the decode graphs, or DEFAULT_RUNNING_REQUESTS without graphs."""
    graphs = args.cuda_graph_config
    return int((graphs.decode.max_bs if graphs is not None else None) or DEFAULT_RUNNING_REQUESTS)


def tokens_per_request(args: Any, draft_tokens: int | None = None) -> int:
    """Tokens that a decoding request brings to one forward pass: more than one under speculative decoding."""
    if args.speculative_algorithm is None:
        return 1
    given = (args.speculative_num_draft_tokens, args.speculative_eagle_topk, draft_tokens)
    tokens = max(1, *(int(value) for value in given if value))
    # Each layer of a multi-layer draft looks back over the steps before it.
    return tokens + (2 * (args.speculative_num_steps or 0) if args.enable_multi_layer_eagle else 0)


def prefill_tokens(args: Any) -> int:
    """The most tokens of a prefill batch of one attention-DP rank. FlagError without chunked prefill."""
    chunk = args.chunked_prefill_size
    if chunk is None or chunk <= 0:
        raise FlagError(
            f"--chunked-prefill-size {chunk}: without chunks only the length of a prompt limits a prefill batch, and "
            "the buffers of --moe-a2a-backend mooncake need a limit; give a size above 0, such as 8192"
        )
    tokens = int(chunk)
    if args.pp_size > 1 and args.enable_dynamic_chunking:
        tokens = max(-(-tokens * 5 // 4), args.max_prefill_tokens or 0)
    return tokens


def limits_from_server_args(server_args: Any, draft_tokens: int | None = None) -> Limits:
    """Token limits that follow from resolved flags. Raises FlagError.

    draft_tokens: the most that adaptive speculation may use, where that is more than the flag says.
    """
    args = server_args
    # Ranks that share the heads of an attention share its tokens out before these go to experts.
    sharing = max(1, args.tp_size // attention_data_parallel(args))
    decode = running_requests(args) * tokens_per_request(args, draft_tokens)
    # A step in which any rank prefills is a prefill step on all, so its limit holds batches that decode too.
    prefill = max(decode, prefill_tokens(args) + (decode if args.enable_mixed_chunk else 0))
    if args.deepep_mode == "low_latency":
        decode = prefill
    channels = ("0", "1") if args.enable_two_batch_overlap else ("0",)
    return Limits(_up(-(-decode // sharing)), _up(-(-prefill // sharing)), channels)


def _up(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
