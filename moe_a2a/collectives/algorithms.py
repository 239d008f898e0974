"""The collectives, as rounds of `Call` among the ranks of a roll.

Every one is a function that yields while it waits. Pieces that belong to slots without a rank are neither sent nor
written. Results are the same on all ranks, because sums go in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from moe_a2a.collectives.board import Steps
from moe_a2a.collectives.reductions import reduce
from moe_a2a.collectives.rounds import MOST_ROUNDS, Call
from moe_a2a.collectives.signature import Reduction
from moe_a2a.errors import InputError

#: Up to so many bytes every rank adds up everything by itself, which saves one exchange.
SMALL_BYTES = 16 << 10
_ALIGN = 64

Pieces = Mapping[int, torch.Tensor]


def rounds(total: int, each: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of every round. Their number is odd, so that the next operation takes turns with the last round, as
    every round does with the one before."""
    count = max(1, -(-total // each))
    count += 1 - count % 2
    if count > MOST_ROUNDS:
        raise InputError(f"{total} bytes or elements take {count} rounds; allowed are {MOST_ROUNDS}: raise chunk_bytes")
    for k in range(count):
        yield min(k * each, total), min((k + 1) * each, total)


def _shares(count: int, ranks: Sequence[int], itemsize: int) -> dict[int, tuple[int, int]]:
    """rank -> (begin, end) of its share of `count` elements, whole cache lines but for the last."""
    unit = max(1, _ALIGN // itemsize)
    each = -(-count // (len(ranks) * unit)) * unit
    return {rank: (min(i * each, count), min((i + 1) * each, count)) for i, rank in enumerate(ranks)}


def _quota(call: Call, itemsize: int = 1) -> int:
    """Elements that a round can bring to each rank."""
    lines = call.layout.chunk // len(call.ranks) // _ALIGN
    return lines * _ALIGN // itemsize


def barrier(call: Call) -> Steps:
    yield from call.meet()


def all_reduce(call: Call, tensor: torch.Tensor, kind: Reduction) -> Steps:
    """tensor: [n] contiguous, input and output."""
    dtype, size = tensor.dtype, tensor.dtype.itemsize
    for begin, end in rounds(len(tensor), call.layout.chunk // size):
        part = tensor[begin:end]
        if part.nbytes <= SMALL_BYTES or not call.others:
            yield from _all_reduce_small(call, part, kind)
            continue
        shares = _shares(len(part), call.ranks, size)

        def fill(part: torch.Tensor = part) -> None:
            call.part(call.me, call.first, len(part), dtype).copy_(part)

        yield from call.meet(fill, {rank: (a * size, (b - a) * size) for rank, (a, b) in shares.items()})
        a, b = shares[call.me]
        own = call.part(call.me, call.second + a * size, b - a, dtype)
        if b > a:
            reduce(kind, [call.part(rank, call.first + a * size, b - a, dtype) for rank in call.ranks], own)
        call.confirm()
        yield from call.show(dict.fromkeys(call.others, (a * size, (b - a) * size)))
        yield from call.see()
        for rank, (a, b) in shares.items():
            part[a:b].copy_(call.part(rank, call.second + a * size, b - a, dtype))
        call.confirm(second=True)


def _all_reduce_small(call: Call, part: torch.Tensor, kind: Reduction) -> Steps:
    count, dtype = len(part), part.dtype

    def fill() -> None:
        call.part(call.me, call.first, count, dtype).copy_(part)

    yield from call.meet(fill, dict.fromkeys(call.others, (0, part.nbytes)))
    if count:
        reduce(kind, [call.part(rank, call.first, count, dtype) for rank in call.ranks], part)
    call.confirm()


def reduce_to(call: Call, tensor: torch.Tensor, kind: Reduction, root: int) -> Steps:
    """tensor: [n] contiguous, input, and output of the root."""
    yield from call.need(root)
    size = tensor.dtype.itemsize
    for begin, end in rounds(len(tensor), call.layout.chunk // size):
        part = tensor[begin:end]

        def fill(part: torch.Tensor = part) -> None:
            call.part(call.me, call.first, len(part), part.dtype).copy_(part)

        yield from call.meet(fill, {root: (0, part.nbytes)})
        if call.me == root and len(part):
            reduce(kind, [call.part(rank, call.first, len(part), part.dtype) for rank in call.ranks], part)
            call.confirm()


def broadcast(call: Call, data: torch.Tensor, root: int) -> Steps:
    """data: [nbytes] uint8, input of the root, output of the others."""
    yield from call.need(root)
    for begin, end in rounds(len(data), call.layout.chunk):
        part = data[begin:end]

        def fill(part: torch.Tensor = part) -> None:
            call.part(call.me, call.first, len(part), torch.uint8).copy_(part)

        mine = call.me == root
        yield from call.meet(fill if mine else None, {rank: (0, len(part)) for rank in call.others} if mine else {})
        if not mine:
            part.copy_(call.part(root, call.first, len(part), torch.uint8))
            call.confirm()


def all_gather(call: Call, data: torch.Tensor, pieces: Pieces, readers: Sequence[int] | None = None) -> Steps:
    """data: [nbytes] uint8, this rank's piece. pieces: rank -> [nbytes] uint8, where that rank's piece goes. readers:
    the ranks that have pieces (None: all)."""
    for rank in readers or ():
        yield from call.need(rank)
    reading = call.ranks if readers is None else readers
    for begin, end in rounds(len(data), call.layout.chunk):
        part = data[begin:end]

        def fill(part: torch.Tensor = part) -> None:
            call.part(call.me, call.first, len(part), torch.uint8).copy_(part)

        yield from call.meet(fill, {rank: (0, len(part)) for rank in reading})
        if call.me in reading and len(part):
            for rank in call.ranks:
                if rank in pieces:
                    theirs = call.part(rank, call.first, len(part), torch.uint8)
                    pieces[rank][begin:end].copy_(theirs if rank != call.me else part)
            call.confirm()


def scatter(call: Call, out: torch.Tensor, pieces: Pieces, root: int) -> Steps:
    """out: [nbytes] uint8. pieces: of the root, rank -> [nbytes] uint8."""
    yield from call.need(root)
    if call.me == root:
        call.need_pieces(pieces)
    each = _quota(call)
    place = {rank: i * each for i, rank in enumerate(call.ranks)}
    for begin, end in rounds(len(out), each):

        def fill(begin: int = begin, end: int = end) -> None:
            for rank in call.ranks:
                part = pieces[rank][begin:end]
                call.part(call.me, call.first + place[rank], len(part), torch.uint8).copy_(part)

        mine = call.me == root
        away = {rank: (place[rank], end - begin) for rank in call.others} if mine else {}
        yield from call.meet(fill if mine else None, away)
        out[begin:end].copy_(call.part(root, call.first + place[call.me], end - begin, torch.uint8))
        call.confirm()


def reduce_scatter(call: Call, out: torch.Tensor, pieces: Pieces, kind: Reduction) -> Steps:
    """out: [n]. pieces: rank -> [n]."""
    call.need_pieces(pieces)
    dtype, size = out.dtype, out.dtype.itemsize
    each = _quota(call, size)
    place = {rank: i * each * size for i, rank in enumerate(call.ranks)}
    for begin, end in rounds(len(out), each):

        def fill(begin: int = begin, end: int = end) -> None:
            for rank in call.others:
                call.part(call.me, call.first + place[rank], end - begin, dtype).copy_(pieces[rank][begin:end])

        yield from call.meet(fill, {rank: (place[rank], (end - begin) * size) for rank in call.others})
        if end > begin:
            at, own = call.first + place[call.me], pieces[call.me][begin:end]
            theirs = {rank: call.part(rank, at, end - begin, dtype) for rank in call.others}
            reduce(kind, [theirs.get(rank, own) for rank in call.ranks], out[begin:end])
        call.confirm()


def all_to_all(call: Call, out: Pieces, pieces: Pieces, nbytes: int) -> Steps:
    """out, pieces: rank -> [nbytes] uint8, equal for all."""
    call.need_pieces(pieces)
    call.need_pieces(out)
    yield from _exchange(call, out, pieces, rounds(nbytes, _quota(call)))


def all_to_all_split(call: Call, out: Pieces, pieces: Pieces, row_bytes: int) -> Steps:
    """out, pieces: rank -> [its rows * row_bytes] uint8. All ranks tell each other their rows first."""
    call.need_pieces(pieces)
    call.need_pieces(out)
    slots = call.layout.slots

    def fill() -> None:
        table = call.part(call.me, call.first, 2 * slots, torch.int64).zero_()
        for rank in call.ranks:
            table[rank] = len(pieces[rank])
            table[slots + rank] = len(out[rank])

    yield from call.meet(fill, dict.fromkeys(call.others, (0, 2 * slots * 8)))
    tables = {rank: call.part(rank, call.first, 2 * slots, torch.int64).tolist() for rank in call.ranks}
    call.confirm()
    for source in call.ranks:
        for target in call.ranks:
            sent, wanted = tables[source][target], tables[target][slots + source]
            if sent != wanted:
                raise InputError(
                    f"all_to_all: rank {source} sends {sent // max(1, row_bytes)} rows to rank {target}, which expects "
                    f"{wanted // max(1, row_bytes)}; output_split_sizes are what the others have as input_split_sizes"
                )
    longest = max(tables[source][target] for source in call.ranks for target in call.ranks)
    bounds = list(rounds(longest, _quota(call)))
    # One round is over: an even number has to follow.
    yield from _exchange(call, out, pieces, iter([*bounds, (longest, longest)]))


def _exchange(call: Call, out: Pieces, pieces: Pieces, bounds: Iterator[tuple[int, int]]) -> Steps:
    each = _quota(call)
    place = {rank: i * each for i, rank in enumerate(call.ranks)}
    for begin, end in bounds:
        parts = {rank: pieces[rank][begin:end] for rank in call.ranks}

        def fill(parts: dict[int, torch.Tensor] = parts) -> None:
            for rank, part in parts.items():
                if rank != call.me:
                    call.part(call.me, call.first + place[rank], len(part), torch.uint8).copy_(part)

        yield from call.meet(fill, {rank: (place[rank], len(parts[rank])) for rank in call.others})
        for rank in call.ranks:
            part = out[rank][begin:end]
            theirs = call.part(rank, call.first + place[call.me], len(part), torch.uint8)
            part.copy_(theirs if rank != call.me else parts[rank])
        call.confirm()
