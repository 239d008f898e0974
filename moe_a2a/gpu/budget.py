"""How long kernels wait for other ranks: longer while those may be compiling the kernels that are waited for."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from moe_a2a.gpu.handle import GpuHandle
from moe_a2a.types import Handle

#: Added to the budget of a step whose kernels are new here: the other ranks compile theirs at about the same time.
_COMPILE_S = 120.0


class Budget:
    """The word of `control` that says it. word: int64 [] on the device, written on the stream of the steps."""

    def __init__(self, word: torch.Tensor, timeout_s: float) -> None:
        self._word, self._timeout_s = word, timeout_s
        self._compiled: set[Hashable] = set()
        self._compiling: GpuHandle | None = None

    def before_launch(self, handle: GpuHandle, kind: Hashable) -> None:
        """A step is about to launch a kernel. kind: what tells compiled kernels apart."""
        if kind not in self._compiled and not torch.cuda.is_current_stream_capturing():
            self._compiled.add(kind)
            self._compiling = handle
            self._set(self._timeout_s + _COMPILE_S)

    def ended(self, handle: Handle) -> None:
        """A step has made its last launch."""
        if handle is self._compiling:
            self._compiling = None
            self._set(self._timeout_s)

    def _set(self, seconds: float) -> None:
        self._word.fill_(int(seconds * 1e9))
