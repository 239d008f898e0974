"""DeepEP's events: a point in a CUDA stream that another stream can wait for. CPU ranks have nothing to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class EventHandle:
    """The work that has been queued on the current stream so far. Without CUDA, nothing."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """Work queued on the current stream from now on starts after the event."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """DeepEP's wrapper of an event: `current_stream_wait`, or `with event: ...` to overlap and wait at the end.

    event: None for a call that was not asynchronous. extra_tensors: kept alive as long as this object is.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[torch.Tensor | None, ...] | None = None
    ) -> None:
        self.event, self.extra_tensors = event, extra_tensors
        self.hook_after_wait: Callable[[], object] | None = None
        self._release = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """The current stream waits for the event. release_handle: drop the event afterwards."""
        assert self.event is not None, "this call was not asynchronous: it gave no event (async_finish=False)"
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], object]) -> None:
        """Call a function after the next `current_stream_wait`."""
        assert self.hook_after_wait is None, "a hook is registered already"
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Set `release_handle` for the `with` that follows."""
        self._release = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release)
        self._release = False


class CommStream:
    """The stream of asynchronous calls, and what keeps it and the caller's stream in order.

    device: the rank's; on a CPU nothing here does anything.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        #: Was the work that this stream has ahead of the caller's queued in a graph capture? None: there is none.
        self._ahead: bool | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """Made when first asked for."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._stream

    @contextmanager
    def launching(self, asynchronous: bool) -> Iterator[None]:
        """Launches inside go to this stream if asynchronous, else to the caller's; after all that went before, on
        either: steps of a channel have one order."""
        if self._device.type == "cpu":
            yield
        elif asynchronous:
            self.stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self.stream):
                self._ahead = torch.cuda.is_current_stream_capturing()
                yield
        else:
            # Work outside a capture cannot be waited for inside it, and need not: a capture begins when it is done.
            if self._ahead is not None and self._ahead == torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream(self._device).wait_stream(self.stream)
            self._ahead = None
            yield

    @contextmanager
    def running(self, previous: EventOverlap | None, asynchronous: bool) -> Iterator[None]:
        """As DeepEP runs its normal mode: always on this stream, after `previous` if there is one, else after all that
        the caller's stream has; and unless asynchronous, the caller's stream waits for it."""
        if self._device.type == "cpu":
            yield
            return
        caller = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self.stream):
            if previous is not None and previous.event is not None:
                previous.event.current_stream_wait()
            else:
                self.stream.wait_stream(caller)
            yield
        if not asynchronous:
            caller.wait_stream(self.stream)

    def ran(
        self, asynchronous: bool, given: tuple[torch.Tensor | None, ...], made: tuple[torch.Tensor | None, ...]
    ) -> EventOverlap:
        """The event of a call that was `running`. given: the caller's tensors that its launches read; made: tensors
        allocated there that the caller gets."""
        if self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            caller = torch.cuda.current_stream(self._device)
            for tensor in made:
                if tensor is not None:
                    tensor.record_stream(caller)
        return self.finished(asynchronous, given)

    def finished(self, asynchronous: bool, tensors: tuple[torch.Tensor | None, ...]) -> EventOverlap:
        """The event of a call. tensors: what its launches read or write."""
        if not asynchronous:
            return EventOverlap()
        if self._device.type == "cpu":
            return EventOverlap(EventHandle(), tensors)
        with torch.cuda.stream(self.stream):
            event = EventHandle()
            # Inside a capture memory belongs to the graph, and keeping the tensors alive is all that can be done.
            if not torch.cuda.is_current_stream_capturing():
                for tensor in tensors:
                    if tensor is not None:
                        tensor.record_stream(self.stream)
        return EventOverlap(event, tensors)

    def later(self, call: Callable[[], None]) -> Callable[[], None]:
        """A hook: `call` on the stream that is the caller's now, whenever it is made."""
        if self._device.type == "cpu":
            return call
        stream = torch.cuda.current_stream(self._device)

        def hook() -> None:
            if torch.cuda.current_stream(self._device) == stream:
                call()
            else:
                with torch.cuda.stream(stream):
                    call()

        return hook
