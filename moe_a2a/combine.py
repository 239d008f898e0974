"""The sums of combine: an expert rank's sums for the sources, and a source's sum over ranks and hosts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from moe_a2a.routing import Contribution, bags
from moe_a2a.rows import sum_rows
from moe_a2a.step import RowFormat, Step
from moe_a2a.transport.wire import FloatArray
from moe_a2a.unpack import pair_offsets


class RowPlaces(Protocol):
    """Where sums go and where rows are read: a transport's `Arena`, or the buffers of a baseline."""

    def partials(self, step: Step, source: int, rows: int) -> torch.Tensor:
        """Where the sums for `source` go: [rows, H]."""

    def table(self, row_format: RowFormat) -> torch.Tensor:
        """The table that contributions name rows of: [n, H]."""


def reduce_partials(
    places: RowPlaces, step: Step, y: torch.Tensor, weights: Mapping[int, FloatArray], sources: Collection[int]
) -> None:
    """Sum this rank's experts' rows for every token of `sources`, into the places that they are read from.

    y: the experts' output in the step's layout; weights: source rank -> fp32 [n, K], in the order of its arrival.
    """
    received, placement = step.received, step.placement
    assert received is not None
    rows = y.view(-1, y.shape[-1])
    bounds = pair_offsets(received)
    first = 0
    for arrival, meant in zip(step.arrivals, received.arrival_rows, strict=True):
        last = first + len(meant)
        if arrival.rank in sources and len(meant):
            out = places.partials(step, arrival.rank, len(meant))
            if placement is None:  # contiguous: the caller has summed over the experts
                out.copy_(rows[first:last])
            else:
                low, high = int(bounds[first]), int(bounds[last])
                pair_rows = meant[received.pair_row[low:high] - first]
                scale = np.ascontiguousarray(weights[arrival.rank][pair_rows, received.pair_k[low:high]])
                sum_rows(rows, placement.slot[low:high], bounds[first : last + 1] - low, out, scale)
        first = last


def sum_contributions(places: RowPlaces, contributions: Sequence[Contribution], out: torch.Tensor) -> None:
    """out[t] = the sum of the rows that came back for token t, in the order given. out: [T, H]."""
    index, offsets = bags(len(out), contributions)
    sum_rows(places.table(RowFormat.PLAIN), index, offsets, out)
