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
    everyone who is done after the deadline. Program 0 also looks at the `alive` word in pinned host memory. Sources
    that live have the whole budget, whoever else dies: only when all that are still missing have lost their bit does
    it move the deadline, to now + MARGIN_NS. Others then end as they do when the budget is over.

    Why all agree: programs that vote follow the first vote. A program N goes without one if a single, quick poll saw
    every flag, and no deadline or one ahead. A program G gives source s up if a poll that began MARGIN_NS after the
    deadline it read misses the flag of s. Suppose that both happen. Flags never go back, so G read the flag of s before
    N did. But
    - if N read a deadline not later than G's, it read all its flags before that, and G after G's deadline;
    - if N read none, or a later one, it read it before G's was written, which was at least MARGIN_NS before that
      deadline. N's poll took less than MARGIN_NS, so N read its flags before the deadline was over, and G after it.
    Both take for granted that an atomic lands within MARGIN_NS of the clock reading in front of it; G waits that much
    longer. So N read the flag of s first, and they never both happen. (With more than 31 ranks the flags are read by
    two warps, and only the one that reads the deadline is timed.)

    Decisions come out of a reduction over the whole CTA, with one lane a thread (`lanes` = 32 * num_warps): scalars
    that each thread loads for itself could differ between warps, and warps that disagree do not meet at a barrier.

After a wait that gave a source up
    The source may be late and not dead. It is out of this rank's next dispatches until a new view has it
    (`record_missing`, GIVEN_UP): this rank never again reads what it stores nor stores into its memory, but for the
    flags of steps that are open already. So no later step can write over rows that the late source still reads, or take
    its late rows for its own, and the rest of the step need not wait for it again: that the others are done (EXPECTED)
    is enough to use their buffers again. The late source finds the flag "excluded", and this rank missing.

In Triton's interpreter PTX cannot run: PORTABLE then chooses plain loads and the host's clock.
"""

from __future__ import annotations

import time

import triton
import triton.language as tl

PORTABLE = tl.constexpr(bool(triton.knobs.runtime.interpret))

# The interpreter takes milliseconds for a poll.
MARGIN_NS = tl.constexpr(50_000_000 if PORTABLE.value else 20_000)
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

    _LIVE: before the deadline, or no clock runs, and the look took less than MARGIN_NS. _OVER: the deadline was over
    MARGIN_NS ago before the flags were read.
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
    bits += tl.where(is_deadline & ((value == 0) | (after < value)) & (after - before < MARGIN_NS), _LIVE, 0)
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
    handle, control, alive: int64 words (`Layout`), alive those in host memory. Ends when every source has arrived, or
    when those that have not are without their bit in `alive`, or when control's BUDGET_NS is over: then `arrived` lacks
    them, in all programs.
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
                living = _uniform(alive + L.ALIVE, LANES)
                if (want & ~bits & living) == 0:
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
def watch(region, handle, control, alive, PHASE: tl.constexpr, source, step, L: tl.constexpr, LANES: tl.constexpr):
    """Return when one source's flag is set, or when a `wait` for it would give up. Decides nothing.

    Arguments as `wait`'s. For one source a program, in a grid of at most R: each looks at host memory for itself.
    """
    flags = (region + L.flags + PHASE * L.R * 8).to(tl.pointer_type(tl.int64))
    deadline = handle + (L.DEADLINE + PHASE)
    want = tl.full([], 1, tl.int64) << source.to(tl.int64)
    bits, _ = _poll(flags, deadline, want, 2 * step, L.R, LANES)
    polls = tl.full([], 0, tl.int32)
    while ((bits & want) == 0) & ((bits & _OVER) == 0):
        if polls == _SPINS:
            tl.atomic_cas(deadline, tl.full([], 0, tl.int64), now() + tl.load(control + L.BUDGET_NS))
        if polls % _LOOKS == _LOOKS - 1:
            bits |= tl.where((want & _uniform(alive + L.ALIVE, LANES)) == 0, _OVER, 0)
        polls += 1
        polled, _ = _poll(flags, deadline, want, 2 * step, L.R, LANES)
        bits |= polled


@triton.jit
def record_missing(lost, handle, live, alive, report, L: tl.constexpr):
    """Write down that ranks are missing from a step: for the step, for those to come in this view, and for the host.

    lost: mask of ranks, not 0. Only for one program of a launch.
    """
    epoch = tl.load(handle + L.VIEW_EPOCH)
    tl.atomic_or(handle + L.MISSING, lost)
    tl.atomic_or(live + L.GIVEN_UP + (epoch & 1), lost)
    tl.store(alive + L.TOLD, tl.atomic_or(report + L.LOST, lost) | lost)


@triton.jit
def open_step(live, step, L: tl.constexpr):
    """The step of this step's parity that is open on this rank, 0 if none is."""
    # Both are loaded: choosing first would cost a round trip.
    even, odd = tl.load(live + L.OPEN), tl.load(live + (L.OPEN + 1))
    return tl.where((step & 1) != 0, odd, even)


