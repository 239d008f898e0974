"""The process's `AllToAll` objects: all layers of a model share them, since layers run one after the other.

An object has one token limit, and a decode step's limit is far below a prefill step's: so there is one object for
masked steps (decode) and one for contiguous steps (prefill). They are built with all ranks at the first dispatch, when
weights are loaded and before a CUDA graph is captured.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from moe_a2a.all_to_all import AllToAll
from moe_a2a.bootstrap import GroupBootstrap
from moe_a2a.config import Config, Options
from moe_a2a.errors import HandleError, NotFinite
from moe_a2a.sglang_plugin import limits

logger = logging.getLogger(__name__)

#: How long a rank waits for another. Longer than upstream's 10 s: runners compile a kernel now and then, and not all
#: ranks do so at the same time.
TIMEOUT_S = 30.0

#: How long for the first dispatch, before which ranks compile or load this and that.
MEETING_S = 600.0

_ROWS = 4  # R * M is a multiple: scales are stored by column, and a column is whole vectors of 16 bytes


@dataclass(frozen=True)
class Sizes:
    """What the layers of a model have in common. num_experts: of all ranks, redundant and fused shared ones included.
    top_k: choices of a token, a fused shared expert's included."""

    num_experts: int
    hidden_size: int
    top_k: int


@dataclass
class Shared:
    """One object and the storage of its masked rows, by channel and dtype."""

    a2a: AllToAll
    rows: dict[tuple[str, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def channel(self, index: int) -> str:
        """The channel of the `index`-th micro-batch."""
        return self.a2a.config.channels[index]

    def masked_rows(self, channel: str, dtype: torch.dtype) -> torch.Tensor:
        """Storage for the rows of a channel's masked steps, [E_l, R*M, H]: a new view of the same memory each time.

        One for all layers, eager steps and graphs: a layer's rows are read before the next layer's dispatch, and memory
        does not grow with the number of layers or graphs. New views, because runners empty a tensor that they have
        used (set_)."""
        found = self.rows.get((channel, dtype))
        if found is None:
            config, ranks = self.a2a.config, self.a2a.world_size
            shape = (self.a2a.local_experts, ranks * config.max_tokens_per_rank, config.hidden_size)
            found = self.rows[channel, dtype] = torch.empty(shape, dtype=dtype, device=self.a2a.device)
        return found.view(found.shape)


_decode: dict[Sizes, Shared] = {}
_prefill: dict[Sizes, Shared] = {}


def for_decode(group: dist.ProcessGroup, sizes: Sizes, device: torch.device) -> Shared:
    """The object for masked steps. Collective at the first call for these sizes. Raises ConfigError, RankLost."""
    return _decode.get(sizes) or _build(_decode, "decode", group, sizes, device)


def for_prefill(group: dist.ProcessGroup, sizes: Sizes, device: torch.device) -> Shared:
    """The object for contiguous steps. Collective at the first call for these sizes. Raises ConfigError, RankLost."""
    return _prefill.get(sizes) or _build(_prefill, "prefill", group, sizes, device)


def poll() -> None:
    """Raise RankLost or another error that is known by now and that no dispatch has raised: replayed graphs make no
    calls. To be called after each forward pass. Waits for nothing."""
    for shared in (*_decode.values(), *_prefill.values()):
        try:
            shared.a2a.poll()
        except NotFinite as error:
            note_not_finite(error)


def close_all() -> None:
    """Close every object. Not collective."""
    for kept in (_decode, _prefill):
        for shared in kept.values():
            shared.a2a.close()
        kept.clear()


_not_finite = 0


def note_not_finite(error: NotFinite) -> None:
    """Say that a model has made a NaN or infinity: the 1st, 2nd, 4th, ... time. It went through as it was, as it does
    without this package, and does not end the server."""
    global _not_finite
    _not_finite += 1
    if _not_finite & (_not_finite - 1) == 0:
        logger.error("moe-a2a: the model made values that are not finite (%d times so far): %s", _not_finite, error)


def _build(
    kept: dict[Sizes, Shared], phase: str, group: dist.ProcessGroup, sizes: Sizes, device: torch.device
) -> Shared:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise HandleError(
            f"the first {phase} dispatch builds its buffers with all ranks and cannot be captured in a CUDA graph: "
            "run one eager forward pass of this kind before the capture"
        )
    given, ranks = limits.current(), dist.get_world_size(group)
    tokens = given.max_tokens_per_rank_decode if phase == "decode" else given.max_tokens_per_rank_prefill
    tokens += -tokens % (_ROWS // math.gcd(_ROWS, ranks))
    prefix = f"sglang.{phase}.{sizes.num_experts}.{sizes.hidden_size}.{sizes.top_k}"
    config = Config(
        sizes.num_experts,
        sizes.hidden_size,
        sizes.top_k,
        tokens,
        channels=tuple(f"{prefix}.{name}" for name in given.channels),
    )
    # SGLang's forward passes run in inference mode. What is made in it cannot be changed outside of it, as `poll` does.
    with torch.inference_mode(False):
        GroupBootstrap(group).all_gather(None, MEETING_S)
        begin = time.monotonic()
        a2a = AllToAll(config, group, device=device, options=Options(timeout_s=TIMEOUT_S))
    if a2a.rank == 0:
        logger.info(
            "moe-a2a: buffers for %s of up to %d tokens per rank: %.0f MiB on each of %d ranks, made in %.2f s",
            phase,
            tokens,
            a2a.buffer_bytes / 2**20,
            ranks,
            time.monotonic() - begin,
        )
    kept[sizes] = Shared(a2a)
    return kept[sizes]
