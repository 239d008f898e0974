"""DeepEP's normal mode on `AllToAll`: which object serves a call, and which step a handle means.

An `AllToAll` has fixed sizes, so there is one for each hidden size, number of experts and top-k, built with all ranks
at the first dispatch of that kind. How many tokens it takes follows from the bytes that the program gave its Buffer.

A DeepEP handle is a routing that may be used as often as one likes; here a step begins with a dispatch and ends with a
combine. So a handle has at most one open step: a dispatch opens one, which a combine ends. A combine of a handle that
has none first opens one, by sending rows that nobody reads. A step that is left behind is discarded when its buffers
are needed: by all ranks, since all make the same calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from moe_a2a import config as core
from moe_a2a.all_to_all import AllToAll
from moe_a2a.compat.arguments import capturing, check
from moe_a2a.compat.events import CommStream, EventOverlap
from moe_a2a.compat.normal_config import bytes_for, tokens_in
from moe_a2a.compat.normal_rows import Got, Rows, cut, nothing, result_of
from moe_a2a.compat.normal_steps import Routed, Steps, mark, marked
from moe_a2a.compat.normal_tables import ids_for
from moe_a2a.compat.ties import expect_rows, handle_tables, receive, use_sms
from moe_a2a.errors import ConfigError, HandleError, InputError
from moe_a2a.types import Contiguous

#: What DeepEP's handle holds: rank_prefix_matrix int32 [R, R], channel_prefix_matrix and recv_channel_prefix_matrix
#: int32 [R, C], recv_src_idx int32 [N], is_token_in_rank bool [T, R], send_head int32 [T, R].
NormalHandle = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
#: Columns of the rows in which combine sends router weights.
_WEIGHTS = core.GROUP


@dataclass(frozen=True)
class How:
    """How a call runs: on how many SMs, after what, and whether the caller's stream waits for it."""

    num_sms: int
    previous: EventOverlap | None
    asynchronous: bool


