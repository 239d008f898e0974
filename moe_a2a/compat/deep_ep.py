"""DeepEP's `Buffer` over moe-a2a: `from moe_a2a.compat.deep_ep import Buffer, EventOverlap` in place of `deep_ep`.

Signatures, layouts, dtypes and handle tuples are those of DeepEP 1.2.1 (`deep_ep.Buffer`); docs/deep_ep.md says what
differs. All work is done by `moe_a2a.AllToAll`. The calls of the normal mode are in `normal_calls`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moe_a2a import config as core
from moe_a2a.compat.arguments import check
from moe_a2a.compat.events import CommStream
from moe_a2a.compat.events import EventHandle as EventHandle
from moe_a2a.compat.events import EventOverlap as EventOverlap
from moe_a2a.compat.low_latency import Hook, LowLatency, LowLatencyHandle
from moe_a2a.compat.normal import Normal
from moe_a2a.compat.normal_calls import NormalCalls
from moe_a2a.compat.normal_config import Config as Config
from moe_a2a.config import MAX_TOP_K, Options
from moe_a2a.errors import ConfigError, HandleError, InputError
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.layout import Layout

#: dtype of `topk_idx`.
topk_idx_t = torch.int64

#: Buffers made so far on each group: their names must differ, and be equal on all ranks.
_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class Buffer(NormalCalls):
    """DeepEP's communication buffer.

    group: the EP group; used to build the real buffers, at the first dispatch of each set of sizes, and not by steps.
    num_nvl_bytes: of normal-mode buffers, for each set of sizes: says how many tokens a rank may bring to a dispatch;
    `Config.get_nvl_buffer_size_hint` says how many bytes 4096 tokens take. Equal on all ranks.
    low_latency_mode: must be True for the low_latency calls. explicitly_destroy: `destroy()` is then allowed; without
    it memory is released with the object. enable_shrink: in low-latency mode ranks may be masked, and a missing one
    masks itself.
    device: this rank's, a GPU or "cpu"; None: the current GPU if there is one, else the CPU. options: moe-a2a's own.
    max_tokens_per_rank: ours: the most tokens that a rank may bring to a normal dispatch, whatever num_nvl_bytes says.
    Stored and otherwise without meaning here, as nothing goes through NVSHMEM, and low-latency buffers are as large as
    their first dispatch needs: num_rdma_bytes, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl,
    use_fabric. comm: mpi4py communicators are refused.

    Attributes: group, rank, group_size, num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy,
    enable_shrink, device.

    Not collective; the first dispatch is. Raises ConfigError.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool | None = None,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object = None,
        *,
        device: str | torch.device | None = None,
        options: Options | None = None,
        max_tokens_per_rank: int | None = None,
    ) -> None:
        if group is None:
            given = "an mpi4py communicator cannot be used here" if comm is not None else "group is None"
            raise ConfigError(f"{given}; give a torch.distributed process group")
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.num_qps_per_rank, self.allow_mnnvl, self.use_fabric = num_qps_per_rank, allow_mnnvl, use_fabric
        self.allow_nvlink_for_low_latency_mode = allow_nvlink_for_low_latency_mode
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.enable_shrink = enable_shrink
        self.device = _device(device)
        if enable_shrink and self.device.type == "cpu":
            raise ConfigError("enable_shrink=True needs GPU ranks: a missing CPU rank ends the group with a RankLost")
        number = _made.get(group, 0)
        _made[group] = number + 1
        name, options, self._comm = f"deep_ep-{number}", options or Options(), CommStream(self.device)
        self._low_latency: LowLatency | None = LowLatency(group, self.device, options, name, enable_shrink, self._comm)
        self._normal = Normal(group, self.device, options, name, self._comm, num_nvl_bytes, max_tokens_per_rank)

    def destroy(self) -> None:
        """Release memory and threads. Only with explicitly_destroy=True, as in DeepEP. Not collective."""
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        for mode in (self._low_latency, self._normal):
            if mode is not None:
                mode.close()
        self._low_latency = self._normal = None

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Do FP8 dispatches exist? Always: kernels are compiled when they first run."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set `Buffer.num_sms`: how many SMs normal-mode calls use that are given no config. Low-latency kernels do not
        look at it."""
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A config of `Buffer.num_sms` SMs, whatever the number of ranks."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """As `get_dispatch_config`."""
        return Config(Buffer.num_sms)

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream of normal-mode calls, and of others with async_finish=True. GPU ranks only: raises ConfigError."""
        if self.device.type == "cpu":
            raise ConfigError("this Buffer is a CPU rank's, and has no streams")
        self._normal_mode()
        return self._comm.stream

    # low latency

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of communication buffer that a GPU rank will make for these sizes, for the largest top-k: an upper
        bound, within 2 % for hidden >= 4096. Raises ConfigError."""
        top_k = min(MAX_TOP_K, num_experts)
        sizes = core.Config(num_experts, hidden, top_k, num_max_dispatch_tokens_per_rank)
        granule = 2 << 20
        return -(-Layout.of(sizes, num_ranks).region_bytes // granule) * granule

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Does nothing: a flag of these buffers carries its step's number, and none needs to be zero."""
        self._mode()

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        x_global_scale: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        use_nvfp4: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send every token to the ranks of its experts. Collective, and builds buffers at the first call of a size.

        x: bf16 [T, hidden], T <= num_max_dispatch_tokens_per_rank (M), hidden a multiple of 128.
        topk_idx: int64 [T, K], -1 for no expert, none twice in a token.
        cumulative_local_expert_recv_stats: int32 [E_l], to which the received counts are added.
        dispatch_wait_recv_cost_stats: int64 [R], to which the nanoseconds waited for each rank are added.
        use_fp8, round_scale, use_ue8m0: rows travel as float8_e4m3fn with a scale for 128 columns; scales are powers of
            two; scales are handed out as packed exponents (needs round_scale).
        async_finish: launch on the communication stream; the event says when it is done.
        return_recv_hook: launch the sending half only; the hook launches the receiving half.

        Returns (recv_x, recv_count, handle, event, hook):
        recv_x: bf16 [E_l, R*M, hidden], or with use_fp8 (float8_e4m3fn [E_l, R*M, hidden], scales); scales are fp32
            [E_l, R*M, hidden/128] or int32 [E_l, R*M, ceil(hidden/512)], column-major in the last two dimensions.
        recv_count: int32 [E_l]; the first recv_count[e] rows of expert e hold tokens, in (source rank, token) order.
        handle: (src_info int32 [E_l, R*M], token number of each row on its rank; layout_range int64 [E_l, R], first row
            << 32 | number of rows of each source rank; M; hidden; num_experts).
        Valid until the next dispatch of the same sizes but one.

        Raises InputError (also for use_nvfp4 and x_global_scale, which are not served), ConfigError, HandleError,
        RankLost.
        """
        mode = self._mode()
        if use_nvfp4 or x_global_scale is not None:
            raise InputError("use_nvfp4 and x_global_scale are not served; use use_fp8=True, or neither for bf16")
        form: ScaleFormat | None = None
        if use_fp8:
            if use_ue8m0 and not round_scale:
                raise InputError("use_ue8m0=True holds powers of two only; give round_scale=True with it")
            form = "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32"
        if isinstance(x, torch.Tensor) and x.dtype != torch.bfloat16:
            raise InputError(f"x has dtype {x.dtype}; give torch.bfloat16 (use_fp8=True quantises it)")
        if isinstance(topk_idx, torch.Tensor) and topk_idx.dtype != topk_idx_t:
            raise InputError(f"topk_idx has dtype {topk_idx.dtype}; give {topk_idx_t} (topk_idx.long())")
        return mode.dispatch(
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats,
            form,
            async_finish,
            return_recv_hook,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
        overlap: bool = False,
        src_signals: torch.Tensor | None = None,
        src_signal_expect_value: int = 0,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Send the experts' outputs back and add them up with the router's weights. Collective; ends the step.

        x: bf16 [E_l, R*M, hidden]. topk_idx, topk_weights: int64 and fp32 [T, K]; the ids are those of the dispatch.
        handle: the dispatch's; a tuple built anew from its parts will do.
        use_logfmt: accepted; rows travel as bf16, which is more exact than the format that this asks for.
        zero_copy: read the buffer of `get_next_low_latency_combine_buffer(handle)` in place of x.
        out: bf16 [T, hidden] for the result. combine_wait_recv_cost_stats: int64 [R], as in dispatch.
        async_finish, return_recv_hook: as in dispatch.

        Returns (combined_x bf16 [T, hidden], event, hook). Raises InputError (also for overlap and src_signals, which
        are not served), HandleError, RankLost.
        """
        mode = self._mode()
        if overlap or src_signals is not None:
            raise InputError("overlap and src_signals are not served; call combine when the experts' rows are queued")
        return mode.combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            zero_copy,
            async_finish,
            return_recv_hook,
            out,
            combine_wait_recv_cost_stats,
        )

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """bf16 [E_l, R*M, hidden] to be filled for a combine of this handle with zero_copy=True. Made when first asked
        for, one for each of the two steps that may be open. Raises HandleError."""
        return self._mode().combine_buffer(handle)

    # masked ranks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """From its next step on, this rank neither sends to a masked rank nor waits for it. Needs enable_shrink=True.
        Raises InputError, HandleError."""
        mode = self._mode()
        if not 0 <= rank_to_mask < self.group_size or rank_to_mask == self.rank:
            raise InputError(f"rank_to_mask={rank_to_mask}; give another rank of 0 to {self.group_size - 1}")
        mode.mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Fill int32 [R]: 1 for each rank that is masked, or was missing from a step. Does not wait for the device.
        Raises InputError, HandleError."""
        words = self._mode().mask_words()
        check("mask_status", mask_status, (self.group_size,), torch.int32, self.device).copy_(words)

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask every rank whose process lives. Raises HandleError."""
        self._mode().clean_mask()

    # helpers

    def _mode(self) -> LowLatency:
        if self._low_latency is None:
            raise HandleError("this Buffer is destroyed; make a new one")
        if not self.low_latency_mode:
            raise HandleError("this Buffer was made with low_latency_mode=False; give low_latency_mode=True")
        return self._low_latency


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen
