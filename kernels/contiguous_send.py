"""Contiguous dispatch, second launch: store this rank's tokens straight into their final places.

A token's row is loaded once and stored once for each rank that it goes to, this one included, at

    rows that the ranks before this one send there + tokens before it that go there

so that what a rank receives lies packed in (source rank, token) order, and nobody moves it again. Ids, weights and
source numbers go by blocks of tokens, whose rows are neighbours there.

Memory-ordering contract
    Runs after contiguous_layout on the same stream. Waits for the LAYOUT flag of every rank in the handle's view
    (acquire): a flag also says that its rank is done with the block that it wants its rows in. Stores rows, scales,
    ids, weights and source numbers with plain stores; then the last program stores the row that it began with into the
    header on each rank, meets at a CTA barrier, and raises one DISPATCH flag there, with system-scope release. With
    RECEIVE it then waits for the others' as contiguous_recv does, and does the rest of the dispatch.

Nobody may be missing
    Ranks that disagree about who takes part would disagree about where rows lie. So a rank that misses anyone sends no
    rows, and its flag says "excluded"; and contiguous_recv hands out rows only if no rank of the view is missing or
    excluded, and all began where the receiver expects. A late rank's stores cannot spoil rows that are handed out: it
    raises the flags that a later step waits for only after all its stores of this one. That holds for the ranks of a
    view; a view that leaves a rank out must begin after that rank's process has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_a2a.gpu.layout import Layout, power_of_two_at_least
from moe_a2a.gpu.routing import Routing
from moe_a2a.kernels import casts
from moe_a2a.kernels.bad_input import report_bad, report_bad_weights
from moe_a2a.kernels.contiguous_layout import agreed, index_of, report_missing
from moe_a2a.kernels.contiguous_recv import receive_rows
from moe_a2a.kernels.formats import QUANTISE, QUANTISE_POW2
from moe_a2a.kernels.launch import launch, warps
from moe_a2a.kernels.signals import has_bit, is_last, pick, raise_flags, wait

_WARPS = 32  # with one program an SM, all that can be in flight there comes from one program
_QUANTISING_WARPS = 16  # registers for twice as many elements a thread
_TILE = 8192  # words, or elements that are quantised, of a work item
_PART = 512  # of them, of one row: 7168 columns of any kind are a multiple, so that no thread goes without
_META = 128  # tokens whose ids and weights go at once
SCALES_AT_ONCE = 64  # tokens whose given scales go at once
#: Programs, at most, for rows that go as they are. One stores 46 GB/s; where half of that is for this GPU, these fill a
#: link, which gives less when more wait for it. See docs/decisions.md.
_MOST_PROGRAMS = 15
#: counts int32 [E_l], tokens_per_rank int32 [R], came int32 [R + 2]: what contiguous_recv writes.
Received = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def _row_pointers(base, place, BYTES: tl.constexpr, DTYPE: tl.constexpr):
    """[n, 1] pointers to rows of BYTES, a multiple of 16; base: int64, a multiple of 16; place: int32 [n]."""
    address = (base + place.to(tl.int64) * BYTES)[:, None]
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), [16, 16])


@triton.jit
def send_words(
    t0, part, x, hits, within, starts, first, to, tokens, rank, WORDS: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """PART 4-byte words of each of ROWS rows, from token t0 on, as they are."""
    R: tl.constexpr = L.R
    t = t0 + tl.arange(0, ROWS)
    w = part * PART + tl.arange(0, PART)
    inside = (t < tokens)[:, None] & (w < WORDS)[None, :]
    words = tl.load(x + (t.to(tl.int64) * WORDS)[:, None] + w[None, :], mask=inside)
    hit = tl.load(hits + t, mask=t < tokens, other=0)
    for i in tl.static_range(R):
        r = (rank + 1 + i) % R  # far ones first
        place = pick(first, r, L) + index_of(t, t * 0 + r, within, starts, tokens, L)
        row = _row_pointers(pick(to, r, L) + L.rows, place, WORDS * 4, tl.int32)
        on = has_bit(hit, r) & (place < L.CAPACITY)
        tl.store(row + w[None, :], words, mask=inside & on[:, None])


@triton.jit
def _load_scales(t, g, scales, end, L: tl.constexpr):
    """Scales, as bits, of tokens t and groups g, 1 where there is none; and where there is one."""
    inside = (t < end)[:, None] & (g < L.G)[None, :]
    return tl.load(scales + (t.to(tl.int64) * L.G)[:, None] + g[None, :], mask=inside, other=0x3F800000), inside


@triton.jit
def _unusable(bits, POW2: tl.constexpr):
    wrong = (bits <= 0) | (bits >= 0x7F800000)
    if POW2:
        wrong |= (bits & 0x7FFFFF) != 0
    return wrong


@triton.jit
def send_scales(
    pid, programs, begin, end, scales, hits, within, starts, first, to, report, POW2: tl.constexpr, META: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Given fp32 scales of tokens `begin` to `end` - 1, as bits, META tokens at a time: the share of program `pid`.
    Scales that cannot be used are reported."""
    R: tl.constexpr = L.R
    GROUPS: tl.constexpr = L.G_PAD
    g = tl.arange(0, GROUPS)
    blocks = (end - begin + META - 1) // META
    bad = tl.zeros([META, GROUPS], tl.int32)
    for number in tl.range(pid, blocks, programs, num_stages=1):
        t = begin + (tl.full([], 0, tl.int32) + number) * META + tl.arange(0, META)
        hit = tl.load(hits + t, mask=t < end, other=0)
        bits, inside = _load_scales(t, g, scales, end, L)
        bad |= _unusable(bits, POW2).to(tl.int32)
        for r in tl.static_range(R):
            place = pick(first, r, L) + index_of(t, t * 0 + r, within, starts, end, L)
            on = has_bit(hit, r) & (place < L.CAPACITY)
            if L.G % 4 == 0:  # whole vectors of 16 bytes
                row = _row_pointers(pick(to, r, L) + L.scales, place, L.G * 4, tl.int32)
            else:
                row = (pick(to, r, L) + L.scales + place.to(tl.int64) * (L.G * 4)).to(tl.pointer_type(tl.int32))[
                    :, None
                ]
            tl.store(row + g[None, :], bits, mask=inside & on[:, None])
    # Which one is wrong takes registers to say, so it is looked for once more.
    if tl.max(tl.max(bad, 1), 0) > 0:
        for number in tl.range(pid, blocks, programs, num_stages=1):
            t = begin + (tl.full([], 0, tl.int32) + number) * META + tl.arange(0, META)
            bits, inside = _load_scales(t, g, scales, end, L)
            report_bad(_unusable(bits, POW2), t[:, None], t[:, None] * 0 + g[None, :], 2, bits, report, L)


