"""Where DeepEP's normal mode reaches into the core: what it asks of a step that `AllToAll` does not offer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moe_a2a.all_to_all import AllToAll
from moe_a2a.compat.normal_tables import channel_tables, dispatch_layout
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


#: rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx, send_head.
Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def handle_tables(a2a: AllToAll, handle: Handle, hit: torch.Tensor, source: torch.Tensor, channels: int) -> Tables:
    """What the DeepEP handle of a received step holds. hit: is_token_in_rank; source: as in `Contiguous`."""
    if not isinstance(handle, ContiguousHandle):
        prefix, head = channel_tables(hit, channels)
        numbers = torch.fmod(source, a2a.config.max_tokens_per_rank)  # -1, no token's, stays
        return _rank_prefix(a2a, handle), prefix, torch.zeros_like(prefix), numbers, head
    from moe_a2a.kernels import normal_tables  # needs Triton

    backend: Any = a2a._backend
    rank = backend.rank
    region = rank._channels[rank._index(handle.channel)].region
    return normal_tables.handle_tables(rank.layout, hit, source, channels, region, handle.slot.handle)


def layout_of(topk_idx: torch.Tensor, ranks: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`normal_tables.dispatch_layout`, by a kernel on a GPU."""
    if topk_idx.device.type == "cpu":
        return dispatch_layout(topk_idx, ranks, experts)
    from moe_a2a.kernels import normal_tables  # needs Triton

    return normal_tables.dispatch_layout(topk_idx, ranks, experts)


def _rank_prefix(a2a: AllToAll, handle: Handle) -> torch.Tensor:
    """int32 [R, R], rows that ranks 0 to i send to rank j. -1 for ranks j of other hosts, of whose rows only those from
    this host are known here."""
    sent = [rank_hits(arrival.ids, a2a.local_experts, a2a.world_size).sum(0) for arrival in handle._step.arrivals]
    prefix = torch.from_numpy(np.cumsum(sent, axis=0)).to(torch.int32)
    for ranks in a2a.hosts:
        if a2a.rank not in ranks:
            prefix[:, list(ranks)] = -1
    return prefix
