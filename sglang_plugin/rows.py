"""The form in which hidden states are dispatched: bf16, or FP8 and its scales. SGLang's own rules decide."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.moe.utils import DeepEPMode, DispatcherOutputDtype, get_deepep_output_dtype

from moe_a2a.errors import InputError
from moe_a2a.fp8 import ScaleFormat


class Rows:
    """The form of one dispatcher's rows in one phase.

    mode: DeepEPMode.LOW_LATENCY or NORMAL. runner_backend: as later releases of SGLang give it to dispatchers, or None.
    """

    def __init__(self, mode: Any, runner_backend: Any) -> None:
        # get_deepep_output_dtype reads these three; releases that do not know one of them leave it.
        self.dispatch_mode, self.runner_backend = mode, runner_backend
        self.quant_config: dict[str, Any] = {}
        self._known = False
        self._fp8: ScaleFormat | None = None

    def set_quant_config(self, quant_config: dict[str, Any]) -> None:
        """What the layer's quantisation method says of its inputs."""
        self.quant_config, self._known = quant_config, False

    @property
    def fp8(self) -> ScaleFormat | None:
        """The `fp8` argument of dispatches: None for bf16. Raises InputError for other forms."""
        if not self._known:
            self._fp8, self._known = self._choose(), True
        return self._fp8

    def _choose(self) -> ScaleFormat | None:
        wanted = get_deepep_output_dtype(self)
        if wanted == DispatcherOutputDtype.BF16:
            return None
        if wanted not in (DispatcherOutputDtype.FP8, DispatcherOutputDtype.INT8):  # GPUs: INT8 stands for FP8
            raise InputError(
                f"the MoE layers want hidden states as {wanted.value}, and --moe-a2a-backend mooncake sends bf16 and "
                "fp8: set --deepep-dispatcher-output-dtype bf16 or fp8, or choose another --moe-runner-backend"
            )
        jit = deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM
        if self.dispatch_mode == DeepEPMode.LOW_LATENCY:
            return "ue8m0" if jit and deep_gemm_wrapper.DEEPGEMM_BLACKWELL else "fp32"
        if not jit:  # the runners that are left quantise received rows themselves
            return None
        return "ue8m0" if deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0 else "fp32"
