"""Where DeepEP's normal mode reaches into the core: what it asks of a step that `AllToAll` does not offer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moe_a2a.all_to_all import AllToAll
from moe_a2a.cpu_backend import CpuBackend
from moe_a2a.errors import InputError
from moe_a2a.gpu.contiguous_state import ContiguousHandle
from moe_a2a.routing import rank_hits
from moe_a2a.types import Contiguous, Handle


def use_sms(a2a: AllToAll, num_sms: int) -> None:
    """The most SMs that later launches of contiguous steps use. CPU ranks have none."""
    backend: Any = a2a._backend
    if not isinstance(backend, CpuBackend):
        backend.contiguous.use_sms(num_sms)


def receive(a2a: AllToAll, handle: Handle, dtype: torch.dtype, most: int | None) -> Contiguous:
    """Receive a step. most: return so many rows, up to R*M, that suffice; None: as many as come, whose number is waited
    for. dtype: of rows. GPU ranks find on the device that they do not suffice, and stop it, as there is no place for
    the others and nobody on the host to tell. Raises InputError on CPU ranks."""
    if most is None:
        got = a2a.dispatch_recv(handle, alignment=1, host_counts=True)
        assert isinstance(got, Contiguous)
        return got
    if isinstance(handle, ContiguousHandle):
        got = a2a.dispatch_recv(handle)
        assert isinstance(got, Contiguous)
        if most < len(got.x):
            torch._assert_async(got.tokens_per_rank.sum() <= most, "more tokens came than num_worst_tokens says")
        return got
    out = torch.empty((most, a2a.config.hidden_size), dtype=dtype)
    try:
        got = a2a.dispatch_recv(handle, out=out)
    except InputError as error:
        raise InputError(f"num_worst_tokens={most}, but more tokens came ({error})") from error
    assert isinstance(got, Contiguous)
    return replace(got, x=out)


def expect_rows(handle: Handle, rows: int) -> None:
    """From now on combine takes [rows, H] for this step: no fewer than were received."""
    if isinstance(handle, ContiguousHandle):
        handle.rows = rows
    else:
        handle._step.output_rows = rows


def rank_prefix(a2a: AllToAll, handle: Handle) -> torch.Tensor:
    """DeepEP's rank_prefix_matrix of a received step: int32 [R, R], rows that ranks 0 to i send to rank j. CPU ranks:
    -1 for ranks j of other hosts, of whose rows only those from this host are known here."""
    if isinstance(handle, ContiguousHandle):
        from moe_a2a.gpu.matrix import rows_between  # needs Triton

        backend: Any = a2a._backend
        return rows_between(backend.rank, handle).cumsum(0, dtype=torch.int32)
    sent = [rank_hits(arrival.ids, a2a.local_experts, a2a.world_size).sum(0) for arrival in handle._step.arrivals]
    prefix = torch.from_numpy(np.cumsum(sent, axis=0)).to(torch.int32)
    for ranks in a2a.hosts:
        if a2a.rank not in ranks:
            prefix[:, list(ranks)] = -1
    return prefix
