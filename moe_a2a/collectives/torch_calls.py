"""The collectives and messages that torch calls on a process group: arguments are checked, and become operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a.collectives import algorithms
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
from moe_a2a.collectives.board import Steps
from moe_a2a.collectives.group import Group
from moe_a2a.collectives.reductions import reduction_of
from moe_a2a.collectives.rounds import Call
from moe_a2a.collectives.signature import Kind, Signature
from moe_a2a.collectives.work import CollectiveWork
from moe_a2a.errors import InputError, MoeA2AError

Tensors = Sequence[torch.Tensor]


class TorchCalls(dist.ProcessGroup):
    """A process group without its membership: `ProcessGroupMoeA2A` has that. torch's names; tensors, lists of tensors
    and options as it hands them over. All raise InputError before anything is sent."""

    _group: Group
    _slot: int
    _raises: bool
    _closed: bool
    _numbers: itertools.count[int]

    @property
    def slots(self) -> int:
        """Numbered places of the group for its whole life."""
        return self._group.base.layout.slots

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
        root = check_root(opts.rootRank, self.slots, "broadcast")
        data, after = flat(tensor, output=True)
        signature = Signature(Kind.BROADCAST, data.numel(), data.dtype, root=root)
        raw = bytes_of(data)
        return self._begin(signature, [tensor], lambda call: algorithms.broadcast(call, raw, root), after, opts)

    def reduce(self, tensors: Tensors, opts: Any = None) -> CollectiveWork:
        opts = opts or dist.ReduceOptions()
        (tensor,) = _one(tensors, "reduce")
        root = check_root(opts.rootRank, self.slots, "reduce")
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

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    def allgather_coalesced(self, output_lists: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> CollectiveWork:
        """output_lists: [size] lists, one tensor for each input, as torch has it."""
        pieces = [list(column) for column in zip(*output_lists, strict=True)]
        works = [self.allgather([outs], [given], opts) for outs, given in zip(pieces, inputs, strict=True)]
        return self._together(works, "all_gather_coalesced")

    def gather(self, output_tensors: Sequence[Tensors], input_tensors: Tensors, opts: Any = None) -> CollectiveWork:
        opts = opts or dist.GatherOptions()
        (tensor,) = _one(input_tensors, "gather")
        root = check_root(opts.rootRank, self.slots, "gather")
        outputs: Tensors = output_tensors[0] if output_tensors else []
        if self._slot == root:
            check_pieces(outputs, tensor, self._sizes(), "gather")
        return self._gather(Kind.GATHER, outputs, tensor, root, opts)

    def gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> CollectiveWork:  # noqa: A002
        """From torch 2.14 on."""
        if opts is None or self._slot != opts.rootRank:
            return self.gather([], [input], opts)
        return self.gather([self._chunks(output, input, "gather_single")], [input], opts)

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
        root = check_root(opts.rootRank, self.slots, "scatter")
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

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> CollectiveWork:
        works = [self.reduce_scatter_single(out, given, opts) for out, given in zip(outputs, inputs, strict=True)]
        return self._together(works, "reduce_scatter_tensor_coalesced")

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

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

    alltoall_base = all_to_all_single  # type: ignore[assignment]

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
        check_root(dst, self.slots, "send", "dst")
        data, _ = flat(tensor)
        work = self._work("send", [tensor])
        self._group.send(work, dst, bytes_of(data), data.dtype, check_tag(tag), True)
        return work

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> CollectiveWork:
        (tensor,) = _one(tensors, "recv")
        check_root(src, self.slots, "recv", "src")
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

    # inside

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

    def _work(self, name: object, result: list[torch.Tensor]) -> CollectiveWork:
        if self._closed:
            raise MoeA2AError(f"{name}: this process group has been destroyed")
        return CollectiveWork(name, result, self._group.driver.run, self._raises)

    def _begin(
        self,
        signature: Signature,
        result: list[torch.Tensor],
        body: Callable[[Call], Steps],
        after: Callable[[], None] | None,
        opts: Any,
    ) -> CollectiveWork:
        work = self._work(signature, result)
        budget = self._group.collective_s
        given = opts.timeout.total_seconds() if opts is not None else -1.0
        if given > 0:  # negative: the caller gave none
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
            if works:
                whole.epoch, whole.ranks = works[-1].epoch, works[-1].ranks
            whole.end(failed.exception() if failed else None, tuple(sorted(ranks)))

        self._group.driver.begin(("together", next(self._numbers)), whole, steps(), True)
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
