"""`AllToAll`: dispatch and combine for one EP group, of CPU ranks or of GPU ranks."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.distributed as dist

from moe_a2a import checks
from moe_a2a.backend import Backend
from moe_a2a.bootstrap import Bootstrap, GroupBootstrap, KeyValue, StoreBootstrap
from moe_a2a.config import Config, Options
from moe_a2a.cpu_backend import CpuBackend
from moe_a2a.errors import ConfigError, InputError
from moe_a2a.fp8 import ScaleFormat
from moe_a2a.names import Names
from moe_a2a.types import LAYOUTS, Contiguous, Dispatched, Grouped, Handle, Layout, Masked

if TYPE_CHECKING:
    from moe_a2a.elastic.group import ElasticGroup
    from moe_a2a.elastic.options import Elastic


class AllToAll:
    """Expert-parallel dispatch and combine for the ranks of one group. Construction is collective.

    config: sizes, equal on every rank. group: a torch.distributed process group (None: the default group), used for
    bootstrapping only; or store, rank and world_size: any key-value store with get, set and wait. elastic: makes a
    group of CPU ranks that goes on without ranks that are lost (docs/elastic.md); world_size is then its `max_ranks`,
    and rank the slot to take if it joins. device: "cpu", or
    "cuda" (the current one) or "cuda:1" for GPU ranks, which take and give tensors on that device, do not wait for it,
    and may be captured in CUDA graphs. options: see `Options`.

    A step is `dispatch`, the caller's experts, `combine`; all ranks make the same steps of a channel in the same
    order. Each half can be split into send and receive, and up to two steps of a channel may be open. Not thread-safe:
    one thread calls one object.

    Raises ConfigError (sizes, hosts, memory, differing configs), EngineError (Transfer Engine), RankLost (a rank does
    not come).
    After a RankLost from a step the object is unusable: close it. Elastic groups raise ExcludedFromView in place of
    that, if it is this rank that was lost, and otherwise end the step without those that are; see `missing`.
    """

    def __init__(
        self,
        config: Config,
        group: dist.ProcessGroup | None = None,
        *,
        device: str | torch.device = "cpu",
        store: KeyValue | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        options: Options | None = None,
        elastic: Elastic | None = None,
    ) -> None:
        self.config = config
        self.options = options or Options()
        found: Bootstrap | None = None
        if elastic is not None and elastic.join:
            if group is not None or store is not None or world_size is not None:
                raise ConfigError("join=True finds the group through Elastic.store; leave group, store, world_size out")
        else:
            found = _bootstrap(config, group, store, rank, world_size)
        identity = object() if found is None else found.identity
        Names.claim(identity, config.channels)
        try:
            self._backend = _backend(config, self.options, found, device, elastic, rank)
        except BaseException:
            Names.release(identity, config.channels)
            raise
        # Of the backend, not of this object: a handle, and so a result, keeps its backend and its memory alive.
        self._release = weakref.finalize(self._backend, _release, self._backend.resources, identity, config.channels)
        self.elastic: ElasticGroup | None = None
        if elastic is None:
            assert found is not None
            self.rank, self.world_size = found.rank, found.world_size
        else:
            self.elastic = _elastic_group(self._backend)
            self.rank, self.world_size = self.elastic.rank, self.elastic.max_ranks
        self.device = self._backend.device
        self.local_experts = config.local_experts(self.world_size)
        self.buffer_bytes = self._backend.buffer_bytes

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each host; of an elastic group those that take part."""
        return self._backend.hosts

    # dispatch

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Literal["masked"] = "masked",
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        alignment: int = 128,
        channel: str | None = None,
        out: torch.Tensor | None = None,
        by_source: bool = False,
    ) -> Masked: ...

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Literal["contiguous"],
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        alignment: int = 128,
        channel: str | None = None,
        out: torch.Tensor | None = None,
        like: Handle | None = None,
        host_counts: bool = False,
    ) -> Contiguous: ...

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Literal["grouped"],
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        alignment: int = 128,
        channel: str | None = None,
        out: torch.Tensor | None = None,
        like: Handle | None = None,
        host_counts: bool = False,
    ) -> Grouped: ...

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Layout = "masked",
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        alignment: int = 128,
        channel: str | None = None,
        out: torch.Tensor | None = None,
        like: Handle | None = None,
        host_counts: bool = False,
        by_source: bool = False,
    ) -> Dispatched:
        """Send every token to the ranks that own its experts, and receive theirs: `dispatch_send`, then
        `dispatch_recv`. by_source: as in `reserve`, for the masked layout."""
        _check_layout(layout)
        checks.check_alignment(alignment)
        if by_source and layout != "masked":
            raise InputError(f"by_source=True goes with layout='masked'; layout is {layout!r}")
        return self._backend.dispatch(
            x, topk_ids, topk_weights, scales, fp8, channel, layout, like, alignment, out, host_counts, by_source
        )

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Layout | None = None,
        scales: torch.Tensor | None = None,
        fp8: ScaleFormat | None = None,
        channel: str | None = None,
        like: Handle | None = None,
    ) -> Handle:
        """Start a step: send this rank's tokens. Returns at once; the arguments may be reused.

        x: [T, H] of config.dtype, T from 0 to max_tokens_per_rank and different on every rank; or float8_e4m3fn with
        `scales`.
        topk_ids: int32 or int64 [T, K], experts of each token, -1 for none. Expert e lives on rank e // E_l.
        topk_weights: fp32 [T, K], router weights; None if they are given at combine. All ranks alike.
        layout: how the rows will be received. GPU ranks send rows for "contiguous" and "grouped" in another way than
        for "masked" (None), all ranks alike; CPU ranks may leave it open until they receive.
        scales: fp32 [T, H/128] of an x that is FP8 already.
        fp8: None sends x as it is; "fp32", "pow2", "ue8m0" send FP8 with scales handed out in that form
        (`moe_a2a.fp8`).
        channel: a name of config.channels; None: the first.
        like: a received step of this channel, contiguous or grouped: this step follows its routing and weights, and
        topk_ids and topk_weights are left out. All ranks alike. GPU ranks send the rows and nothing else.

        Raises InputError, HandleError (two steps of the channel are open), RankLost (a peer cannot be written to).
        """
        if layout is not None:
            _check_layout(layout)
        return self._backend.dispatch_send(x, topk_ids, topk_weights, scales, fp8, channel, layout, like)

    def reserve(self, handle: Handle, *, by_source: bool = False, out: torch.Tensor | None = None) -> Masked:
        """The tensors that `dispatch_recv(handle)` will fill, in the masked layout, for callers who hand them on first.
        Until then their contents mean nothing. Sends and waits for nothing.

        by_source: rows' origins as DeepEP's handles hold them: `source` is the token's number on its rank, and `ranges`
        int64 [E_l, R] holds first row << 32 | number of rows of each source rank. out: storage for x.
        Raises InputError, HandleError.
        """
        return self._backend.reserve(handle, by_source, out)

    def dispatch_recv(
        self,
        handle: Handle,
        *,
        layout: Layout | None = None,
        alignment: int = 128,
        out: torch.Tensor | None = None,
        host_counts: bool = False,
    ) -> Dispatched:
        """Wait for all ranks' tokens of this step and lay out those for this rank's experts.

        layout: "masked", "contiguous" or "grouped"; None: as it was sent, "masked" if that said nothing. CPU ranks may
        each choose for themselves, unless weights are given at combine: then all take "masked" or "grouped". GPU ranks
        choose when they send. alignment: rows per expert of the grouped layout are padded to this power of two. out:
        storage for x: [E_l, R*M, H] (masked), or [rows, H] with rows enough for what arrives. host_counts: for
        contiguous and grouped on GPU ranks: wait for the number of rows, and return tensors of exactly so many; without
        it, they have as many rows as could arrive, and nothing waits. CPU ranks always return exactly the rows.
        Raises InputError, HandleError, RankLost.
        """
        if layout is not None:
            _check_layout(layout)
        checks.check_alignment(alignment)
        reserved = isinstance(handle, Handle) and handle._reserved is not None
        if reserved and (out is not None or layout not in (None, "masked")):
            raise InputError("this step's outputs are reserved: receive it in the masked layout, without out=")
        return self._backend.dispatch_recv(handle, layout, alignment, out, host_counts)

    # combine

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send the experts' outputs back and sum them. `combine_send`, then `combine_recv`."""
        return self._backend.combine(y, handle, topk_weights, out)

    def combine_send(self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None) -> None:
        """Reduce the experts' outputs for each received token and send one row back to its rank.

        y: config.dtype; masked [E_l, R*M, H] or grouped [P, H]: the experts' rows, still to be multiplied by the
            router weights; contiguous [N, H]: one row for each received token, weights already applied.
        topk_weights: fp32 [T, K] of this rank's own tokens, if they were not given at dispatch (masked and grouped
            layouts). They are sent to the tokens' ranks first, and this call waits for the other ranks' weights: all
            ranks then combine their channels in one order.
        Raises InputError, HandleError, RankLost.
        """
        self._backend.combine_send(y, handle, topk_weights)

    def combine_recv(self, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Wait for the sums and add them up. Returns [T, H] of config.dtype, in `out` if given. Ends the step.

        A token without experts gives zeros. Raises InputError, HandleError, RankLost.
        """
        return self._backend.combine_recv(handle, out)

    def add_wait_times(self, handle: Handle, into: torch.Tensor) -> None:
        """Measure a step's waits: those of its dispatch, if called before `dispatch_recv`; later, those of its combine.

        into: int64 [R], to which the nanoseconds are added that this rank waits for each rank, from the start of the
        wait: for tokens; for weights given at combine, and for sums. GPU ranks: a kernel more for each wait, in front
        of the one that waits. Raises InputError, HandleError.
        """
        self._backend.add_wait_times(handle, into)

    def discard(self, handle: Handle) -> None:
        """End a step without a combine. Collective: every rank discards the step. Raises HandleError, RankLost."""
        if isinstance(handle, Handle):
            handle._reserved = None
        self._backend.discard(handle)

    # what went wrong

    def missing(self, handle: Handle) -> list[int]:
        """The ranks that are missing from a step, so that its result lacks their part; [] for a good step so far.

        Raises nothing for them, and also answers after a RankLost. GPU ranks: waits for all work queued on the device;
        a handle can be asked until the channel's next dispatch but one, that of a graph about its last replay. CPU
        ranks: a rank that is lost breaks all steps that are open. Raises HandleError.
        """
        return self._backend.missing(handle)

    def check(self) -> None:
        """Raise what has gone wrong and was not raised yet: RankLost, InputError for a wrong id, scale or weight of an
        earlier step, HandleError for steps that overlapped (a replayed graph's with one that was open).

        GPU ranks: waits for all work queued on the device, also of replayed graphs; no other call does. CPU ranks:
        every call has raised what there was to raise.
        """
        self._backend.check()

    def poll(self) -> None:
        """As `check`, of what is known already: waits for nothing. For programs that replay graphs and make no other
        calls; raised within about 0.1 s of calls of this."""
        self._backend.poll()

    # life

    def close(self) -> None:
        """Release memory, threads and descriptors. Not collective; results must not be used afterwards. May be called
        twice."""
        self._backend.close()
        self._release()

    def __enter__(self) -> AllToAll:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _release(resources: ExitStack, identity: object, channels: tuple[str, ...]) -> None:
    """What `close` does, also for an object that is dropped without it and at the end of the process."""
    resources.close()
    Names.release(identity, channels)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise InputError(f"layout={layout!r}; allowed: {', '.join(map(repr, LAYOUTS))}")


def _elastic_group(backend: Backend) -> ElasticGroup:
    from moe_a2a.elastic.backend import ElasticBackend
    from moe_a2a.elastic.group import ElasticGroup

    assert isinstance(backend, ElasticBackend)
    return ElasticGroup(backend)


def _backend(
    config: Config,
    options: Options,
    bootstrap: Bootstrap | None,
    device: str | torch.device,
    elastic: Elastic | None,
    rank: int | None,
) -> Backend:
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r}; allowed: 'cpu', 'cuda', 'cuda:0', ...") from error
    if elastic is not None:
        if chosen.type != "cpu":
            raise ConfigError(f"elastic= is for CPU ranks; device is {str(device)!r}: leave elastic out on GPU ranks")
        from moe_a2a.elastic.backend import ElasticBackend  # most groups need none of it

        return ElasticBackend(config, options, elastic, bootstrap, rank)
    assert bootstrap is not None  # of every group that is not joined later
    if chosen.type == "cpu":
        return CpuBackend(config, options, bootstrap)
    if chosen.type == "cuda":
        from moe_a2a.gpu.backend import GpuBackend  # needs CUDA's packages

        return GpuBackend(config, options, bootstrap, chosen)
    raise ConfigError(f"device={str(device)!r}; allowed: 'cpu', 'cuda', 'cuda:0', ...")


def _bootstrap(
    config: Config, group: dist.ProcessGroup | None, store: KeyValue | None, rank: int | None, world_size: int | None
) -> Bootstrap:
    if store is None:
        if rank is not None or world_size is not None:
            raise ConfigError("rank and world_size go with store=; with a process group they come from the group")
        return GroupBootstrap(group)
    if group is not None:
        raise ConfigError("give a process group or a store, not both")
    if rank is None or world_size is None:
        raise ConfigError("store= needs rank= and world_size=")
    return StoreBootstrap(store, rank, world_size)