class Normal:
    """The normal-mode half of one `Buffer`. name: differs between the Buffers of a group, and is equal on all ranks.
    nbytes, max_tokens: what the program said about sizes."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        options: core.Options,
        name: str,
        comm: CommStream,
        nbytes: int,
        max_tokens: int | None,
    ) -> None:
        self._group, self._device, self._options, self._name = group, device, options, name
        self._comm, self._nbytes, self._max_tokens = comm, nbytes, max_tokens
        self._all: dict[tuple[int, int, int], Steps] = {}

    # dispatch

    def dispatch(
        self,
        rows: Rows,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        hit: torch.Tensor,
        experts: int,
        alignment: int,
        most: int | None,
        how: How,
    ) -> tuple[Got, NormalHandle, EventOverlap]:
        """See `NormalCalls.dispatch`. hit: is_token_in_rank; most: num_worst_tokens; None: wait for the counts."""
        x = rows.x
        if capturing(self._device) and most is None:
            raise InputError(
                "a dispatch that waits for counts cannot be captured in a CUDA graph; give num_worst_tokens"
            )
        steps = self._steps(x.shape[1], experts, topk_idx.shape[1])
        a2a = steps.a2a
        self._check_tokens(a2a, len(x))
        capacity = a2a.world_size * a2a.config.max_tokens_per_rank
        if most is not None and most > capacity:
            raise InputError(
                f"num_worst_tokens={most}, but no more than {capacity} tokens can arrive, as each rank may bring "
                f"{a2a.config.max_tokens_per_rank}; give at most that, or a larger num_nvl_bytes"
            )
        with self._comm.running(how.previous, how.asynchronous):
            steps.make_room(None)
            use_sms(a2a, how.num_sms)
            scales, form = rows.scales_for_core()
            sent = a2a.dispatch_send(x, topk_idx, topk_weights, layout="contiguous", scales=scales, fp8=form)
            got = receive(a2a, sent, x.dtype, most)
            kept = bool(x.requires_grad or topk_weights.requires_grad)
            result = result_of(got, most, alignment, kept)
            ranks, sent_by, unused, source, head = handle_tables(
                a2a, sent, hit, cut(got.source, most, -1), how.num_sms // 2
            )
            handle = (ranks, sent_by, unused, source, hit, head)
            routed = Routed(steps, len(x), len(source))
            mark(source, routed)
            expect_rows(sent, routed.rows)
            steps.begun(sent, routed, kept)
        given = (x, rows.scales, topk_idx, topk_weights, hit)
        made = (ranks, sent_by, unused, source, head, *result.own)
        return result, handle, self._comm.ran(how.asynchronous, given, made)

    def again(self, rows: Rows, handle: NormalHandle, how: How) -> tuple[Got, EventOverlap]:
        """A dispatch that follows a handle's routing."""
        routed, hit = self._find(handle)
        a2a, x = routed.steps.a2a, rows.x
        if x.shape != (routed.tokens, a2a.config.hidden_size):
            raise InputError(
                f"x has shape {list(x.shape)}; the handle's dispatch had [{routed.tokens}, {a2a.config.hidden_size}]"
            )
        kept = bool(x.requires_grad)
        with self._comm.running(how.previous, how.asynchronous):
            result = result_of(self._open(routed, rows, hit, how, kept), routed.rows, 1, kept)
        return result, self._comm.ran(how.asynchronous, (x, rows.scales, hit), result.own)

    def _open(self, routed: Routed, rows: Rows, hit: torch.Tensor, how: How, kept: bool) -> Contiguous:
        """A step of a routing that is known, without tables."""
        steps, a2a = routed.steps, routed.steps.a2a
        steps.make_room(routed.step)
        use_sms(a2a, how.num_sms)
        ids = ids_for(hit, a2a.local_experts, a2a.config.top_k)
        scales, form = rows.scales_for_core()
        sent = a2a.dispatch_send(rows.x, ids, layout="contiguous", scales=scales, fp8=form)
        got = receive(a2a, sent, rows.x.dtype, routed.rows)
        expect_rows(sent, routed.rows)
        steps.begun(sent, routed, kept)
        return got

    # combine

    def combine(
        self,
        x: torch.Tensor,
        handle: NormalHandle,
        topk_weights: torch.Tensor | None,
        bias: Sequence[torch.Tensor],
        how: How,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """See `NormalCalls.combine`."""
        routed, hit = self._find(handle)
        steps, a2a = routed.steps, routed.steps.a2a
        hidden, device = a2a.config.hidden_size, self._device
        check("x", x, (routed.rows, hidden), torch.bfloat16, device)
        for tensor in bias:
            check("bias", tensor, (routed.tokens, hidden), torch.bfloat16, device)
        if topk_weights is not None:
            width = topk_weights.shape[-1] if isinstance(topk_weights, torch.Tensor) and topk_weights.dim() else 0
            if width > _WEIGHTS:
                raise InputError(f"topk_weights has {width} columns; allowed are up to {_WEIGHTS}")
            check("topk_weights", topk_weights, (routed.rows, width), torch.float32, device)
            self._build_weights(steps)
        if routed.step is not None:
            steps.check_side(routed.step)
        elif routed.overwritten:
            raise HandleError(
                "two other dispatches came between this handle's dispatch and its combine, and have overwritten what "
                "it received: combine before the next dispatch but one, or dispatch again with handle="
            )
        with self._comm.running(how.previous, how.asynchronous):
            if routed.step is None:
                self._open(routed, nothing(routed.tokens, hidden, device), hit, how, False)
            assert routed.step is not None
            use_sms(a2a, how.num_sms)
            out = a2a.combine(x, routed.step.handle)
            steps.ended(routed.step)
            for tensor in bias:
                out += tensor.detach()
            sums = None if topk_weights is None else self._combine_weights(routed, topk_weights, hit, how)
        given = (x, topk_weights, hit, *bias)
        return out, sums, self._comm.ran(how.asynchronous, given, (out, sums))

    def _combine_weights(self, routed: Routed, topk_weights: torch.Tensor, hit: torch.Tensor, how: How) -> torch.Tensor:
        """Sums over ranks, [T, columns]: a step of short fp32 rows, whose way there carries nothing."""
        a2a = routed.steps.weights
        assert a2a is not None
        use_sms(a2a, how.num_sms)
        ids = ids_for(hit, a2a.local_experts, a2a.config.top_k)
        sent = a2a.dispatch_send(topk_weights.new_zeros(routed.tokens, _WEIGHTS), ids, layout="contiguous")
        receive(a2a, sent, torch.float32, routed.rows)
        expect_rows(sent, routed.rows)
        width = topk_weights.shape[1]
        rows = topk_weights.new_zeros(routed.rows, _WEIGHTS)
        rows[:, :width] = topk_weights.detach()
        return a2a.combine(rows, sent)[:, :width].contiguous()

    def _build_weights(self, steps: Steps) -> None:
        if steps.weights is None:
            name = f"{steps.name}.weights"
            sizes = replace(steps.a2a.config, hidden_size=_WEIGHTS, dtype=torch.float32, channels=(name,))
            steps.weights = self._build(sizes, replace(self._options, fp8_only=False))

    # helpers

    def _find(self, handle: NormalHandle) -> tuple[Routed, torch.Tensor]:
        """What a handle stands for, and where its tokens go."""
        if not isinstance(handle, (tuple, list)) or len(handle) != 6:
            raise HandleError("handle is not the tuple of six that dispatch returned")
        routed = marked(handle[3])
        if routed is None or routed.steps not in self._all.values():
            raise HandleError(
                "recv_src_idx of this handle is no tensor that a dispatch of this Buffer returned; a handle may be "
                "taken apart and put together again, but not from copies"
            )
        return routed, check(
            "is_token_in_rank", handle[4], (routed.tokens, self._group.size()), torch.bool, self._device
        )

    def _steps(self, hidden: int, experts: int, top_k: int) -> Steps:
        key = (hidden, experts, top_k)
        found = self._all.get(key)
        if found is None:
            name = f"{self._name}.normal.{len(self._all)}"
            sizes = core.Config(experts, hidden, top_k, self._tokens(key), channels=(name,))
            found = self._all[key] = Steps(self._build(sizes, self._options), name)
        return found

    def _build(self, sizes: core.Config, options: core.Options) -> AllToAll:
        if capturing(self._device):
            raise HandleError(
                "the first call of these sizes builds its buffers with all ranks, and cannot be captured: make one "
                "before the capture"
            )
        return AllToAll(sizes, self._group, device=self._device, options=options)

    def _tokens(self, sizes: tuple[int, int, int]) -> int:
        """The most tokens that a rank may bring. Raises ConfigError."""
        if self._max_tokens is not None:
            return self._max_tokens
        tokens = tokens_in(self._nbytes, sizes, self._group.size(), self._options.fp8_only)
        if not tokens:
            raise ConfigError(
                f"num_nvl_bytes={self._nbytes} holds no token of normal mode; give what "
                "Config.get_nvl_buffer_size_hint says, or max_tokens_per_rank"
            )
        return tokens

    def _check_tokens(self, a2a: AllToAll, tokens: int) -> None:
        sizes = a2a.config
        if tokens > sizes.max_tokens_per_rank:
            key = (sizes.hidden_size, sizes.num_experts, sizes.top_k)
            needed = bytes_for(tokens, key, a2a.world_size, self._options.fp8_only)
            raise InputError(
                f"this dispatch brings {tokens} tokens, and the buffers take {sizes.max_tokens_per_rank}: make the "
                f"Buffer with num_nvl_bytes={needed} or more (now {self._nbytes}), or with "
                f"max_tokens_per_rank={tokens}, on all ranks"
            )

    def close(self) -> None:
        """Not collective."""
        for steps in self._all.values():
            steps.a2a.close()
            if steps.weights is not None:
                steps.weights.close()
        self._all.clear()
