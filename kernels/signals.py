"""How ranks and programs tell each other that data is there. The only place with system-scope atomics and inline PTX.

Memory-ordering contract
    publish   All stores of a launch, of all its programs, happen before the flag that its last program stores. The
              chain: a program's stores, a CTA barrier, an acq_rel increment of a counter of this GPU by one thread;
              whoever completes the count goes on through that thread's acquire, a CTA barrier and a store with
              system-scope release. Release is cumulative, so that a peer that acquires the flag sees them all.
    wait      Flags are read with system-scope acquire, and a CTA barrier follows: what a source stored before its
              flag is visible to every thread afterwards.

A flag holds 2 * step + excluded. Steps of a parity only grow, so that "2 * step or more" means "arrived".

How a wait ends, always and for all programs alike
    Every program polls for itself; on the good path nobody writes anything. But programs that disagree about who
    arrived would disagree about where rows lie. So whoever has to wait starts a clock that all share (DEADLINE in the
    handle, once per step and phase), and the outcome is put to a vote (VERDICT, compare-and-set, the first wins) by
    everyone who is done after the deadline. A program that saw all flags before the deadline needs no vote: sources
    are given up only MARGIN_NS after it, by a program whose poll then still misses a flag, and flags never go back.
    A membership change (the `alive` word, in pinned host memory) moves the deadline to now + MARGIN_NS.

    Decisions come out of a reduction over the whole CTA, with one lane a thread (`lanes` = 32 * num_warps): scalars
    that each thread loads for itself could differ between warps, and warps that disagree do not meet at a barrier.

In Triton's interpreter PTX cannot run: PORTABLE then chooses plain loads and the host's clock.
"""

from __future__ import annotations

import time

import triton
import triton.language as tl

PORTABLE = tl.constexpr(bool(triton.knobs.runtime.interpret))

MARGIN_NS = tl.constexpr(20_000)
# Polls before a waiting program starts the clock: about 10 us.
_SPINS = tl.constexpr(16)
# Polls between two looks at the word in host memory, which takes microseconds to read.
_LOOKS = tl.constexpr(32)
_LIVE = tl.constexpr(1 << 62)
_OVER = tl.constexpr(1 << 61)
_DECIDED = tl.constexpr(1 << 62)


if PORTABLE.value:

    def now():
        """Nanoseconds of a clock that all programs share."""
        return tl.full([], 0, tl.int64) + time.monotonic_ns()

