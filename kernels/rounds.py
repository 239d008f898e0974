"""What the kernels of contiguous steps in several rounds have in common: the flags of rounds, and where they begin.

A round takes W tokens of each rank, in their order, so that all ranks send in all rounds, and nobody more than W rows
to anyone. Rows lie in the places of their source, W for each, until the receiver has moved them and says so.

Flags
    A step's first round is announced in the phases of other steps, DISPATCH and COMBINE: it is where ranks meet that
    end a step in different ways. Later rounds have ROUND, "the rows are there", and each but the last has DRAINED, "the
    rows have been taken away". They are 2 * step + excluded as all flags are, and each turn has its own: turns are the
    rounds of dispatch, and on from ROUNDS those of combine. With one flag for all turns a rank that has given up, and
    goes on without waiting, could write over a flag that not all programs of another rank have seen.

    DEADLINE and VERDICT of the two phases are 0 again when a launch that has waited ends: every wait has a budget and a
    vote of its own.

Who is left out
    As in one round, dispatch needs everybody: a rank that misses anyone stops sending, hands out no rows, and says
    "excluded" in all its flags, which ends everybody else's waits. In combine a rank that is missing or excluded in one
    round is left out of those that follow.

Rounds in which nobody has tokens (FILLED in the handle and later) neither wait nor send nor announce anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_a2a.kernels.signals import raise_flags


@triton.jit
def flags_of(block, turn, L: tl.constexpr):
    """What stands for `block` where a turn's flags of the phases ROUND and DRAINED are meant: for `wait` and
    `announce`."""
    return block + turn * (16 * L.R)


@triton.jit
def bounds_of(block, turn, L: tl.constexpr):
    """Rows that have come from each source before a round of dispatch, and those of the round: int32 [R_PAD] each.

    block: int64 address of this rank's block of the step's parity. Within M and W, whatever a damaged peer wrote.
    """
    s = tl.arange(0, L.R_PAD)
    at = (block + L.bounds).to(tl.pointer_type(tl.int32)) + s * (L.ROUNDS + 1) + turn
    before = tl.load(at, mask=s < L.R, other=0)
    behind = tl.load(at + 1, mask=s < L.R, other=0)
    before = tl.minimum(tl.maximum(before, 0), L.M)
    return before, tl.minimum(tl.maximum(behind - before, 0), L.W)


@triton.jit
def forget_wait(handle, PHASE: tl.constexpr, L: tl.constexpr):
    """The next launch waits in this phase anew. Only for the last program of a launch."""
    none = tl.full([], 0, tl.int64)
    tl.store(handle + (L.DEADLINE + PHASE), none)
    tl.store(handle + (L.VERDICT + PHASE), none)


@triton.jit
def announce(bases, block, PHASE: tl.constexpr, rank, step, excluded, mask, L: tl.constexpr):
    """Raise this rank's flag of a phase on every rank in `mask`. bases, excluded: [R_PAD], excluded 0 or 1; block: of
    the step's parity, from a region's start. Only for the last program of a launch."""
    value = 2 * step + excluded.to(tl.int64)
    raise_flags(bases, block + L.flags + PHASE * L.R * 8, rank, value, mask, L)
