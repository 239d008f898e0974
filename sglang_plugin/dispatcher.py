"""`MooncakeDispatcher`: what SGLang builds, once for each MoE layer and micro-batch, in place of its
`MooncakeEPDispatcher`. Decode steps are in `decode`, prefill steps in `prefill`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.layers.dp_attention import get_is_extend_in_batch
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPPDispatchHooks, _deepep_precompile_tp_barrier
from sglang.srt.layers.moe.utils import DeepEPMode, is_tbo_enabled

from moe_a2a.errors import ConfigError, HandleError
from moe_a2a.sglang_plugin import buffers, limits
from moe_a2a.sglang_plugin.buffers import Sizes
from moe_a2a.sglang_plugin.decode import Decode
from moe_a2a.sglang_plugin.phase import Place
from moe_a2a.sglang_plugin.prefill import Prefill

_made = itertools.count()


@dataclass
class _Step:
    """The step that is open. phase: what made it, as the mode can change meanwhile. stage: the last call."""

    phase: Decode | Prefill
    open: Any
    stage: str


class MooncakeDispatcher(BaseDispatcher):  # type: ignore[misc]  # SGLang has no types
    """Dispatch and combine of one MoE layer. Arguments as SGLang gives them; `permute_fusion`, `params_dtype`,
    `async_finish` and `return_recv_hook` mean nothing here.

    group: the TP group of devices, whose ranks hold the experts. router_topk: choices of a token. num_experts: of all
    ranks, redundant and fused shared ones included. deepep_mode: auto takes decode steps in low_latency and others in
    normal. Calls come in the order dispatch, combine, or dispatch_a, dispatch_b, combine_a, combine_b.
    Raises ConfigError.
    """

    #: For runners of AMD GPUs.
    expert_mask_gpu: torch.Tensor | None = None

    def __init__(
        self,
        group: dist.ProcessGroup,
        router_topk: int,
        permute_fusion: bool = False,
        num_experts: int | None = None,
        num_local_experts: int | None = None,
        hidden_size: int | None = None,
        params_dtype: torch.dtype | None = None,
        deepep_mode: Any = DeepEPMode.AUTO,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        runner_backend: Any = None,
    ) -> None:
        super().__init__()
        if num_experts is None or num_local_experts is None or hidden_size is None:
            raise ConfigError(
                f"num_experts={num_experts}, num_local_experts={num_local_experts}, hidden_size={hidden_size}: "
                "SGLang's layers give all three"
            )
        channels = len(limits.current().channels)
        if is_tbo_enabled() and channels < 2:
            raise ConfigError(
                "--enable-two-batch-overlap keeps two micro-batches in flight, and the limits of this process name "
                f"{channels} channel: they must be set from the flags that the server runs with"
            )
        # SGLang builds the dispatchers of a layer's micro-batches one after the other, so theirs differ.
        place = Place(group, Sizes(num_experts, hidden_size, router_topk), num_local_experts, next(_made) % channels)
        self.deepep_mode, self._place, self._ready = deepep_mode, place, False
        self._decode, self._prefill = Decode(place, runner_backend), Prefill(place, runner_backend)
        self._step: _Step | None = None
        self._hooks = DeepEPPDispatchHooks()

    # dispatch

    def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> Any:
        """Returns a DeepEPLLDispatchOutput or DeepEPNormalDispatchOutput."""
        if self._hooks.hook_dict:
            self.dispatch_a(hidden_states, topk_output)
            self._hooks(self)
            return self.dispatch_b()
        phase = self._begin(hidden_states.device)
        step, output = phase.dispatch(hidden_states, topk_output)
        self._step = _Step(phase, step, "dispatch_b")
        return output

    def dispatch_a(self, hidden_states: torch.Tensor, topk_output: Any) -> None:
        phase = self._begin(hidden_states.device)
        self._step = _Step(phase, phase.dispatch_a(hidden_states, topk_output), "dispatch_a")

    def dispatch_b(self) -> Any:
        """Returns a DeepEPLLDispatchOutput or DeepEPNormalDispatchOutput."""
        step = self._after("dispatch_a", "dispatch_b")
        return step.phase.dispatch_b(step.open)

    # combine

    def combine(self, combine_input: Any) -> torch.Tensor:
        """Returns bf16 [T, H]."""
        _deepep_precompile_tp_barrier()
        step = self._after("dispatch_b", "combine_b")
        if isinstance(step.phase, Decode):
            out = step.phase.combine(step.open, combine_input, self.overlap_args)
        else:
            out = step.phase.combine(step.open, combine_input)
        self._step = None
        return out

    def combine_a(self, combine_input: Any) -> None:
        _deepep_precompile_tp_barrier()
        step = self._after("dispatch_b", "combine_a")
        if isinstance(step.phase, Decode):
            step.phase.combine_a(step.open, combine_input, self.overlap_args)
        else:
            step.phase.combine_a(step.open, combine_input)

    def combine_b(self) -> torch.Tensor:
        """Returns bf16 [T, H]."""
        step = self._after("combine_a", "combine_b")
        if isinstance(step.phase, Decode):
            out = step.phase.combine_b(step.open, self.overlap_args)
        else:
            out = step.phase.combine_b(step.open)
        self._step = None
        return out

    # settings; set_overlap_args and clear_overlap_args are the base class's

    def set_quant_config(self, quant_config: dict[str, Any]) -> None:
        super().set_quant_config(quant_config)
        self._decode.rows.set_quant_config(quant_config)
        self._prefill.rows.set_quant_config(quant_config)

    def register_deepep_dispatch_hook(self, hook: Any) -> Any:
        """`hook(dispatcher)` is called in `dispatch`, between its halves (single-batch overlap). Returns a handle with
        `remove`."""
        return self._hooks.register_hook(hook)

    # helpers

    def _begin(self, device: torch.device) -> Decode | Prefill:
        if self._step is not None:
            raise HandleError(f"a dispatch began after {self._step.stage}, and its step has not been combined")
        # While DeepGEMM compiles, ranks are minutes apart; SGLang lets them meet here.
        _deepep_precompile_tp_barrier()
        if not self._ready:
            self._make_buffers(device)
        mode = self.deepep_mode.resolve(get_is_extend_in_batch())
        return self._prefill if mode == DeepEPMode.NORMAL else self._decode

    def _make_buffers(self, device: torch.device) -> None:
        """Those of both phases, at the first dispatch of either: what does not fit fails while the server starts."""
        group, sizes = self._place.group, self._place.sizes
        if self.deepep_mode.enable_low_latency():
            buffers.for_decode(group, sizes, device)
        if self.deepep_mode.enable_normal():
            buffers.for_prefill(group, sizes, device)
        self._ready = True

    def _after(self, last: str, now: str) -> _Step:
        step = self._step
        if step is None or step.stage != last:
            raise HandleError(f"{now} comes after {last}, and the last call was {step.stage if step else 'a combine'}")
        step.stage = now
        return step