else:

    @triton.jit
    def now():
        """Nanoseconds of a clock that all programs share."""
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def aligned(address, dtype: tl.constexpr):
    """A pointer from an int64 address that is a multiple of 16: without the hint, every element is an access."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def pick(values, index, L: tl.constexpr):
    """values[index] of a tensor [R_PAD] that is in registers."""
    r = tl.arange(0, L.R_PAD)
    return tl.sum(tl.where(r == index, values, 0), 0)


@triton.jit
def either(a, b):
    """For tl.reduce: bitwise or."""
    return a | b


@triton.jit
def lane_bits(flags, lane):
    """The lanes whose flag is set, as bits of one int64. flags: bool [n]; lane: int64 [n], 0 to n - 1."""
    one = tl.full([], 1, tl.int64)
    return tl.reduce(tl.where(flags, one << tl.minimum(lane, 62), 0), 0, either)


@triton.jit
def has_bit(mask, bit):
    """Is a bit of an int64 mask set? Both may be tensors."""
    return ((mask >> bit) & 1) != 0


@triton.jit
def _load_acquire(pointers):
    if PORTABLE:
        return tl.load(pointers)
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [pointers], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def _poll(flags, deadline, want, threshold, R: tl.constexpr, LANES: tl.constexpr):
    """One look at all flags: (arrived sources | _LIVE | _OVER, excluded sources), equal in every thread.

    _LIVE: before the deadline, or no clock runs. _OVER: the deadline was over MARGIN_NS ago before the flags were read.
    """
    lane = tl.arange(0, LANES).to(tl.int64)
    # Of the lanes beside the flags, one reads the deadline: the same instruction, so no second round trip.
    is_flag = (lane < R) & has_bit(want, tl.minimum(lane, 62))
    is_deadline = lane == R
    addresses = tl.where(is_deadline, deadline.to(tl.int64), flags.to(tl.int64) + tl.where(is_flag, lane, 0) * 8)
    before = now()
    value = _load_acquire(addresses.to(tl.pointer_type(tl.int64)))
    after = now()
    is_set = is_flag & (value >= threshold)
    one = tl.full([], 1, tl.int64)
    bits = tl.where(is_set, one << tl.minimum(lane, 60), 0)
    bits += tl.where(is_deadline & ((value == 0) | (after < value)), _LIVE, 0)
    bits += tl.where(is_deadline & (value != 0) & (before >= value + MARGIN_NS), _OVER, 0)
    excluded = tl.where(is_set & ((value & 1) != 0), one << tl.minimum(lane, 60), 0)
    return tl.sum(bits, 0), tl.sum(excluded, 0)


@triton.jit
def _uniform(pointer, LANES: tl.constexpr):
    """A word as one thread sees it, in all threads."""
    lane = tl.arange(0, LANES)
    return tl.sum(tl.where(lane == 0, tl.load(pointer + lane * 0, volatile=True), 0), 0)


@triton.jit
def wait(pid, region, handle, control, alive, PHASE: tl.constexpr, want, step, L: tl.constexpr, LANES: tl.constexpr):
    """Wait for the flags of the sources in `want`. Returns (arrived, excluded), masks of sources, both within `want`.

    pid: this program's number among those that wait. region: int64 address of this rank's block of the step's parity;
    handle, control: int64 words (`Layout`); alive: int64 word that the host may change at any time, a bit for each rank
    that lives. Ends when every source has arrived, or when control's BUDGET_NS is over or `alive` loses a source: then
    `arrived` lacks it, in all programs.
    """
    flags = (region + L.flags + PHASE * L.R * 8).to(tl.pointer_type(tl.int64))
    deadline = handle + (L.DEADLINE + PHASE)
    bits, excluded = _poll(flags, deadline, want, 2 * step, L.R, LANES)
    arrived = want
    if bits != (want | _LIVE):
        polls = tl.full([], 0, tl.int32)
        while ((bits & want) != want) & ((bits & _OVER) == 0):
            if polls == _SPINS:
                tl.atomic_cas(deadline, tl.full([], 0, tl.int64), now() + tl.load(control + L.BUDGET_NS))
            # One program looks for all: thousands that read one word of host memory at once take milliseconds.
            if (pid == 0) & (polls % _LOOKS == _LOOKS - 1):
                gone = want & ~_uniform(alive, LANES)
                if (gone & ~bits) != 0:
                    tl.atomic_min(deadline, now() + MARGIN_NS)
            polls += 1
            bits, excluded = _poll(flags, deadline, want, 2 * step, L.R, LANES)
        if (bits & _LIVE) == 0:
            mine = (bits & want) | _DECIDED
            verdict = tl.atomic_cas(handle + (L.VERDICT + PHASE), tl.full([], 0, tl.int64), mine)
            verdict = tl.where(verdict == 0, mine, verdict)
            arrived = verdict & want
            # Another program may have seen a flag that this one has not; it is there by now.
            bits, excluded = _poll(flags, deadline, arrived, 2 * step, L.R, LANES)
    return arrived, excluded


@triton.jit
def until_sent(handle, L: tl.constexpr, LANES: tl.constexpr):
    """Wait until the last sending program of this launch has written the handle. It does not wait for anybody."""
    lane = tl.arange(0, LANES).to(tl.int64) * 0
    address = (handle + L.SENT).to(tl.int64) + lane
    while tl.max(_load_acquire(address.to(tl.pointer_type(tl.int64))), 0) == 0:
        pass


@triton.jit
def excluded_by(region, want, PHASE: tl.constexpr, step, L: tl.constexpr, LANES: tl.constexpr):
    """One look at a phase's flags: the sources in `want` that have said "excluded" in this step. Arguments as
    `wait`'s."""
    lane = tl.arange(0, LANES).to(tl.int64)
    on = (lane < L.R) & has_bit(want, tl.minimum(lane, 62))
    address = region + (L.flags + PHASE * L.R * 8) + tl.minimum(lane, L.R - 1) * 8
    value = _load_acquire(address.to(tl.pointer_type(tl.int64)))
    return lane_bits(on & (value == 2 * step + 1), lane)


@triton.jit
def _pending(flags, source, on, deadline, step, LANES: tl.constexpr):
    """One look: sources with a flag that has not come, and _OVER as in `_poll`; equal in every thread."""
    is_deadline = tl.arange(0, LANES) == LANES - 1
    before = now()
    value = _load_acquire(tl.where(on, flags, deadline.to(tl.int64)).to(tl.pointer_type(tl.int64)))
    one = tl.full([], 1, tl.int64)
    bits = tl.where(on & (value < 2 * step), one << source.to(tl.int64), 0)
    over = is_deadline & (value != 0) & (before >= value + MARGIN_NS)
    return tl.reduce(bits | tl.where(over, _OVER, 0), 0, either)


@triton.jit
def await_lanes(
    flags, source, on, leader, region, handle, control, alive, PHASE: tl.constexpr, step, L: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Wait for flags of which each program needs others, one a lane. Returns the sources whose flags did not come.

    flags: int64 [LANES], addresses; source: int32 [LANES]; on: bool [LANES], never the last lane. leader: whether this
    program looks at `alive`; one of the launch does. The others are as for `wait`, whose budget and deadline this
    shares: it ends also for sources that say "excluded" in the phase's own flag. Programs may come to different ends;
    those for whom that matters use `wait`.
    """
    deadline = handle + (L.DEADLINE + PHASE)
    bits = _pending(flags, source, on, deadline, step, LANES)
    lost = step * 0
    polls = tl.full([], 0, tl.int32)
    while (bits != 0) & ((bits & _OVER) == 0):
        if polls == _SPINS:
            tl.atomic_cas(deadline, tl.full([], 0, tl.int64), now() + tl.load(control + L.BUDGET_NS))
        if polls % _LOOKS == _LOOKS - 1:
            refused = excluded_by(region, bits, PHASE, step, L, LANES)
            lost |= refused
            on = on & (has_bit(refused, source.to(tl.int64)) == 0)
            if leader:
                gone = bits & ~_uniform(alive, LANES)
                if gone != 0:
                    tl.atomic_min(deadline, now() + MARGIN_NS)
        polls += 1
        bits = _pending(flags, source, on, deadline, step, LANES)
    return lost | (bits & ~_OVER)


@triton.jit
def is_last(counter, programs):
    """Announce that this program is done; True in the last of `programs`, which sees all that the others stored.

    counter: int64 of this GPU, 0 before the launch and again after it.
    """
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = done == programs - 1
    if last:
        tl.store(counter, tl.full([], 0, tl.int64))
    return last


@triton.jit
def raise_flag(address, value):
    """Store one flag, with release, when all of this program's stores so far are done. address: int64; value: int64."""
    tl.debug_barrier()
    tl.atomic_xchg(address.to(tl.pointer_type(tl.int64)), value, sem="release", scope="sys")


@triton.jit
def raise_flags(bases, offset, rank, value, mask, L: tl.constexpr):
    """Store this rank's flag on every rank in `mask`, with release. Only for the program for which `is_last` was True.

    bases: int64 [R_PAD], addresses of the regions; offset: of the phase's flags in the region; value: int64 [R_PAD].
    """
    r = tl.arange(0, L.R_PAD)
    on = (r < L.R) & has_bit(mask, r.to(tl.int64))
    address = bases + offset + rank * 8
    tl.atomic_xchg(address.to(tl.pointer_type(tl.int64)), value, mask=on, sem="release", scope="sys")
