"""Where everything lies in a GPU rank's memory: pure arithmetic, shared by kernels, launchers and tests.

A rank has two kinds of memory.

Region: symmetric, mapped and written by the peers. One for each channel; it holds two parities of the same block:

    flags    int64 [PHASES, R]         written last, by the sources; see `moe_a2a.kernels.signals`. If there are several
                                       rounds, [2 * ROUNDS, 2, R] more: ROUND and DRAINED of each turn
    headers  int64 [R, HEADER_WORDS]   step, view epoch, incarnation, T, bits, of each source
    chunks   int64 [R, CHUNKS]         flags of CHUNK rows of `sums` each (contiguous)
    matrix   int32 [R, R + 1]          rows from each rank to each rank, and the block where a rank wants its rows
                                       (contiguous)
    counts   int32 [R, E_l]            rows that each source sends to each local expert
    bounds   int32 [R, ROUNDS + 1]     rows that come from each source before each round, if there are several
    table    masked: int32 [R, W, K]   -1, or (index among the source's rows for that expert) << 10 | local expert
             contiguous: int64 [CAPACITY, K]  local expert ids, -1 elsewhere
    weights  masked: fp32 [R, W, K]; contiguous: fp32 [CAPACITY, K], 0 elsewhere
    source   int32 [CAPACITY]          source rank * M + token (contiguous)
    rows     masked: bytes [R, W, row_stride]  payload, and behind it fp32 [H/128] scales if the payload is FP8
             contiguous: bytes [CAPACITY, H * its itemsize], all packed; then fp32 [CAPACITY, H/128] for FP8
    sums     bytes [R, W, H * itemsize]  rows that come back at combine, one for each rank that a token went to;
                                       masked: at the token's number; contiguous: the tokens of a rank packed

There is room for W tokens of each rank: for all M, unless the capacity is limited. Then masked steps take W tokens of a
rank at most, and contiguous ones go in ROUNDS rounds of W tokens of each rank (`moe_a2a.gpu.rounds`), whose rows have
places for each source: in [R, W], those of a source packed.

A step's parity is that of its number, and says which block holds all this; but the received rows of a contiguous step
(table, weights, source, rows) lie in the block that the receiver names in `matrix`, because its host hands them out as
they lie there, and a replayed graph moves the numbers without telling the host.

State: the rank's own, seen by nobody else. One `control` for each rank, one `live` for each channel, and one handle,
`hits` and `places` for each step that may be open (two for each channel, and one for each step of a captured graph).
All of `control`, `live`, a handle, `report` and the words in host memory are int64, named below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from moe_a2a.config import GROUP, Config
from moe_a2a.errors import ConfigError

#: Slots of a channel: steps that may be open at once, and parities of its buffers.
SLOTS = 2
#: Bytes of a channel's rows, up to which there is room for all that can arrive if no capacity is given.
ROOM = 8 << 30
#: Ranks whose arrival fits in one 64-bit word beside the bits that a wait needs for itself.
MAX_RANKS = 60
MAX_TOKENS = 1 << 20
_LINE = 256  # bytes; areas start on such a boundary, so that wide stores stay aligned


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def power_of_two_at_least(n: int) -> int:
    """The smallest power of two that is n or more; Triton's tiles have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Layout:
    """Offsets and sizes in bytes. Kernels take it whole as a compile-time constant, hence the short names.

    R ranks, E experts, H hidden size, K top-k, M max_tokens_per_rank; itemsize: bytes of an element of the payload
    dtype; fp8_only: the region takes no dispatch rows but FP8 ones, and is that much smaller; capacity: rows of a
    contiguous step that the region has room for, at least R; None: R * M.

    Raises ConfigError.
    """

    R: int
    E: int
    H: int
    K: int
    M: int
    itemsize: int
    fp8_only: bool = False
    capacity: int | None = None

    # Phases: each has a flag for every source.
    DISPATCH: ClassVar[int] = 0
    COMBINE: ClassVar[int] = 1
    WEIGHTS: ClassVar[int] = 2
    LAYOUT: ClassVar[int] = 3  # counts of a contiguous dispatch
    PHASES: ClassVar[int] = 4
    # Of contiguous steps in several rounds, with flags for every turn: see `moe_a2a.kernels.rounds`.
    ROUND: ClassVar[int] = 4  # rows of a round that is not the first
    DRAINED: ClassVar[int] = 5  # rows of a round are where they belong, and their places free

    # Words of `control`, written by the host. A new view is written as "next", with the step at which it begins last,
    # and before it, as 0, the GIVEN_UP of its epoch in `live` of each channel.
    EPOCH: ClassVar[int] = 0
    MASK: ClassVar[int] = 1
    NEXT_EPOCH: ClassVar[int] = 2
    NEXT_MASK: ClassVar[int] = 3
    NEXT_STEP: ClassVar[int] = 4
    BUDGET_NS: ClassVar[int] = 5
    INCARNATION: ClassVar[int] = 6
    CONTROL_WORDS: ClassVar[int] = 8

    # Words of `live`, written by kernels of the channel, which run one after another.
    LIVE_STEP: ClassVar[int] = 0  # the last step that was sent
    FINISHED: ClassVar[int] = 1  # + phase, up to PHASES; programs of a running kernel that are done
    OPEN: ClassVar[int] = 5  # + step & 1; the step of that parity that is open here, 0 if none is
    HELD: ClassVar[int] = 7  # + block; the open contiguous step whose received rows lie there, 0 if none do
    GIVEN_UP: ClassVar[int] = 9  # + epoch & 1; ranks that this rank found missing in that view
    TABLES: ClassVar[int] = 11  # + block; the step that wrote the tables of received rows there last
    LIVE_WORDS: ClassVar[int] = 16

    # Words of a handle, all of them written by send; what receive and combine find out is kept here too.
    STEP: ClassVar[int] = 0
    VIEW_MASK: ClassVar[int] = 1
    VIEW_EPOCH: ClassVar[int] = 2
    RECEIVED: ClassVar[int] = 3  # sources whose rows receive took
    LONGEST: ClassVar[int] = 4  # the most tokens that one of them brought
    ROWS: ClassVar[int] = 5  # 1; 0 with RECEIVED and LONGEST once the step is discarded: its end brings flags only
    MISSING: ClassVar[int] = 6  # ranks that are missing from this step, whatever the phase
    EXPECTED: ClassVar[int] = 7  # ranks whose COMBINE flag is waited for: those that are not missing so far
    DEADLINE: ClassVar[int] = 8  # + phase; 0 until somebody has to wait
    VERDICT: ClassVar[int] = 14  # + phase; 0 unless a deadline came near
    SENT: ClassVar[int] = 20  # 1 from the end of dispatch's sending half to that of combine's
    FILLED: ClassVar[int] = 21  # rounds that hold tokens of anybody, at least 1 (contiguous, if there are several)
    HANDLE_WORDS: ClassVar[int] = 32

    # Words of a header.
    HEADER_STEP: ClassVar[int] = 0
    HEADER_EPOCH: ClassVar[int] = 1
    HEADER_INCARNATION: ClassVar[int] = 2
    HEADER_TOKENS: ClassVar[int] = 3
    HEADER_BITS: ClassVar[int] = 4
    HEADER_ROUTING: ClassVar[int] = 5  # the step whose routing a contiguous step follows
    HEADER_FIRST: ClassVar[int] = 6  # where a contiguous source has put its first row
    HEADER_WORDS: ClassVar[int] = 8

    # Words of `report`, for the host.
    BAD_INPUT: ClassVar[int] = 0  # NO_BAD_INPUT, or the first wrong input: see `moe_a2a.gpu.report`
    LOST: ClassVar[int] = 1  # ranks that were ever missing
    MISUSE: ClassVar[int] = 2  # STARTED_EARLY, ENDED_TWICE, ROUTING_GONE
    REPORT_WORDS: ClassVar[int] = 3
    STARTED_EARLY: ClassVar[int] = 1  # a step was sent while the one before the last was open
    ENDED_TWICE: ClassVar[int] = 2  # a step was combined that was not open
    ROUTING_GONE: ClassVar[int] = 4  # a step followed a routing whose tables had been overwritten

    # Words in host memory, which host and kernels both read and write at any time.
    ALIVE: ClassVar[int] = 0  # written by the host: a bit for each rank that lives
    TOLD: ClassVar[int] = 1  # written by kernels: LOST, so that the host hears of it without asking the device
    HOST_WORDS: ClassVar[int] = 2

    # Words of a routing: what later steps that follow it must know of the step that made it.
    ROUTING_STEP: ClassVar[int] = 0
    ROUTING_MASK: ClassVar[int] = 1
    ROUTING_BLOCK: ClassVar[int] = 2  # where its tables lie
    ROUTING_WORDS: ClassVar[int] = 3

    #: The fewest rows that a contiguous combine announces at once.
    CHUNK: ClassVar[int] = 16
    #: Tokens that are counted at once by a contiguous dispatch.
    BLOCK: ClassVar[int] = 128

    #: Bits of a table word that hold the local expert.
    EXPERT_BITS: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if not 1 <= self.R <= MAX_RANKS:
            raise ConfigError(f"{self.R} ranks in one domain; allowed are 1 to {MAX_RANKS}")
        if self.M > MAX_TOKENS:
            raise ConfigError(f"max_tokens_per_rank={self.M}; GPU ranks allow 1 to {MAX_TOKENS}")
        if self.capacity is not None and self.capacity < self.R:
            raise ConfigError(
                f"recv_capacity={self.capacity}, and {self.R} ranks bring a token each: allowed are {self.R} rows or "
                f"more; {self.R * self.M} are as many as can arrive, and half of them, or fewer, save memory"
            )

    @staticmethod
    def of(config: Config, ranks: int, fp8_only: bool = False, capacity: int | None = None) -> Layout:
        """The layout of a group. capacity: `Options.recv_capacity`. Raises ConfigError."""
        config.local_experts(ranks)
        layout = Layout(
            ranks,
            config.num_experts,
            config.hidden_size,
            config.top_k,
            config.max_tokens_per_rank,
            config.dtype.itemsize,
            fp8_only,
            capacity,
        )
        if capacity is None and layout.M * layout._token_bytes > ROOM:
            return replace(layout, capacity=layout.R * max(1, ROOM // layout._token_bytes))
        return layout

    @cached_property
    def W(self) -> int:  # noqa: N802
        """Tokens of each rank that there is room for."""
        return self.M if self.capacity is None else min(self.M, self.capacity // self.R)

    @cached_property
    def ROUNDS(self) -> int:  # noqa: N802
        """Rounds of a contiguous step of M tokens a rank."""
        return -(-self.M // self.W)

    @cached_property
    def MOST(self) -> int:  # noqa: N802
        """Rows that a rank can receive in a contiguous step."""
        return self.R * self.M

    @cached_property
    def E_L(self) -> int:  # noqa: N802
        """Experts of one rank."""
        return self.E // self.R

    @cached_property
    def G(self) -> int:  # noqa: N802
        """Scales of a row."""
        return self.H // GROUP

    @cached_property
    def CAP(self) -> int:  # noqa: N802
        """Rows of an expert's block in the masked layout; the most that a rank can receive in such a step."""
        return self.R * self.W

    @cached_property
    def CAPACITY(self) -> int:  # noqa: N802
        """Rows that a contiguous dispatch can put into a block."""
        return self.R * self.W

    @cached_property
    def CHUNKS(self) -> int:  # noqa: N802
        """Chunk flags of one source."""
        return -(-self.W // self.CHUNK)

    @cached_property
    def BLOCKS(self) -> int:  # noqa: N802
        """Blocks of tokens of one rank, at most."""
        return -(-self.M // self.BLOCK)

    @cached_property
    def R_PAD(self) -> int:  # noqa: N802
        return power_of_two_at_least(self.R)

    @cached_property
    def K_PAD(self) -> int:  # noqa: N802
        return power_of_two_at_least(self.K)

    @cached_property
    def G_PAD(self) -> int:  # noqa: N802
        # Here and not in a kernel: SGLang puts a function of its own in the place of Triton's, which Triton refuses.
        return power_of_two_at_least(self.G)

    @cached_property
    def row_stride(self) -> int:
        """Bytes from one dispatched row to the next: the longer of a plain row, and an FP8 row with its scales."""
        fp8 = self.H + 4 * self.G
        return _round_up(fp8 if self.fp8_only else max(fp8, self.sum_stride), 16)

    @cached_property
    def sum_stride(self) -> int:
        return self.H * self.itemsize

    @cached_property
    def _token_bytes(self) -> int:
        """Bytes of a region for each token of every rank that there is room for."""
        return SLOTS * self.R * (12 * self.K + 4 + self.row_stride + self.sum_stride)

    @cached_property
    def _areas(self) -> dict[str, int]:
        """First byte of each area, and of what follows the last."""
        slots = self.CAPACITY
        sizes = {
            "flags": 8 * self.R * (self.PHASES + (4 * self.ROUNDS if self.ROUNDS > 1 else 0)),
            "headers": 8 * self.HEADER_WORDS * self.R,
            "chunks": 8 * self.R * self.CHUNKS,
            "matrix": 4 * self.R * (self.R + 1),
            "counts": 4 * self.R * self.E_L,
            "bounds": 4 * self.R * (self.ROUNDS + 1) if self.ROUNDS > 1 else 0,
            "table": 8 * slots * self.K,
            "weights": 4 * slots * self.K,
            "source": 4 * slots,
            "rows": slots * self.row_stride,
            "sums": slots * self.sum_stride,
        }
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name] = end
            end = _round_up(end + size, _LINE)
        return {**starts, "end": end}

    @cached_property
    def flags(self) -> int:
        return self._areas["flags"]

    @cached_property
    def headers(self) -> int:
        return self._areas["headers"]

    @cached_property
    def chunks(self) -> int:
        return self._areas["chunks"]

    @cached_property
    def matrix(self) -> int:
        return self._areas["matrix"]

    @cached_property
    def counts(self) -> int:
        return self._areas["counts"]

    @cached_property
    def bounds(self) -> int:
        return self._areas["bounds"]

    @cached_property
    def table(self) -> int:
        return self._areas["table"]

    @cached_property
    def weights(self) -> int:
        return self._areas["weights"]

    @cached_property
    def source(self) -> int:
        return self._areas["source"]

    @cached_property
    def rows(self) -> int:
        return self._areas["rows"]

    @cached_property
    def sums(self) -> int:
        return self._areas["sums"]

    @cached_property
    def scales(self) -> int:
        """Scales of contiguous FP8 rows, behind them."""
        return self.rows + self.CAPACITY * self.H

    @cached_property
    def parity_bytes(self) -> int:
        """Bytes of one parity."""
        return self._areas["end"]

    @cached_property
    def region_bytes(self) -> int:
        """Bytes of the symmetric region of one rank and channel."""
        return SLOTS * self.parity_bytes

    @cached_property
    def _text(self) -> str:
        fields = (self.R, self.E, self.H, self.K, self.M, self.itemsize, int(self.fp8_only), self.W)
        return "Layout_" + "_".join(map(str, fields))

    @cached_property
    def _hash(self) -> int:
        return hash(self._text)

    def __hash__(self) -> int:
        return self._hash  # part of a key at every launch

    def __repr__(self) -> str:
        # Triton keys its caches on this at every launch, so it is short, made once, and legal in a symbol's name.
        return self._text