@triton.jit
def send_quantised(
    t0, part, x, hits, within, starts, first, to, tokens, rank, report, POW2: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Quantise PART groups of 128 columns of each of ROWS rows, from token t0 on, as moe_a2a.fp8 does. Scales that are
    not finite are reported."""
    R: tl.constexpr = L.R
    line = tl.arange(0, ROWS * PART)  # a group of a row
    t = t0 + line // PART
    g = part * PART + line % PART
    column = tl.arange(0, 128)
    inside = (t < tokens) & (g < L.G)
    source = x + (t.to(tl.int64) * L.H + g * 128)[:, None] + column[None, :]
    value = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
    hit = tl.load(hits + t, mask=t < tokens, other=0)
    q, scale = casts.quantise(value, POW2)
    for i in tl.static_range(R):
        r = (rank + 1 + i) % R  # far ones first
        place = pick(first, r, L) + index_of(t, t * 0 + r, within, starts, tokens, L)
        on = inside & has_bit(hit, r) & (place < L.CAPACITY)
        row = _row_pointers(pick(to, r, L) + L.rows, place * L.G + g, 128, tl.uint8)
        tl.store(row + column[None, :], q, mask=on[:, None])
        at = (pick(to, r, L) + L.scales) + (place.to(tl.int64) * L.G + g) * 4
        tl.store(at.to(tl.pointer_type(tl.float32)), scale, mask=on)
    found = scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    report_bad(inside & (hit != 0) & (found >= 0x7F800000), t, g, 3, found, report, L)


@triton.jit
def send_choices(
    t0, chosen, weights, hits, within, starts, first, to, tokens, rank, report, WEIGHTS: tl.constexpr,
    LARGEST: tl.constexpr, META: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Local ids, weights and source numbers of META tokens, from t0 on."""
    R: tl.constexpr = L.R
    t = t0 + tl.arange(0, META)
    k = tl.arange(0, L.K_PAD)
    inside = (t < tokens)[:, None] & (k < L.K)[None, :]
    hit = tl.load(hits + t, mask=t < tokens, other=0)
    at = (t.to(tl.int64) * L.K)[:, None] + k[None, :]
    own = tl.load(chosen + at, mask=inside, other=-1)
    owner = tl.where(own >= 0, tl.maximum(own, 0) // L.E_L, -1)
    if WEIGHTS:
        weight = tl.load(weights + at, mask=inside, other=0.0)
        report_bad_weights(weight, inside, t[:, None], t[:, None] * 0 + k[None, :], report, LARGEST, L)
    for r in tl.static_range(R):
        place = pick(first, r, L) + index_of(t, t * 0 + r, within, starts, tokens, L)
        on = has_bit(hit, r) & (place < L.CAPACITY)
        base = pick(to, r, L)
        row = (place.to(tl.int64) * L.K)[:, None] + k[None, :]
        here = inside & on[:, None]
        local = tl.where(owner == r, own - r * L.E_L, -1).to(tl.int64)
        tl.store((base + L.table).to(tl.pointer_type(tl.int64)) + row, local, mask=here)
        if WEIGHTS:
            tl.store(
                (base + L.weights).to(tl.pointer_type(tl.float32)) + row, tl.where(owner == r, weight, 0.0), mask=here
            )
        tl.store((base + L.source).to(tl.pointer_type(tl.int32)) + place, rank * L.M + t, mask=on)


@triton.jit
def tell_host(host, ticket, block, good, matrix, rank, EXPERTS: tl.constexpr, L: tl.constexpr):
    """ticket << 32 | count, for the rows of each source and for each local expert: words that say for themselves that
    they are of this step, so that they need no order."""
    s = tl.arange(0, L.R_PAD)
    mark = ticket.to(tl.int64) << 32
    rows = tl.sum(tl.where(s[None, :] == rank, matrix, 0), 1)
    tl.store(host + s, mark | rows.to(tl.int64), mask=s < L.R)
    e = tl.arange(0, EXPERTS)
    total = e * 0
    counts = (block + L.counts).to(tl.pointer_type(tl.int32))
    R: tl.constexpr = L.R
    for source in tl.static_range(R):
        total += tl.load(counts + source * L.E_L + e, mask=(e < L.E_L) & has_bit(good, source), other=0)
    tl.store(host + L.R + e, mark | (total.to(tl.int64) & 0xFFFFFFFF), mask=e < L.E_L)


@triton.jit(do_not_specialize=["tokens", "rank", "ticket", "own_block"])
def _contiguous_send(
    x, weights, scales, region, peers, control, alive, live, handle, hits, within, starts, chosen, routing, host,
    counts, tokens_per_rank, came, report, tokens, rank, ticket, own_block,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, LARGEST: tl.constexpr, KNOWN: tl.constexpr, RECEIVE: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, META: tl.constexpr,
    SCALES: tl.constexpr, EXPERTS: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    r = tl.arange(0, L.R_PAD)
    bases = tl.load(peers + r, mask=r < L.R, other=0)
    step = tl.load(handle + L.STEP)
    want = tl.load(handle + L.VIEW_MASK)
    before = tl.load(handle + L.MISSING)
    epoch = tl.load(handle + L.VIEW_EPOCH)
    followed = tl.load(routing + L.ROUTING_STEP)
    block = (step & 1) * L.parity_bytes
    mine = region.to(tl.int64) + block
    arrived, excluded = wait(pid, mine, handle, control, alive, L.LAYOUT, want, step, L, LANES)
    good, matrix = agreed(mine, arrived & ~excluded, step, epoch, followed, BITS, L)
    first = tl.sum(tl.where((r < rank)[:, None], matrix, 0), 0)
    wanted = (mine + L.matrix).to(tl.pointer_type(tl.int32)) + r * (L.R + 1) + L.R
    in_block = tl.load(wanted, mask=(r < L.R) & has_bit(arrived, r.to(tl.int64)), other=0) & 1
    to = bases + in_block.to(tl.int64) * L.parity_bytes
    whole = (good == want) & (before == 0)
    if pid == 0:
        tell_host(host, ticket, mine, good, matrix, rank, EXPERTS, L)
        report_missing(want & ~good, want & ~good & ~excluded, rank, handle, live, alive, report, L)

    count = tl.where(whole, tokens, 0)
    if not KNOWN:
        for number in tl.range(pid, (count + META - 1) // META, programs, num_stages=1):
            t0 = (tl.full([], 0, tl.int32) + number) * META
            send_choices(
                t0, chosen, weights, hits, within, starts, first, to, tokens, rank,
                report, WEIGHTS, LARGEST, META, L,
            )  # fmt: skip
    if MODE == 3 or MODE == 4:
        send_scales(
            pid, programs, count * 0, count, scales, hits, within, starts, first, to, report, MODE == 4, SCALES, L
        )  # fmt: skip
    for number in tl.range(pid, (count + ROWS - 1) // ROWS * PARTS, programs, num_stages=1):
        item = tl.full([], 0, tl.int32) + number
        t0, part = item // PARTS * ROWS, item % PARTS
        if MODE == 1 or MODE == 2:
            send_quantised(
                t0, part, x, hits, within, starts, first, to, tokens, rank, report, MODE == 2, ROWS, PART, L
            )  # fmt: skip
        else:
            send_words(t0, part, x, hits, within, starts, first, to, tokens, rank, WORDS, ROWS, PART, L)

    if is_last(live + (L.FINISHED + L.DISPATCH), programs):
        on = (r < L.R) & has_bit(want, r.to(tl.int64))
        header = (bases + block + L.headers + rank * (8 * L.HEADER_WORDS)).to(tl.pointer_type(tl.int64))
        tl.store(header + L.HEADER_FIRST, first.to(tl.int64), mask=on)
        tl.debug_barrier()
        value = 2 * step + tl.where(whole, 0, 1) + (r * 0).to(tl.int64)
        raise_flags(bases, block + L.flags + L.DISPATCH * L.R * 8, rank, value, want, L)
        if RECEIVE:
            receive_rows(
                0, 1, counts, tokens_per_rank, counts, region, control, alive, live, handle, came, routing, report,
                rank, own_block, BITS, True, False, False, 1, EXPERTS, L, LANES,
            )  # fmt: skip


def contiguous_send(
    layout: Layout,
    rank: int,
    x: torch.Tensor,
    weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    mode: int,
    bits: int,
    known: bool,
    ticket: int,
    received: Received | None,
    *,
    largest_weight: float,
    region: torch.Tensor,
    peers: torch.Tensor,
    control: torch.Tensor,
    alive: torch.Tensor,
    live: torch.Tensor,
    handle: torch.Tensor,
    routing: Routing,
    host: torch.Tensor,
    report: torch.Tensor,
    own_block: int,
    programs: int,
) -> None:
    """Launch. x: [T, H], payload dtype, or FP8 for GIVEN; weights: fp32 [T, K] or None; scales: fp32 [T, H/128] for
    GIVEN; known: ids and weights are there from an earlier step; ticket: a number of this dispatch, 31 bits; received:
    do what contiguous_recv does as well, which for rows that are known and whose scales stay as they are is little;
    largest_weight: beyond it weights are reported; host: int64 [R + E_l] of pinned memory; own_block: where this rank
    wants its rows; programs: the most to launch, one for each SM. The others: `Layout`, `Routing`."""
    quantise = mode in (QUANTISE, QUANTISE_POW2)
    rows = x if quantise else x.view(torch.int32)
    words = layout.H * x.element_size() // 4
    threads = 32 * warps(_QUANTISING_WARPS if quantise else _WARPS, layout.R)
    columns = layout.H if quantise else words
    part = min(128 * power_of_two_at_least(layout.G) if quantise else power_of_two_at_least(words), _PART, _TILE)
    rows_at_once, parts = _TILE // part, -(-columns // part)
    if not quantise:
        programs = min(programs, _MOST_PROGRAMS)
    launch(
        _contiguous_send,
        max(1, min(-(-x.shape[0] // rows_at_once) * parts, programs)),
        (
            rows,
            weights if weights is not None else routing.words,
            scales.view(torch.int32) if scales is not None else routing.words,
            region,
            peers,
            control,
            alive,
            live,
            handle,
            routing.hits,
            routing.within,
            routing.starts,
            routing.chosen,
            routing.words,
            host,
            *(received or (routing.words,) * 3),
            report,
            x.shape[0],
            rank,
            ticket,
            own_block,
        ),
        (
            mode,
            weights is not None,
            largest_weight,
            known,
            received is not None,
            bits,
            words,
            rows_at_once,
            part // 128 if quantise else part,
            parts,
            _META,
            SCALES_AT_ONCE,
            power_of_two_at_least(layout.E_L),
            layout,
            threads,
        ),
        (rows.dtype, torch.float32 if weights is not None else torch.int64),
        num_warps=threads // 32,
    )
