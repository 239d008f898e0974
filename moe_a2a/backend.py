"""What stands behind `AllToAll`: one rank's dispatch and combine on one kind of device."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

import torch

from moe_a2a.errors import HandleError, MoeA2AError
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.types import Dispatched, Handle, Layout, Masked


class Backend(Protocol):
    """`cpu_backend.CpuBackend` and `gpu.backend.GpuBackend`. Arguments and errors are those of `AllToAll`'s methods.

    device: with an index for CUDA. hosts: the ranks of each host. buffer_bytes: of this rank's communication buffers.
    resources: everything that outlives a call, closed when the AllToAll is closed, dropped, or the process ends.
    """

    device: torch.device
    buffer_bytes: int
    resources: ExitStack

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]: ...

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
        layout: Layout,
        like: Handle | None,
        alignment: int,
        out: torch.Tensor | None,
        host_counts: bool,
        by_source: bool,
    ) -> Dispatched:
        """Both halves. What can be refused is refused before anything is sent: a layout, an `out`."""

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        fp8: ScaleFormat | None,
        channel: str | None,
        layout: Layout | None,
        like: Handle | None,
    ) -> Handle: ...

    def reserve(self, handle: Handle, by_source: bool, out: torch.Tensor | None) -> Masked: ...

    def dispatch_recv(
        self, handle: Handle, layout: Layout | None, alignment: int, out: torch.Tensor | None, host_counts: bool
    ) -> Dispatched: ...

    def combine(
        self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Both halves. A wrong `out` is refused before anything is sent."""

    def combine_send(self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None) -> None: ...

    def combine_recv(self, handle: Handle, out: torch.Tensor | None) -> torch.Tensor: ...

    def add_wait_times(self, handle: Handle, into: torch.Tensor) -> None: ...

    def discard(self, handle: Handle) -> None: ...

    def missing(self, handle: Handle) -> list[int]: ...

    def check(self) -> None: ...

    def poll(self) -> None: ...

    def close(self) -> None:
        """Refuse every later call. `resources` are closed apart from this."""


class Health:
    """Whether a backend can still be used. broken: the error that ended it."""

    def __init__(self) -> None:
        self.closed = False
        self.broken: BaseException | None = None

    def check_open(self) -> None:
        """Raises HandleError."""
        if self.closed:
            raise HandleError("this AllToAll is closed; build a new one")

    def check(self) -> None:
        """Raises what `refusal` gives; HandleError after `close`."""
        self.check_open()
        if self.broken is not None:
            raise self.refusal(self.broken)

    def refusal(self, broken: BaseException) -> MoeA2AError:
        """What later calls raise."""
        return HandleError(
            f"this AllToAll failed and cannot be used further ({broken}); close it and build a new group"
        )
