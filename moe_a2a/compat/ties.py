"""Where DeepEP's normal mode reaches into the core: what it asks of a step that `AllToAll` does not offer."""

from __future__ import annotations

from typing import Any

import torch

from moe_a2a.all_to_all import AllToAll
from moe_a2a.gpu.contiguous_state import ContiguousHandle
from moe_a2a.routing import rank_hits
from moe_a2a.types import Handle


def use_sms(a2a: AllToAll, num_sms: int) -> None:
    """The most SMs that later launches of contiguous steps use. CPU ranks have none."""
    if a2a.device.type == "cuda":
        backend: Any = a2a._backend
        backend.contiguous.use_sms(num_sms)


def expect_rows(handle: Handle, rows: int) -> None:
    """From now on combine takes [rows, H] for this step: no fewer than were received."""
    if isinstance(handle, ContiguousHandle):
        handle.rows = rows
    else:
        handle._step.output_rows = rows


def rows_between(a2a: AllToAll, handle: Handle) -> torch.Tensor:
    """int32 [R, R], rows from each rank to each rank in a contiguous step. CPU ranks: once it is received; -1 between
    ranks of other hosts, of which only the tokens for this host are known here."""
    if isinstance(handle, ContiguousHandle):
        from moe_a2a.gpu.matrix import rows_between  # needs Triton

        backend: Any = a2a._backend
        return rows_between(backend.rank, handle)
    here = next(ranks for ranks in a2a.hosts if a2a.rank in ranks)
    matrix = torch.full((a2a.world_size, a2a.world_size), -1, dtype=torch.int32)
    for arrival in handle._step.arrivals:
        sent = torch.from_numpy(rank_hits(arrival.ids, a2a.local_experts, a2a.world_size).sum(0))
        known = slice(None) if arrival.rank in here else list(here)
        matrix[arrival.rank, known] = sent[known].to(torch.int32)
    return matrix
