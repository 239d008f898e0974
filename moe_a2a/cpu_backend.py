"""Dispatch and combine of one CPU rank: rows move through shared memory and the Transfer Engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from moe_a2a import checks, outgoing
from moe_a2a.backend import Health
from moe_a2a.bootstrap import Bootstrap
from moe_a2a.combine import reduce_partials, sum_contributions
from moe_a2a.config import Config, Options
from moe_a2a.errors import ConfigError, HandleError, InputError, MoeA2AError, RankLost
from moe_a2a.fp8 import FP8, ScaleFormat
from moe_a2a.rendezvous import Meeting, meet
from moe_a2a.routing import Contribution, rank_hits, receive
from moe_a2a.step import Outgoing, Phase, Roll, Step
from moe_a2a.transport.protocol import SumOrder, Transport
from moe_a2a.transport.wait import wait_tasks
from moe_a2a.transport.wire import FloatArray, IntArray
from moe_a2a.types import Dispatched, Handle, Layout, Masked
from moe_a2a.unpack import Unpacker

_MOST_OPEN = 2  # one step for each parity of a channel's buffers
_LAST_WORDS_S = 1.0  # after a failure, for reports to other hosts that are under way
T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


class CpuBackend:
    """A `Backend` for CPU ranks. Construction is collective. Raises ConfigError, EngineError, RankLost."""

    def __init__(self, config: Config, options: Options, bootstrap: Bootstrap) -> None:
        self._prepare(config, options)
        meeting = meet(config, options, bootstrap)
        self.resources = meeting.resources
        self._start(meeting, bootstrap.rank, bootstrap.world_size)

    def _prepare(self, config: Config, options: Options) -> None:
        self.config, self.options, self.device = config, options, torch.device("cpu")
        self._health = Health()
        if options.fp8_only:
            raise ConfigError("fp8_only=True makes the buffers of GPU ranks smaller; leave it out on CPU ranks")
        if options.recv_capacity is not None:
            raise ConfigError(
                f"recv_capacity={options.recv_capacity} makes the buffers of GPU ranks smaller; leave it out on CPU "
                "ranks"
            )
        if options.num_sms is not None:
            raise ConfigError(f"num_sms={options.num_sms} is for GPU ranks; leave it out on CPU ranks")

    def _start(self, meeting: Meeting, rank: int, world_size: int) -> None:
        """world_size: the number of ranks that layouts have room for."""
        config = self.config
        self.rank, self.world_size, self._meeting = rank, world_size, meeting
        self._arena, self._transports = meeting.arena, meeting.transports
        self.local_experts = config.local_experts(world_size)
        self.buffer_bytes = self._arena.layout.nbytes
        self._unpacker = Unpacker(config, self.world_size, self.local_experts)
        self._number = [0] * len(config.channels)
        self._open: list[list[Step]] = [[] for _ in config.channels]

    # dispatch

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
        if out is not None:
            dtype = FP8 if fp8 is not None or (isinstance(x, torch.Tensor) and x.dtype == FP8) else self.config.dtype
            self._unpacker.check_out(layout, out, dtype)
        handle = self.dispatch_send(x, topk_ids, topk_weights, scales, fp8, channel, layout, like)
        if by_source:
            self.reserve(handle, True, out)
        try:
            return self.dispatch_recv(handle, layout, alignment, out, host_counts)
        except InputError as error:  # out is too small for what arrived: the step is open, and not to be lost
            error.handle = handle
            raise

    @torch.no_grad()
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
    ) -> Handle:
        self._health.check()
        index = self._channel(channel)
        tensor = checks.check_tokens(self.config, x, fp8)
        tokens = tensor.shape[0]
        if like is not None:
            ids, weights = self._known(like, index, topk_ids, topk_weights, tokens)
        else:
            ids = checks.check_ids(self.config, topk_ids, tokens)
            weights = None if topk_weights is None else checks.check_weights(self.config, topk_weights, tokens)
        rows, row_scales, fp8 = outgoing.encode(
            self.config, tensor, scales, fp8, torch.from_numpy((ids >= 0).any(axis=1))
        )
        if len(self._open[index]) >= _MOST_OPEN:
            raise HandleError(
                f"channel {self.config.channels[index]!r} has two open steps "
                f"({', '.join(str(s.number) for s in self._open[index])}); "
                "combine or discard one before dispatching again, or use another channel"
            )
        if any(s.number == self._number[index] - 1 for s in self._open[index]):
            raise HandleError(
                f"{self._open[index][0]} is still open, and its buffers are those of the next step; "
                "combine or discard it before dispatching again, or use another channel"
            )
        hits = rank_hits(ids, self.local_experts, self.world_size)
        roll = self._call_roll(index)
        self._number[index] += 1
        step = Step(
            index,
            self.config.channels[index],
            self._number[index],
            outgoing.row_format(fp8),
            Outgoing(rows, ids, weights, row_scales, hits),
            roll=roll,
        )
        self._open[index].append(step)
        self._begin(step)
        self._each(lambda transport: transport.send_dispatch(step))
        return Handle(self, step, fp8, layout)

    def reserve(self, handle: Handle, by_source: bool, out: torch.Tensor | None) -> Masked:
        step = self._step(handle, Phase.SENT)
        handle._reserved = self._unpacker.reserve(step, handle, handle._fp8, out, by_source)
        return handle._reserved

    @torch.no_grad()
    def dispatch_recv(
        self, handle: Handle, layout: Layout | None, alignment: int, out: torch.Tensor | None, host_counts: bool
    ) -> Dispatched:
        step = self._step(handle, Phase.SENT)
        layout = layout or handle._layout or "masked"
        if not step.arrivals:
            self._receive(step)
        first = self.rank * self.local_experts
        received = receive(step.arrivals, first, self.local_experts, self.config.top_k)
        table = self._arena.table(step.row_format)
        result: Dispatched
        if layout == "masked":
            result = handle._reserved or self._unpacker.reserve(step, handle, handle._fp8, out, False)
            handle._reserved = None  # the result holds its handle: not a circle that keeps both alive
            self._unpacker.masked(step, received, table, result)
        elif layout == "contiguous":
            result = self._unpacker.contiguous(step, received, table, handle, handle._fp8, out)
            if host_counts:
                result = replace(result, counts_list=checks.padded(result.counts.tolist(), alignment))
        else:
            result = self._unpacker.grouped(step, received, table, handle, handle._fp8, out, alignment)
        step.received, step.layout, step.phase = received, layout, Phase.RECEIVED
        return result

    # combine

    def combine(
        self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        if out is not None:
            self._check_sums(handle, out)
        self.combine_send(y, handle, topk_weights)
        return self.combine_recv(handle, out)

    def _check_sums(self, handle: Handle, out: torch.Tensor) -> None:
        step = self._step(handle, Phase.RECEIVED, Phase.COMBINING)
        checks.check_matrix("out", out, (step.tokens, self.config.hidden_size), (self.config.dtype,))

    @torch.no_grad()
    def combine_send(self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None) -> None:
        step = self._step(handle, Phase.RECEIVED)
        assert step.received is not None
        checks.check_matrix("y", y, self._expected_output(step), (self.config.dtype,))
        weights = outgoing.late_weights(self.config, step, topk_weights)
        step.phase = Phase.COMBINING
        self._begin_sums(step)
        if weights is not None:
            self._each(lambda transport: transport.send_weights(step, weights))
            arrived = _merged(self._each(lambda transport: transport.recv_weights(step)))
        elif step.has_weights:
            arrived = {a.rank: a.weights for a in step.arrivals if a.weights is not None}
        else:
            arrived = {}

        def reduce_and_send(transport: Transport) -> None:
            reduce_partials(self._arena, step, y, arrived, self._summed(step, transport, arrived))
            transport.send_combine(step, False)

        self._each(reduce_and_send)

    @torch.no_grad()
    def combine_recv(self, handle: Handle, out: torch.Tensor | None) -> torch.Tensor:
        step = self._step(handle, Phase.COMBINING)
        if out is not None:
            self._check_sums(handle, out)
        result = (
            out if out is not None else torch.empty((step.tokens, self.config.hidden_size), dtype=self.config.dtype)
        )
        sums = _merged(self._each(lambda transport: transport.recv_combine(step)))
        self._add_up(step, sums, result)
        self._finish(step)
        return result

    def discard(self, handle: Handle) -> None:
        step = self._step(handle, Phase.SENT, Phase.RECEIVED)
        if not step.arrivals:
            self._receive(step)
        step.phase = Phase.COMBINING
        self._each(lambda transport: transport.send_combine(step, True))
        self._each(lambda transport: transport.recv_combine(step, True))
        self._finish(step)

    def add_wait_times(self, handle: Handle, into: torch.Tensor) -> None:
        step = self._step(handle, Phase.SENT, Phase.RECEIVED, Phase.COMBINING)
        step.wait_times = checks.check_matrix("into", into, (self.world_size,), (torch.int64,))

    # what went wrong

    def missing(self, handle: Handle) -> list[int]:
        self._health.check_open()
        step = self._own(handle)
        lost = self._health.broken
        return sorted(lost.ranks) if isinstance(lost, RankLost) and step.phase is not Phase.DONE else []

    def check(self) -> None:
        self._health.check()

    def poll(self) -> None:
        self._health.check()

    # life

    def close(self) -> None:
        if not self._health.closed:
            self._health.closed = True
            self._unpacker.close()

    # what is different in elastic groups

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        return self._meeting.hosts.ranks_of

    def _call_roll(self, channel: int) -> Roll | None:
        """Who takes part in the channel's next step. None: everybody, always."""
        return None

    def _begin(self, step: Step) -> None:
        """Before rows of the step before last are overwritten."""

    def _begin_sums(self, step: Step) -> None:
        """Before sums of the step before last are overwritten."""

    def _summed(self, step: Step, transport: Transport, arrived: Mapping[int, FloatArray]) -> Collection[int]:
        """The sources that this rank's sums go to by this transport. arrived: the weights that came."""
        return transport.sources

    def _add_up(self, step: Step, sums: dict[SumOrder, Contribution], out: torch.Tensor) -> None:
        sum_contributions(self._arena, [sums[order] for order in sorted(sums)], out)

    # helpers

    def _known(
        self,
        like: Handle,
        channel: int,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        tokens: int,
    ) -> tuple[IntArray, FloatArray | None]:
        """Ids and weights of an earlier step."""
        if not isinstance(like, Handle) or like._owner is not self or like._step.channel != channel:
            raise HandleError(
                f"like={like!r}; give the handle of a step of channel {self.config.channels[channel]!r} of this object"
            )
        earlier = like._step
        if earlier.phase is Phase.SENT:
            raise HandleError(f"like={like!r}; receive that step first")
        checks.check_like(topk_ids, topk_weights, tokens, earlier.tokens)
        return earlier.outgoing.ids, earlier.outgoing.weights

    def _own(self, handle: Handle) -> Step:
        if not isinstance(handle, Handle):
            raise HandleError(f"handle is a {type(handle).__name__}; give the handle of a dispatch")
        if handle._owner is not self:
            raise HandleError("this handle belongs to another AllToAll; use it with the object that made it")
        return handle._step

    def _channel(self, name: str | None) -> int:
        if name is None:
            return 0
        if name not in self.config.channels:
            raise InputError(f"channel={name!r}; this object has {', '.join(map(repr, self.config.channels))}")
        return self.config.channels.index(name)

    def _step(self, handle: Handle, *allowed: Phase) -> Step:
        self._health.check()
        step = self._own(handle)
        if step.phase not in allowed:
            needed = " or ".join(phase.value for phase in allowed)
            raise HandleError(f"{step} is {step.phase.value}; this call needs a step that is {needed}")
        return step

    def _each(self, move: Callable[[Transport], T]) -> list[T]:
        """Make a move with every transport. If it fails, the step is lost: the object is broken and the host's ranks
        are told why."""
        try:
            return [move(transport) for transport in self._transports]
        except MoeA2AError as error:
            self._break(error)
            raise

    def _receive(self, step: Step) -> None:
        arrivals = [a for part in self._each(lambda transport: transport.recv_dispatch(step)) for a in part]
        step.arrivals = sorted(arrivals, key=lambda arrival: arrival.rank)
        step.wait_times = None

    def _break(self, error: MoeA2AError) -> None:
        self._health.broken = error
        if isinstance(error, RankLost) and error.ranks:
            self._arena.memory.set_fault(error.ranks[0])
        if self._meeting.progress is not None:
            self._meeting.progress.settle(_LAST_WORDS_S)

    def _finish(self, step: Step) -> None:
        # The rail peer's sums for others are this rank's duty too: the step has not ended before they are delivered.
        if step.tasks:
            try:
                wait_tasks(step.tasks, self.options.timeout_s, self._meeting.watch, f"combine of {step}")
            except MoeA2AError as error:
                self._break(error)
                raise
        step.phase = Phase.DONE
        self._open[step.channel].remove(step)

    def _expected_output(self, step: Step) -> tuple[int, ...]:
        if step.layout == "masked":
            return (self.local_experts, self.world_size * self.config.max_tokens_per_rank, self.config.hidden_size)
        return (step.output_rows, self.config.hidden_size)


def _merged(parts: list[dict[K, V]]) -> dict[K, V]:
    return {key: value for part in parts for key, value in part.items()}
