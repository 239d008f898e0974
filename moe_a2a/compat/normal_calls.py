"""The calls of DeepEP's normal mode, as `moe_a2a.compat.deep_ep.Buffer` has them: signatures, checks of arguments."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist

from moe_a2a.compat.arguments import check
from moe_a2a.compat.events import CommStream, EventOverlap
from moe_a2a.compat.normal import How, Normal, NormalHandle
from moe_a2a.compat.normal_config import Config
from moe_a2a.compat.normal_rows import Rows
from moe_a2a.compat.ties import layout_of
from moe_a2a.config import GROUP
from moe_a2a.errors import HandleError, InputError
from moe_a2a.fp8 import FP8

#: bf16 [T, H], or float8_e4m3fn [T, H] with scales, fp32 [T, H/128] or int32 [T, ceil(H/512)].
Payload = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class NormalCalls:
    """What `Buffer` inherits. num_sms: SMs of calls that are given no config."""

    num_sms: int = 20
    group: dist.ProcessGroup
    group_size: int
    device: torch.device
    _comm: CommStream
    _normal: Normal | None

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Where the tokens of this rank go. Not collective.

        topk_idx: int64 [T, K], -1 for no expert.
        previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.

        Returns (num_tokens_per_rank int32 [R], None, num_tokens_per_expert int32 [E], is_token_in_rank bool [T, R],
        event). Raises InputError.
        """
        self._normal_mode()
        how = self._how(None, previous_event, async_finish, allocate_on_comm_stream)
        if num_experts < 1 or num_experts % self.group_size:
            raise InputError(f"num_experts={num_experts} does not divide by {self.group_size} ranks")
        ids = _matrix("topk_idx", topk_idx, torch.int64, self.device)
        with self._comm.running(how.previous, async_finish):
            per_rank, per_expert, hit = layout_of(ids, self.group_size, num_experts)
        event = self._comm.ran(async_finish, (ids,), (per_rank, per_expert, hit))
        return per_rank, None, per_expert, hit, event

    def dispatch(
        self,
        x: Payload,
        handle: NormalHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None, list[int] | None, NormalHandle | None, EventOverlap]:
        """Send every token once to each rank that has one of its experts. Collective, and builds buffers at the first
        call of a size.

        x: bf16 [T, H], or float8_e4m3fn [T, H] with scales, fp32 [T, H/128] or int32 [T, ceil(H/512)]; H a multiple of
            128. T may differ on every rank and at every call, up to what the buffers take.
        handle: follow the routing of an earlier dispatch; all arguments from here to topk_weights are then left out.
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: what `get_dispatch_layout` returned. Their shapes
            are looked at; their values follow from topk_idx, but that is_token_in_rank becomes part of the handle.
        topk_idx, topk_weights: int64 and fp32 [T, K]; -1 for no expert, none twice in a token.
        expert_alignment: the counts in the list are rounded up to it.
        num_worst_tokens: return so many rows, which must suffice, and wait for no counts; for CUDA graphs. Up to R
            times the most tokens that a rank may bring.
        config: says on how many SMs the call runs; None: `Buffer.num_sms`.
        previous_event: start after it; None: after all that the current stream has. async_finish: do not let the
            current stream wait; the event says when it may. allocate_on_comm_stream: always so here; needs both.

        Returns (recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event):
        recv_x: rows of the kind of x, [N, H], in (source rank, token) order, with scales [N, ...] if x had them.
        recv_topk_idx: int64 [N, K], local expert ids, -1 for experts of other ranks. recv_topk_weights: fp32 [N, K], 0
            for those.
        num_recv_tokens_per_expert_list: E_l ints; empty with num_worst_tokens.
        handle: (rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx, is_token_in_rank,
            send_head); docs/deep_ep.md says what they hold.
        With num_worst_tokens N is that, and rows behind those that came have ids -1. With a handle everything between
        recv_x and event is None.
        Results are valid until the next dispatch but one of these sizes; for ever if x or topk_weights requires grad.

        Raises InputError, ConfigError, HandleError, RankLost.
        """
        mode = self._normal_mode()
        how = self._how(config, previous_event, async_finish, allocate_on_comm_stream)
        rows = self._rows(x)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise InputError("a dispatch with handle= follows its routing; leave topk_idx and topk_weights out")
            got, event = mode.again(rows, handle, how)
            return _payload(got.x, got.scales), None, None, None, None, event
        if topk_idx is None or topk_weights is None:
            raise InputError(
                "topk_idx and topk_weights are both needed: a dispatch by is_token_in_rank alone is not served"
            )
        ids = _matrix("topk_idx", topk_idx, torch.int64, self.device)
        weights = check("topk_weights", topk_weights, tuple(ids.shape), torch.float32, self.device)
        hit = check("is_token_in_rank", is_token_in_rank, (len(ids), self.group_size), torch.bool, self.device)
        check("num_tokens_per_rank", num_tokens_per_rank, (self.group_size,), torch.int32, self.device)
        if not isinstance(num_tokens_per_expert, torch.Tensor) or num_tokens_per_expert.dim() != 1:
            raise InputError("num_tokens_per_expert is missing; give the int32 [num_experts] of get_dispatch_layout")
        experts = len(num_tokens_per_expert)
        check("num_tokens_per_expert", num_tokens_per_expert, (experts,), torch.int32, self.device)
        if len(ids) != len(rows.x):
            raise InputError(f"x has {len(rows.x)} tokens and topk_idx {len(ids)}; give as many")
        if expert_alignment < 1 or num_worst_tokens < 0:
            raise InputError(
                f"expert_alignment={expert_alignment}, num_worst_tokens={num_worst_tokens}; give at least 1 and 0"
            )
        most = num_worst_tokens or None
        result, made, event = mode.dispatch(rows, ids, weights, hit, experts, expert_alignment, most, how)
        received = _payload(result.x, result.scales)
        return received, result.topk_idx, result.topk_weights, result.counts, made, event

    def combine(
        self,
        x: torch.Tensor,
        handle: NormalHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Add up what the ranks have for each token, without weights. Collective; ends the step.

        x: bf16 [N, H], a row for each received one, weights applied. handle: that of the dispatch; a tuple built anew
            from its parts will do.
        topk_weights: fp32 [N, columns], up to 128 of them, added up over the ranks of a token likewise.
        bias: one or two bf16 [T, H], added to the sums after these are rounded.
        config, previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.

        Returns (combined_x bf16 [T, H], combined topk_weights fp32 [T, columns] or None, event). A token without
        experts gives zeros. Raises InputError, HandleError, RankLost.
        """
        mode = self._normal_mode()
        how = self._how(config, previous_event, async_finish, allocate_on_comm_stream)
        biases = (bias,) if isinstance(bias, torch.Tensor) else tuple(bias or ())
        return mode.combine(x, handle, topk_weights, biases, how)

    def internode_dispatch(self, *_: object, **__: object) -> NoReturn:
        """Not served: `dispatch` is the call for users. Raises InputError."""
        raise InputError("internode_dispatch is not served; call dispatch, for the ranks of one host")

    def internode_combine(self, *_: object, **__: object) -> NoReturn:
        """Not served: `combine` is the call for users. Raises InputError."""
        raise InputError("internode_combine is not served; call combine, for the ranks of one host")

    # helpers

    def _normal_mode(self) -> Normal:
        if self._normal is None:
            raise HandleError("this Buffer is destroyed; make a new one")
        return self._normal

    def _how(self, config: Config | None, previous: EventOverlap | None, asynchronous: bool, on_comm: bool) -> How:
        if on_comm and not (asynchronous and previous is not None):
            raise InputError("allocate_on_comm_stream=True goes with previous_event= and async_finish=True")
        num_sms = self.num_sms if config is None else config.num_sms
        if num_sms < 2 or num_sms % 2:
            raise InputError(f"num_sms={num_sms}; give an even number, 2 or more")
        return How(num_sms, previous, asynchronous)

    def _rows(self, x: Payload) -> Rows:
        if isinstance(x, tuple):
            if len(x) != 2:
                raise InputError(f"x is a tuple of {len(x)}; give a tensor, or (FP8 rows, scales)")
            rows = _matrix("x[0]", x[0], FP8, self.device)
            columns = rows.shape[1] // GROUP
            scales = x[1]
            packed = isinstance(scales, torch.Tensor) and scales.dtype == torch.int32
            shape = (len(rows), -(-columns // 4) if packed else columns)
            if not isinstance(scales, torch.Tensor) or scales.device != self.device or tuple(scales.shape) != shape:
                raise InputError(f"x[1] does not fit x[0]; give scales {list(shape)} on {self.device}")
            if not packed and scales.dtype != torch.float32:
                raise InputError(f"x[1] has dtype {scales.dtype}; give torch.float32, or torch.int32 for UE8M0")
            return Rows(rows, scales)
        return Rows(_matrix("x", x, torch.bfloat16, self.device), None)


def _matrix(name: str, value: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor with two dimensions. Raises InputError."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        raise InputError(f"{name} is not a tensor with two dimensions")
    return check(name, value, tuple(value.shape), dtype, device)


def _payload(x: torch.Tensor, scales: torch.Tensor | None) -> Payload:
    return x if scales is None else (x, scales)
