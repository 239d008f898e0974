"""Moving and summing rows of a table: the permute and unpermute of CPU ranks.

Both run at the speed of memory. Sums use torch's `embedding_bag`, whose CPU kernels gather, scale and add in fp32
registers and round once; a gather, a cast and an `index_add_` would cross memory some ten times and round each
partial sum.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_a2a.transport.wire import FloatArray, LongArray

#: Bytes of output summed at a time: small enough to be copied out of the cache.
_CHUNK_BYTES = 1 << 20


def gather(table: torch.Tensor, index: LongArray, out: torch.Tensor) -> None:
    """out[i] = table[index[i]]. table: [n, H]; index: int64 [m]; out: [m, H], contiguous."""
    torch.index_select(table, 0, torch.from_numpy(index), out=out)


def gather_segments(
    table: torch.Tensor, index: LongArray, counts: LongArray, starts: LongArray, out: torch.Tensor
) -> None:
    """Segment e of `index` (counts[e] entries, one after another) goes to the rows of `out` from starts[e] on. Other
    rows of
    `out` are not touched. table: [n, H]; out: [m, H], contiguous."""
    indices = torch.from_numpy(index)
    if len(index) * table.shape[1] * table.element_size() <= _CHUNK_BYTES:
        # A few rows for many segments: two calls through the cache cost less than one call a segment.
        within = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        target = torch.from_numpy(within + np.repeat(starts[: len(counts)], counts))
        out.index_copy_(0, target, torch.index_select(table, 0, indices))
        return
    at = 0
    for start, count in zip(starts.tolist(), counts.tolist(), strict=False):
        if count:
            torch.index_select(table, 0, indices[at : at + count], out=out[start : start + count])
            at += count


def _split(weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 weights as the sum of two numbers of `dtype`: 16 mantissa bits for bf16, 22 for fp16."""
    high = weights.to(dtype)
    return high, (weights - high.float()).to(dtype)


def sum_rows(
    table: torch.Tensor, index: LongArray, offsets: LongArray, out: torch.Tensor, weights: FloatArray | None = None
) -> None:
    """out[i] = sum over j in offsets[i] .. offsets[i+1] of weights[j] * table[index[j]], in that order, fp32
    accumulation.

    table: [n, H] bf16, fp16 or fp32; index: int64 [p]; offsets: int64 [m + 1]; out: [m, H], the table's dtype;
    weights: fp32 [p] or None for ones. An empty sum is zero. The kernels take weights of the table's dtype only, so
    that bf16 and fp16 rows are added twice, with the two halves of their fp32 weight (`_split`): the second read comes
    from cache. They round bf16 ties away from zero; and an infinite row with a weight that needs no second half gives
    NaN.
    """
    indices = torch.from_numpy(index)
    scale: torch.Tensor | None = None
    copies = 1
    if weights is not None:
        scale = torch.from_numpy(weights)
        if table.dtype != torch.float32:
            copies = 2
            scale = torch.stack(_split(scale, table.dtype), dim=1).reshape(-1)
            indices = indices.repeat_interleave(2)
    bounds = offsets * copies
    rows = len(offsets) - 1
    chunk = max(16, _CHUNK_BYTES // max(1, out.shape[1] * out.element_size()))
    for first in range(0, rows, chunk):
        last = min(rows, first + chunk)
        low, high = int(bounds[first]), int(bounds[last])
        if low == high:
            out[first:last].zero_()
            continue
        starts = torch.from_numpy(np.ascontiguousarray(bounds[first:last] - low))
        summed = torch.embedding_bag(
            table,
            indices[low:high],
            starts,
            False,
            0,
            False,
            None if scale is None else scale[low:high],
        )[0]
        out[first:last].copy_(summed)
