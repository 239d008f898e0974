"""Launches of ranks that share a stream, made in turns.

A rank's launches are a generator. It yields where every rank has to get to before any of them goes on, because what
follows waits for what the others launch before.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Launches = Generator[None, None, T]


def lockstep(ranks: Sequence[Launches[T]]) -> list[T]:
    """Make the launches of all ranks. Returns what each of them returns."""
    results: dict[int, T] = {}
    while len(results) < len(ranks):
        for rank, launches in enumerate(ranks):
            if rank not in results:
                try:
                    next(launches)
                except StopIteration as end:
                    results[rank] = end.value
    return [results[rank] for rank in range(len(ranks))]


def alone(launches: Launches[T]) -> T:
    """Make the launches of a rank that has a stream of its own."""
    return lockstep([launches])[0]
