"""CUDA streams beside the current one, so that communication runs beside a model's kernels.

GPU ranks only: on CPU ranks everything happens in order, and nothing here does anything.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


class Beside:
    """A stream for the work of one channel. The work waits for the current stream at `fork`, and the current stream for
    the work at `join`. Tensors that the work uses must be kept until then."""

    def __init__(self, device: torch.device, channel: int) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            key = (device, channel)
            if key not in _streams:
                _streams[key] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream = _streams[key]

    def fork(self) -> None:
        """The work from here on waits for what the current stream has so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def work(self) -> AbstractContextManager[object]:
        """Launches in this block go to the stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def join(self) -> None:
        """The current stream waits for the work so far."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