@triton.jit
def is_taken(live, step, block, L: tl.constexpr):
    """Does a step that is open on this rank still use what a new one is to use?

    step: the new one's number; block: int64, 0 or 1, where its received rows are to lie, those of masked steps in that
    of their parity. Open contiguous steps say in HELD where theirs lie.
    """
    odd = (step & 1) != 0
    even_step, odd_step = tl.load(live + L.OPEN), tl.load(live + (L.OPEN + 1))
    held, held_else = tl.load(live + L.HELD + block), tl.load(live + L.HELD + (1 - block))
    there = tl.where(block != 0, odd_step, even_step)
    masked = (there != 0) & (there != held_else)
    return (tl.where(odd, odd_step, even_step) != 0) | (held != 0) | masked


@triton.jit
def end_step(live, step, L: tl.constexpr):
    """The step is no longer open on this rank. Only for one program of a launch; only later launches look at it."""
    word = tl.arange(0, 4)  # OPEN and HELD
    tl.atomic_cas(live + L.OPEN + word, step + word * 0, (word * 0).to(tl.int64), sem="relaxed")


@triton.jit
def next_step(live, control, L: tl.constexpr):
    """What a dispatch begins with: (number of its step, ranks of its view, epoch of the view, ranks that were given up
    in that view). Written before this launch, and stable until its last program."""
    step = tl.load(live + L.LIVE_STEP) + 1
    begins = tl.load(control + L.NEXT_STEP)
    mask = tl.load(control + L.MASK)
    epoch = tl.load(control + L.EPOCH)
    next_mask = tl.load(control + L.NEXT_MASK)
    next_epoch = tl.load(control + L.NEXT_EPOCH)
    gone_even = tl.load(live + L.GIVEN_UP)
    gone_odd = tl.load(live + (L.GIVEN_UP + 1))
    view = tl.where(step >= begins, next_mask, mask)
    epoch = tl.where(step >= begins, next_epoch, epoch)
    return step, view, epoch, tl.where((epoch & 1) != 0, gone_odd, gone_even)


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
    value = _load_acquire_if(address.to(tl.pointer_type(tl.int64)), on)
    return lane_bits(on & (value == 2 * step + 1), lane)


@triton.jit
def _load_acquire_if(pointers, on):
    """Lanes that are not `on` load nothing, and have 0: a thousand that look at one word are in each other's way."""
    if PORTABLE:
        return tl.load(pointers, mask=on, other=0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.u64 $0, 0; @p ld.acquire.sys.global.u64 $0, [$1]; }",
            "=&l,l,r",
            [pointers, on.to(tl.int32)],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _pending(flags, source, on, deadline, step, R: tl.constexpr, LANES: tl.constexpr):
    """One look: sources with a flag that has not come, and _OVER as in `_poll`; equal in every thread."""
    is_deadline = tl.arange(0, LANES) == 2 * R
    before = now()
    where = tl.where(on, flags, deadline.to(tl.int64)).to(tl.pointer_type(tl.int64))
    value = _load_acquire_if(where, on | is_deadline)
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

    flags: int64 [LANES], addresses; source: int32 [LANES]; on: bool [LANES], of the first 2 * R lanes. leader: whether
    this program looks at `alive`; one of the launch does. The others are as for `wait`, whose budget and deadline this
    shares: it ends also for sources that say "excluded" in the phase's own flag. Programs may come to different ends;
    those for whom that matters use `wait`.
    """
    deadline = handle + (L.DEADLINE + PHASE)
    bits = _pending(flags, source, on, deadline, step, L.R, LANES)
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
                gone = bits & ~_uniform(alive + L.ALIVE, LANES)
                if gone != 0:
                    tl.atomic_min(deadline, now() + MARGIN_NS)
        polls += 1
        bits = _pending(flags, source, on, deadline, step, L.R, LANES)
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
