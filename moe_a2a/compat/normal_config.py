"""DeepEP's `Config`, and how many tokens a normal-mode buffer of so many bytes holds."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from moe_a2a import config as core
from moe_a2a.errors import ConfigError
from moe_a2a.gpu.layout import MAX_TOKENS, Layout

#: Tokens of a rank for which `Config.get_nvl_buffer_size_hint` asks for memory.
TOKENS = 4096
_GRANULE = 2 << 20


@dataclass(frozen=True)
class Config:
    """DeepEP's tuning numbers of normal-mode calls.

    num_sms: SMs that a call uses, even. The others say how DeepEP cuts rows into chunks, of which there are none here:
    they are checked and otherwise without meaning. Raises ConfigError.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        if self.num_sms < 0:
            raise ConfigError(f"num_sms={self.num_sms}; give an even number, 2 or more")
        for kind in ("nvl", "rdma"):
            sent, received = (getattr(self, f"num_max_{kind}_chunked_{way}_tokens") for way in ("send", "recv"))
            if not 0 < sent < received:
                raise ConfigError(
                    f"num_max_{kind}_chunked_send_tokens={sent}, num_max_{kind}_chunked_recv_tokens={received}; the "
                    "first must be above 0 and below the second"
                )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of communication buffer that a GPU rank will make for dispatches of up to `TOKENS` tokens, for the
        largest top-k: an upper bound. hidden_bytes: of a bf16 row. For n times as many tokens, give `Buffer` n times as
        many bytes. Raises ConfigError."""
        hidden = -(-hidden_bytes // (2 * core.GROUP)) * core.GROUP
        experts = core.MAX_EXPERTS // num_ranks * num_ranks
        sizes = core.Config(experts, hidden, core.MAX_TOP_K, TOKENS)
        return -(-Layout.of(sizes, num_ranks).region_bytes // _GRANULE) * _GRANULE

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: nothing goes through such a buffer."""
        return 0


def bytes_for(tokens: int, sizes: tuple[int, int, int], ranks: int, fp8_only: bool) -> int:
    """Bytes of a GPU rank's buffer. sizes: hidden, experts, top-k. Raises ConfigError."""
    hidden, experts, top_k = sizes
    return Layout.of(core.Config(experts, hidden, top_k, tokens), ranks, fp8_only).region_bytes


def tokens_in(nbytes: int, sizes: tuple[int, int, int], ranks: int, fp8_only: bool) -> int:
    """The most tokens a rank may bring to a buffer of so many bytes; 0 if it is too small for any."""
    return bisect_right(range(1, MAX_TOKENS + 1), nbytes, key=lambda tokens: bytes_for(tokens, sizes, ranks, fp8_only))
