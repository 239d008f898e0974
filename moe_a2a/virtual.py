"""Virtual ranks: a whole EP group in one process on one device, to try dispatch and combine without a second GPU.

group = VirtualGroup(config, ranks=4, device="cuda")
got = group.dispatch(x, topk_ids, topk_weights)                   # lists: one entry a rank
out = group.combine([experts(d.x, d.counts) for d in got], [d.handle for d in got])

The kernels, buffers and flags are those of real GPU ranks. What a rank waits for is launched before, on every rank and
on one stream, so that no wait lasts. With device="cpu" the kernels run in Triton's interpreter: slow, for tests and for
stepping through them in a debugger.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch

from moe_a2a.config import Config
from moe_a2a.errors import ConfigError, InputError
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.gpu.layout import Layout
from moe_a2a.gpu.lockstep import lockstep
from moe_a2a.step import Phase
from moe_a2a.types import Contiguous, Grouped, Handle, Masked

if TYPE_CHECKING:
    from moe_a2a.gpu.contiguous import ContiguousRank
    from moe_a2a.gpu.grouped import GroupedRank
    from moe_a2a.gpu.masked import MaskedRank

_INTERPRETER_PROGRAMS = 4  # of a contiguous launch
_INTERPRETER_PROCESSORS = 1  # "SMs" of the interpreter: programs that loop over items are fewer, and so launch faster


class VirtualGroup:
    """R ranks of one domain in one process.

    config: as for `AllToAll`. ranks: R. device: "cuda", "cuda:1", or "cpu" (Triton's interpreter; nothing may have
    imported Triton before, unless TRITON_INTERPRET=1 was set). timeout_s: budget of every wait; fp8_only: smaller
    buffers, for dispatches in FP8 only; num_sms, recv_capacity: see `Options`. `ranks` holds the ranks, to drive them
    one by one; `contiguous` and `grouped` what they do in steps of these layouts.

    Raises ConfigError.
    """

    def __init__(
        self,
        config: Config,
        ranks: int,
        device: str | torch.device = "cuda",
        *,
        timeout_s: float = 10.0,
        fp8_only: bool = False,
        num_sms: int = 24,
        recv_capacity: int | None = None,
    ) -> None:
        self.config, self.device = config, _device(device)
        self.layout = Layout.of(config, ranks, fp8_only, recv_capacity)
        self._regions = [
            torch.zeros(ranks, self.layout.region_bytes, dtype=torch.uint8, device=self.device) for _ in config.channels
        ]
        on_gpu = self.device.type == "cuda"
        processors = _INTERPRETER_PROCESSORS
        if on_gpu:
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        from moe_a2a.gpu.grouped import GroupedRank  # needs Triton, in the mode that _device has chosen
        from moe_a2a.gpu.masked import MaskedRank
        from moe_a2a.gpu.rounds import contiguous_rank

        words = torch.zeros(Layout.HOST_WORDS, dtype=torch.int64, pin_memory=on_gpu)
        #: int64 [1], a bit for each rank that lives; a wait ends at once if only ranks without their bit are missing.
        self.alive = words[Layout.ALIVE : Layout.ALIVE + 1].fill_((1 << ranks) - 1)
        #: int64 [1], the ranks that kernels of any rank have last found missing.
        self.told = words[Layout.TOLD : Layout.TOLD + 1]
        addresses = [[row.data_ptr() for row in region] for region in self._regions]
        self.ranks: list[MaskedRank] = [
            MaskedRank(
                config,
                self.layout,
                rank,
                [region[rank] for region in self._regions],
                addresses,
                words,
                processors,
                timeout_s,
            )
            for rank in range(ranks)
        ]
        self.contiguous: list[ContiguousRank] = [
            contiguous_rank(rank, num_sms if on_gpu else _INTERPRETER_PROGRAMS) for rank in self.ranks
        ]
        self.grouped: list[GroupedRank] = [GroupedRank(rank, processors) for rank in self.contiguous]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the communication buffers of one rank, all channels."""
        return self.layout.region_bytes * len(self.config.channels)

    @overload
    def dispatch(
        self,
        x: Sequence[torch.Tensor],
        topk_ids: Sequence[torch.Tensor],
        topk_weights: Sequence[torch.Tensor] | None = None,
        *,
        layout: Literal["masked"] = "masked",
        scales: Sequence[torch.Tensor] | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        out: Sequence[torch.Tensor] | None = None,
    ) -> list[Masked]: ...

    @overload
    def dispatch(
        self,
        x: Sequence[torch.Tensor],
        topk_ids: Sequence[torch.Tensor] | None = None,
        topk_weights: Sequence[torch.Tensor] | None = None,
        *,
        layout: Literal["contiguous"],
        scales: Sequence[torch.Tensor] | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        out: Sequence[torch.Tensor] | None = None,
        like: Sequence[Handle] | None = None,
        host_counts: bool = False,
    ) -> list[Contiguous]: ...

    def dispatch(
        self,
        x: Sequence[torch.Tensor],
        topk_ids: Sequence[torch.Tensor] | None = None,
        topk_weights: Sequence[torch.Tensor] | None = None,
        *,
        layout: Literal["masked", "contiguous"] = "masked",
        scales: Sequence[torch.Tensor] | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        out: Sequence[torch.Tensor] | None = None,
        like: Sequence[Handle] | None = None,
        host_counts: bool = False,
    ) -> list[Masked] | list[Contiguous]:
        """`AllToAll.dispatch` of every rank. Raises InputError, HandleError."""
        handles = self.dispatch_send(
            x, topk_ids, topk_weights, layout=layout, scales=scales, fp8=fp8, channel=channel, like=like
        )
        if layout == "masked":
            return self.dispatch_recv(handles, out=out)
        return self.contiguous_recv(handles, out=out, host_counts=host_counts)

    def dispatch_send(
        self,
        x: Sequence[torch.Tensor],
        topk_ids: Sequence[torch.Tensor] | None = None,
        topk_weights: Sequence[torch.Tensor] | None = None,
        *,
        layout: Literal["masked", "contiguous"] = "masked",
        scales: Sequence[torch.Tensor] | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        like: Sequence[Handle] | None = None,
    ) -> Sequence[Handle]:
        """The sending halves. Raises InputError, HandleError."""
        each = zip(
            self._all("x", x),
            self._each("topk_ids", topk_ids),
            self._each("topk_weights", topk_weights),
            self._each("scales", scales),
            self._each("like", like),
            strict=True,
        )
        with self._current():
            if layout == "masked":
                return [
                    rank.dispatch_send(rows, cast(torch.Tensor, ids), weights, scales=given, fp8=fp8, channel=channel)
                    for rank, (rows, ids, weights, given, _) in zip(self.ranks, each, strict=True)
                ]
            handles = [
                rank.dispatch_layout(rows, ids, weights, scales=given, fp8=fp8, channel=channel, like=earlier)
                for rank, (rows, ids, weights, given, earlier) in zip(self.contiguous, each, strict=True)
            ]
            for rank, handle in zip(self.contiguous, handles, strict=True):
                rank.dispatch_rows(handle)
        return handles

    def dispatch_recv(self, handles: Sequence[Handle], *, out: Sequence[torch.Tensor] | None = None) -> list[Masked]:
        """The receiving halves of a masked step. Raises InputError, HandleError."""
        outs = self._each("out", out)
        with self._current():
            return [r.dispatch_recv(h, out=o) for r, h, o in zip(self.ranks, handles, outs, strict=True)]

    def contiguous_recv(
        self, handles: Sequence[Handle], *, out: Sequence[torch.Tensor] | None = None, host_counts: bool = False
    ) -> list[Contiguous]:
        """The receiving halves of a contiguous step. Raises InputError, HandleError."""
        each = zip(self.contiguous, handles, self._each("out", out), strict=True)
        with self._current():
            return lockstep([rank.receiving(handle, out=o, host_counts=host_counts) for rank, handle, o in each])

    def grouped_recv(
        self,
        handles: Sequence[Handle],
        *,
        alignment: int = 128,
        out: Sequence[torch.Tensor] | None = None,
        host_counts: bool = False,
    ) -> list[Grouped]:
        """The receiving halves of a step that was sent as contiguous, for the grouped layout. Raises InputError,
        HandleError."""
        each = zip(self.grouped, handles, self._each("out", out), strict=True)
        how: dict[str, Any] = {"alignment": alignment, "host_counts": host_counts}
        with self._current():
            return lockstep([rank.receiving(handle, out=o, **how) for rank, handle, o in each])

    def combine(
        self,
        y: Sequence[torch.Tensor],
        handles: Sequence[Handle],
        topk_weights: Sequence[torch.Tensor] | None = None,
        *,
        out: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """`AllToAll.combine` of every rank. Raises InputError, HandleError."""
        from moe_a2a.gpu.contiguous_state import ContiguousHandle

        ys, outs = self._all("y", y), self._each("out", out)
        with self._current():
            if isinstance(handles[0], ContiguousHandle):
                return self._combine_contiguous(ys, handles, topk_weights, outs)
            if topk_weights is not None:
                for rank, handle, weights in zip(self.ranks, handles, topk_weights, strict=True):
                    rank.weights_push(handle, weights)
            for rank, handle, rows in zip(self.ranks, handles, ys, strict=True):
                rank.combine_send(rows, handle)
            return [r.combine_recv(h, out=o) for r, h, o in zip(self.ranks, handles, outs, strict=True)]

    def _combine_contiguous(
        self,
        ys: Sequence[torch.Tensor],
        handles: Sequence[Handle],
        topk_weights: Sequence[torch.Tensor] | None,
        outs: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        if topk_weights is not None:
            raise InputError("the contiguous layout combines rows that carry their weights; leave topk_weights out")
        ys = [rank.contiguous_rows(rows, handle) for rank, handle, rows in zip(self.grouped, handles, ys, strict=True)]
        each = zip(self.contiguous, ys, handles, outs, strict=True)
        return lockstep([rank.combining(rows, handle, out=o) for rank, rows, handle, o in each])

    def discard(self, handles: Sequence[Handle]) -> None:
        """`AllToAll.discard` of every rank: end a step without a combine. Raises HandleError."""
        from moe_a2a.gpu.contiguous_state import ContiguousHandle
        from moe_a2a.gpu.discard import discard_recv, discard_send

        with self._current():
            lockstep(
                [
                    one.receiving(handle)
                    for one, handle in zip(self.contiguous, handles, strict=True)
                    if isinstance(handle, ContiguousHandle) and handle.phase is Phase.SENT
                ]
            )
            for rank, handle in zip(self.ranks, handles, strict=True):
                discard_send(rank, handle)
            for rank, handle in zip(self.ranks, handles, strict=True):
                discard_recv(rank, handle)

    def check(self) -> None:
        """Raise what the kernels of any rank have reported: InputError, RankLost. Waits for the device."""
        for rank in self.ranks:
            rank.check()

    def _current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _all(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        if len(values) != len(self.ranks):
            raise InputError(f"{name} has {len(values)} entries; give one for each of the {len(self.ranks)} ranks")
        return values

    def _each(self, name: str, values: Sequence[Any] | None) -> Sequence[Any]:
        return [None] * len(self.ranks) if values is None else self._all(name, values)


def _device(device: str | torch.device) -> torch.device:
    """The device with its index; puts Triton into interpreter mode for a CPU."""
    chosen = torch.device(device)
    if chosen.type == "cpu":
        if "triton" not in sys.modules:
            os.environ["TRITON_INTERPRET"] = "1"
        try:
            import triton
        except ImportError as error:
            raise ConfigError(f"virtual ranks need Triton ({error}); pip install triton") from error
        if not triton.knobs.runtime.interpret:
            raise ConfigError(
                "device='cpu' runs the kernels in Triton's interpreter, but Triton was imported to compile; set "
                "TRITON_INTERPRET=1 before anything imports it"
            )
        return chosen
    if chosen.type != "cuda":
        raise ConfigError(f"device={str(device)!r}; allowed: 'cpu', 'cuda', 'cuda:0', ...")
    if torch.version.hip is not None:
        raise ConfigError("GPU ranks need an NVIDIA GPU: symmetric memory and FP8 here are CUDA's, not ROCm's")
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no GPU; use device='cpu' for Triton's interpreter")
    return chosen if chosen.index is not None else torch.device("cuda", torch.cuda.current_device())
