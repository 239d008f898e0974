"""The process group: torch's interface on one side, operations among the ranks of a view on the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.collectives import algorithms
from moe_a2a.collectives.admission import Admission, Proposal
from moe_a2a.collectives.arguments import (
    bytes_of,
    check_pieces,
    check_root,
    check_tag,
    check_tensor,
    flat,
    same_dtype,
    split_rows,
)
from moe_a2a.collectives.base import Base, TorchStore, alone, enter, found
from moe_a2a.collectives.group import Group
from moe_a2a.collectives.options import Options
from moe_a2a.collectives.reductions import reduction_of
from moe_a2a.collectives.rounds import Call
from moe_a2a.collectives.board import Steps
from moe_a2a.collectives.signature import Kind, Reduction, Signature
from moe_a2a.collectives.work import CollectiveWork
from moe_a2a.errors import InputError, MoeA2AError

Tensors = Sequence[torch.Tensor]
#: torch says that it was given no time-out by a negative one, and 30 min by default.
_TORCH_DEFAULT_S = 1800.0


class ProcessGroupMoeA2A(dist.ProcessGroup):
    """A process group of CPU tensors whose operations run among the ranks of the current view.

    Ranks are slots, numbered for life. Ranks that are not in the view are skipped: all_gather and the like leave their
    pieces of the output as they were, sums lack them, "avg" divides by the number of ranks that took part. An operation
    runs in one view on all ranks. Every operation ends: right, or as failed (`CollectiveWork`), and then its outputs
    hold anything. Collectives run in the order in which they were called, messages of a pair of ranks in theirs.

    store, rank, size, timeout: as torch gives them to a backend. Collective, unless options.joining. Raises
    ConfigError, EngineError, RankLost, StoreAway.
    """

    def __init__(
        self, store: TorchStore | None, rank: int, size: int, timeout: timedelta, options: Options | None = None
    ) -> None:
        super().__init__(rank, size)
        self._options = options or Options()
        self._slot, self._declared, self._store = rank, size, store
        self._timeout_s = timeout.total_seconds()
        slots = size if self._options.slots is None else self._options.slots
        if self._options.joining:
            base = alone(rank, max(slots, size), self._options)
        else:
            assert store is not None
            base = found(store, rank, size, self._timeout_s, self._options)
        self._group = self._of(base)
        self._admission = Admission(self.slots, self._options.reconcile_s, lambda: self._group.base.member)

    def _of(self, base: Base) -> Group:
        options = self._options
        return Group(
            base, options, options.collective_timeout_s or self._timeout_s, options.p2p_timeout_s or self._timeout_s
        )

    # who takes part

    def rank(self) -> int:
        return self._slot

    def size(self) -> int:
        """One past the highest active slot: `dist.get_world_size()`. While this process is alone: what it was given."""
        view = self._group.roster.view
        if view is None:
            return self._declared
        with contextlib.suppress(MoeA2AError):  # a process that is outside the view still has a size
            return max(self._group.roster.roll().ranks) + 1
        return view.size

    def active(self) -> tuple[bool, ...]:
        """[slots], who takes part, as the next operation would see it. While this process is alone: itself. Raises
        ExcludedFromView."""
        ranks = self._group.roster.roll().ranks
        return tuple(rank in ranks for rank in range(self.slots))

    @property
    def epoch(self) -> int:
        """Of the newest view; grows with every change. 0 while this process is alone."""
        view = self._group.roster.view
        return 0 if view is None else view.epoch

    @property
    def slots(self) -> int:
        """Numbered places of the group for its whole life."""
        return self._group.base.layout.slots

    @property
    def alone(self) -> bool:
        """Whether this process waits to `join()`."""
        return self._group.base.member is None

    @property
    def options(self) -> Options:
        return self._options

    def peer_ready(self, ranks: Sequence[int]) -> list[bool]:
        """For each slot, whether a process waits there to be activated, or takes part already and lives. Asks nobody."""
        return self._admission.peer_ready(ranks)

    def join(self, timeout_s: float | None = None) -> None:
        """Come to the group: take the slot `rank()`, wait until a member has activated it, and take part from the
        group's next operation on. Also for a process that was found failed, or was deactivated, and is still there.

        Operations that have begun are waited for. Raises JoinRefused (the slot is taken, or what was given differs from
        the group's), StoreAway, MoeA2AError if nobody activates it within `timeout_s` (None: reconcile_s).
        """
        self._group.drain()
        self._group.close()
        base = enter(self._store, self._slot, self._options, self._options.reconcile_s)
        assert base.member is not None
        self._group = self._of(base)
        self._admission.revive()
        base.member.wait_active(self._options.reconcile_s if timeout_s is None else timeout_s)

    def activate(self, ranks: Sequence[int]) -> Proposal:
        """Let processes that are ready take part; wait for their readiness up to reconcile_s. Any one member may ask;
        ranks that take part already stay as they are."""
        return self._admission.activate(ranks)

    def deactivate(self, ranks: Sequence[int]) -> Proposal:
        """Take ranks out of the group in order, those that failed too: when this returns no member's next operation has
        them. Ranks that do not take part are ignored. Such a process may `join()` again."""
        return self._admission.deactivate(ranks)

    def sync_after_failure(self) -> int:
        """Wait until the view is without the ranks that operations here have lost, and go by it from now on. Returns
        its epoch. What on_failure="deferred" needs after a failure; without one it returns at once.

        Raises ExcludedFromView, MoeA2AError (there is no such view within reconcile_s).
        """
        return self._group.sync()

    @property
    def failure_pending(self) -> bool:
        """Whether an operation here has lost a rank that this process still counts on."""
        return self._group.failure_pending

    # collectives, by the names under which torch calls them

    def allreduce(self, tensors: Tensors, opts: Any = None) -> CollectiveWork:
        opts = opts or dist.AllreduceOptions()
        (tensor,) = _one(tensors, "all_reduce")
        kind = reduction_of(opts.reduceOp, tensor.dtype)
        data, after = flat(tensor, output=True)
        signature = Signature(Kind.ALL_REDUCE, data.numel(), data.dtype, kind)
        return self._begin(signature, [tensor], lambda call: algorithms.all_reduce(call, data, kind), after, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> CollectiveWork:
        return self._together([self.allreduce([tensor], opts) for tensor in tensors], "all_reduce_coalesced")

    def broadcast(self, tensors: Tensors, opts: Any = None) -> CollectiveWork:
        opts = opts or dist.BroadcastOptions()
        (tensor,) = _one(tensors, "broadcast")
        root = check_root(opts.rootRank, self.size(), "broadcast")
        data, after = flat(tensor, output=True)
        signature = Signature(Kind.BROADCAST, data.numel(), data.dtype, root=root)
        raw = bytes_of(data)
        return self._begin(signature, [tensor], lambda call: algorithms.broadcast(call, raw, root), after, opts)

    def reduce(self, tensors: Tensors, opts: Any = None) -> CollectiveWork:
        opts = opts or dist.ReduceOptions()
        (tensor,) = _one(tensors, "reduce")
        root = check_root(opts.rootRank, self.size(), "reduce")
        kind = reduction_of(opts.reduceOp, tensor.dtype)
        data, after = flat(tensor, output=True)
        signature = Signature(Kind.REDUCE, data.numel(), data.dtype, kind, root)
        return self._begin(signature, [tensor], lambda call: algorithms.reduce_to(call, data, kind, root), after, opts)

    def allgather(self, output_tensors: Sequence[Tensors], input_tensors: Tensors, opts: Any = None) -> CollectiveWork:
        (tensor,) = _one(input_tensors, "all_gather")
        (outputs,) = _one(output_tensors, "all_gather")
        check_pieces(outputs, tensor, self._sizes(), "all_gather")
        return self._gather(Kind.ALL_GATHER, outputs, tensor, None, opts)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> CollectiveWork:  # noqa: A002
        return self._gather(Kind.ALL_GATHER, self._chunks(output, input, "all_gather_into_tensor"), input, None, opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> CollectiveWork:
        works = [self.all_gather_single(out, given, opts) for out, given in zip(outputs, inputs, strict=True)]
        return self._together(works, "all_gather_into_tensor_coalesced")

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather_coalesced(self, output_lists: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> CollectiveWork:
        """output_lists: [size] lists, one tensor for each input, as torch has it."""
        pieces = [list(column) for column in zip(*output_lists, strict=True)]
        works = [self.allgather([outs], [given], opts) for outs, given in zip(pieces, inputs, strict=True)]
        return self._together(works, "all_gather_coalesced")

    def gather(self, output_tensors: Sequence[Tensors], input_tensors: Tensors, opts: Any = None) -> CollectiveWork:
        opts = opts or dist.GatherOptions()
        (tensor,) = _one(input_tensors, "gather")
        root = check_root(opts.rootRank, self.size(), "gather")
        outputs: Tensors = output_tensors[0] if output_tensors else []
        if self._slot == root:
            check_pieces(outputs, tensor, self._sizes(), "gather")
        return self._gather(Kind.GATHER, outputs, tensor, root, opts)

    def _gather(
        self, kind: Kind, outputs: Tensors, tensor: torch.Tensor, root: int | None, opts: Any
    ) -> CollectiveWork:
        data, _ = flat(tensor)
        places = [flat(out, output=True) for out in outputs]
        pieces = {rank: bytes_of(place) for rank, (place, _) in enumerate(places)}
        signature = Signature(kind, data.numel(), data.dtype, root=-1 if root is None else root)
        raw, readers = bytes_of(data), None if root is None else [root]
        return self._begin(
            signature,
            list(outputs),
            lambda call: algorithms.all_gather(call, raw, pieces, readers),
            _all_of([copy for _, copy in places]),
            opts,
        )

    def scatter(self, output_tensors: Tensors, input_tensors: Sequence[Tensors], opts: Any = None) -> CollectiveWork:
        opts = opts or dist.ScatterOptions()
        (out,) = _one(output_tensors, "scatter")
        root = check_root(opts.rootRank, self.size(), "scatter")
        inputs: Tensors = input_tensors[0] if input_tensors else []
        if self._slot == root:
            check_pieces(inputs, out, self._sizes(), "scatter")
        data, after = flat(out, output=True)
        pieces = {rank: bytes_of(flat(piece)[0]) for rank, piece in enumerate(inputs)}
        signature = Signature(Kind.SCATTER, data.numel(), data.dtype, root=root)
        raw = bytes_of(data)
        return self._begin(signature, [out], lambda call: algorithms.scatter(call, raw, pieces, root), after, opts)

    def reduce_scatter(
        self, output_tensors: Tensors, input_tensors: Sequence[Tensors], opts: Any = None
    ) -> CollectiveWork:
        opts = opts or dist.ReduceScatterOptions()
        (out,) = _one(output_tensors, "reduce_scatter")
        (inputs,) = _one(input_tensors, "reduce_scatter")
        check_pieces(inputs, out, self._sizes(), "reduce_scatter")
        kind = reduction_of(opts.reduceOp, out.dtype)
        data, after = flat(out, output=True)
        pieces = {rank: flat(piece)[0] for rank, piece in enumerate(inputs)}
        signature = Signature(Kind.REDUCE_SCATTER, data.numel(), data.dtype, kind)
        return self._begin(
            signature, [out], lambda call: algorithms.reduce_scatter(call, data, pieces, kind), after, opts
        )

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> CollectiveWork:  # noqa: A002
        return self.reduce_scatter([output], [self._chunks(input, output, "reduce_scatter_tensor")], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> CollectiveWork:
        works = [self.reduce_scatter_single(out, given, opts) for out, given in zip(outputs, inputs, strict=True)]
        return self._together(works, "reduce_scatter_tensor_coalesced")

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> CollectiveWork:
        same_dtype(output, input, "all_to_all_single")
        data, _ = flat(input)
        place, after = flat(output, output=True)
        outputs = split_rows(place, output, output_split_sizes, self._sizes(), "output")
        inputs = split_rows(data, input, input_split_sizes, self._sizes(), "input")
        if output_split_sizes or input_split_sizes:
            return self._all_to_all_split(outputs, inputs, output, after, opts)
        if place.numel() != data.numel():
            raise InputError(
                f"all_to_all_single: output has {place.numel()} elements and input {data.numel()}; without split sizes "
                "they have to be equal"
            )
        count = inputs[0].numel()
        out, pieces = dict(enumerate(map(bytes_of, outputs))), dict(enumerate(map(bytes_of, inputs)))
        nbytes = count * data.dtype.itemsize
        signature = Signature(Kind.ALL_TO_ALL, count, data.dtype)
        return self._begin(
            signature, [output], lambda call: algorithms.all_to_all(call, out, pieces, nbytes), after, opts
        )

    alltoall_base = all_to_all_single

    def alltoall(self, output_tensors: Tensors, input_tensors: Tensors, opts: Any = None) -> CollectiveWork:
        for name, given in (("output", output_tensors), ("input", input_tensors)):
            if len(given) not in self._sizes():
                raise InputError(f"all_to_all: {len(given)} {name} tensors for {self.size()} ranks; give one for each")
            for tensor in given:
                same_dtype(tensor, input_tensors[0], "all_to_all")
        places = [flat(out, output=True) for out in output_tensors]
        inputs = [flat(given)[0] for given in input_tensors]
        after = _all_of([copy for _, copy in places])
        return self._all_to_all_split([place for place, _ in places], inputs, None, after, opts, list(output_tensors))

    def _all_to_all_split(
        self,
        outputs: Tensors,
        inputs: Tensors,
        like: torch.Tensor | None,
        after: Callable[[], None] | None,
        opts: Any,
        result: list[torch.Tensor] | None = None,
    ) -> CollectiveWork:
        dtype = inputs[0].dtype
        row = 1 if like is None or like.dim() < 2 else like[:0].numel() or like.shape[1:].numel()
        out, pieces = dict(enumerate(map(bytes_of, outputs))), dict(enumerate(map(bytes_of, inputs)))
        signature = Signature(Kind.ALL_TO_ALL_SPLIT, row, dtype)
        nbytes = row * dtype.itemsize
        given = result if result is not None else [like] if like is not None else []
        return self._begin(
            signature, given, lambda call: algorithms.all_to_all_split(call, out, pieces, nbytes), after, opts
        )

    def barrier(self, opts: Any = None) -> CollectiveWork:
        opts = opts or dist.BarrierOptions()
        return self._begin(Signature(Kind.BARRIER), [], algorithms.barrier, None, opts)

    # messages

    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> CollectiveWork:
        """Ends when the message lies where the receiver finds it, or, if it is longer than two parts, has taken it."""
        (tensor,) = _one(tensors, "send")
        check_root(dst, self.size(), "send", "dst")
        data, _ = flat(tensor)
        if data.data_ptr() == tensor.data_ptr() and data.numel():
            # torch's own backends read it until the work has ended, too; nothing is copied.
            pass
        work = self._work("send", [tensor])
        self._group.send(work, dst, bytes_of(data), data.dtype, check_tag(tag), True)
        return work

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> CollectiveWork:
        (tensor,) = _one(tensors, "recv")
        check_root(src, self.size(), "recv", "src")
        data, after = flat(tensor, output=True)
        work = self._work("recv", [tensor])
        self._group.receive(work, src, bytes_of(data), data.dtype, check_tag(tag), after, True)
        return work

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> CollectiveWork:
        """From any rank that no other receive waits for."""
        (tensor,) = _one(tensors, "recv")
        data, after = flat(tensor, output=True)
        work = self._work("recv", [tensor])
        self._group.receive_any(work, bytes_of(data), data.dtype, check_tag(tag), after, True)
        return work

    # torch's other calls

    def getBackendName(self) -> str:  # noqa: N802
        return "moe_a2a"

    def name(self) -> str:
        return "moe_a2a"

    def set_timeout(self, timeout: timedelta) -> None:
        """For operations that begin from now on, unless Options say otherwise."""
        self._timeout_s = timeout.total_seconds()
        self._group.collective_s = self._options.collective_timeout_s or self._timeout_s
        self._group.message_s = self._options.p2p_timeout_s or self._timeout_s

    def shutdown(self) -> None:
        """Leave the group, and let go of memory. Collectives that have begun should have ended. May be called twice."""
        if not self._closed:
            self._closed = True
            self._group.close()

    abort = shutdown

    # inside

    _closed = False

    def _sizes(self) -> tuple[int, ...]:
        """How many pieces an operation may be given."""
        return self.size(), self.slots

    def _chunks(self, whole: torch.Tensor, piece: torch.Tensor, name: str) -> list[torch.Tensor]:
        same_dtype(whole, piece, name)
        check_tensor(whole)
        sizes = self._sizes()
        if whole.numel() not in [size * piece.numel() for size in sizes]:
            raise InputError(
                f"{name}: {whole.numel()} elements for {sizes[0]} ranks with {piece.numel()} each; give "
                f"{sizes[0] * piece.numel()}"
            )
        if not whole.is_contiguous():
            raise InputError(f"{name}: the tensor of all ranks' pieces has to be contiguous; use .contiguous()")
        parts = whole.numel() // piece.numel() if piece.numel() else sizes[0]
        return list(whole.view(-1).view(parts, piece.numel()).unbind(0))

    def _work(self, name: str, result: list[torch.Tensor]) -> CollectiveWork:
        if self._closed:
            raise MoeA2AError(f"{name}: this process group has been destroyed")
        return CollectiveWork(name, result, self._group.driver.run, self._options.raises)

    def _begin(
        self,
        signature: Signature,
        result: list[torch.Tensor],
        body: Callable[[Call], Steps],
        after: Callable[[], None] | None,
        opts: Any,
    ) -> CollectiveWork:
        work = self._work(str(signature), result)
        budget = self._group.collective_s
        given = opts.timeout.total_seconds() if opts is not None else -1.0
        if given > 0 and given != _TORCH_DEFAULT_S:
            budget = given
        alone = opts is None or getattr(opts, "asyncOp", True)
        self._group.collective(work, signature, body, after, budget, alone)
        return work

    def _together(self, works: list[CollectiveWork], name: str) -> CollectiveWork:
        """One work for several. Later ones end after earlier ones."""
        whole = self._work(name, [tensor for work in works for tensor in work.result()])

        def steps() -> Steps:
            while not all(work.is_completed() for work in works):
                yield
            failed = next((work for work in works if not work.succeeded), None)
            ranks = {rank for work in works for rank in work.failed_ranks}
            whole.epoch = max((work.epoch for work in works), default=0)
            whole.end(failed.exception() if failed else None, tuple(sorted(ranks)))

        self._group.driver.begin(("together", id(whole), time.monotonic_ns()), steps(), True)
        return whole


def _one(given: Sequence[Any], name: str) -> Sequence[Any]:
    if len(given) != 1:
        raise InputError(f"{name} takes one tensor for each call, not {len(given)}")
    return given


def _all_of(calls: Sequence[Callable[[], None] | None]) -> Callable[[], None] | None:
    wanted = [call for call in calls if call is not None]
    if not wanted:
        return None

    def run() -> None:
        for call in wanted:
            call()

    return run


__all__ = ["ProcessGroupMoeA2A", "Reduction"]
