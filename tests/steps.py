"""Whole steps against the oracle: cases, the inputs of every rank, and the comparison of every field and every sum.

Every rank derives the inputs of all ranks from the case, so that the expected result of a rank needs no communication.
Expert outputs depend on the expert and on the row's source only: what arrived is compared by itself, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ranks import Ctx, host_labels

from moe_a2a import AllToAll, Config, Contiguous, Grouped, Handle, Masked
from moe_a2a import reference as ref
from moe_a2a.types import LAYOUTS
from moe_a2a.workload import make_inputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (None, "fp32", "pow2", "ue8m0")
POISON = 0xA5

#: Hosts x ranks, by name: the label of each rank's host.
TOPOLOGIES: dict[str, list[str]] = {
    "1 host x 4 ranks": host_labels(4, 1),
    "2 hosts x 2 ranks": host_labels(4, 2),
    "4 hosts x 1 rank": host_labels(4, 4),
    "3 ranks on uneven hosts": ["a", "a", "b"],
    "ranks that alternate between hosts": ["a", "b", "a", "b"],
    "1 rank": ["a"],
}

#: Largest difference from the oracle, relative to the sum of the magnitudes of a sum's terms. bf16 and fp16: two of the
#: roundings of a sum (per rank, per host, at the end) fall to the neighbouring number: fp32 sums may be taken in
#: another order, and bf16's kernels round ties away from zero.
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-21}


@dataclass(frozen=True)
class Case:
    """Sizes and inputs of a few steps. tokens: T by rank, handed on to the next rank with every step."""

    experts: int = 16
    hidden: int = 256
    top_k: int = 4
    max_tokens: int = 13
    tokens: tuple[int, ...] = (13, 3, 0, 7)
    dtype: torch.dtype = torch.bfloat16
    fp8: Any = None
    quantised: bool = False  # x is given as FP8 with scales
    weights_at: str = "dispatch"
    routing: Any = "uniform"
    padding: float = 0.15
    holes: float = 0.1
    alignment: int = 8
    exact: bool = True  # small whole numbers: every sum is exact in every dtype
    id_dtype: torch.dtype = torch.int64
    layouts: tuple[Any, ...] = LAYOUTS  # one step each
    seed: int = 0

    def config(self, **changes: Any) -> Config:
        sizes = Config(self.experts, self.hidden, self.top_k, self.max_tokens, self.dtype)
        return dataclasses.replace(sizes, **changes)

    def sizes(self, ranks: int) -> ref.Sizes:
        return ref.Sizes(ranks, self.experts, self.max_tokens)

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


@dataclass
class World:
    """What all ranks bring to one step: lists by rank. rows, scales: what the receivers get (quantised for FP8)."""

    x: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]
    rows: list[torch.Tensor]
    scales: list[torch.Tensor] | None
    given_scales: list[torch.Tensor] | None


def world_of(case: Case, ranks: int, step: int) -> World:
    """The inputs of every rank in `step`."""
    made = [
        make_inputs(
            case.seed,
            rank,
            step,
            case.tokens[(rank + step) % len(case.tokens)],
            hidden=case.hidden,
            experts=case.experts,
            top_k=case.top_k,
            dtype=case.dtype,
            routing=case.routing,
            padding=case.padding,
            holes=case.holes,
        )
        for rank in range(ranks)
    ]
    x, ids = [i.x for i in made], [i.topk_ids.to(case.id_dtype) for i in made]
    weights = [i.topk_weights for i in made]
    if case.exact:
        weights = [torch.where(i.topk_ids % 2 == 0, 0.5, 1.0) for i in made]
    if case.fp8 is None:
        return World(x, ids, weights, x, None, None)
    quantised = [ref.quantise(rows, case.fp8) for rows in x]
    rows, scales = [q for q, _ in quantised], [s for _, s in quantised]
    if not case.quantised:
        return World(x, ids, weights, rows, scales, None)
    given = [ref.unpack_ue8m0(s, case.hidden // 128) if case.fp8 == "ue8m0" else s for s in scales]
    return World(rows, ids, weights, rows, scales, given)


# ------------------------------------------------------------------------------------------------------ what arrives


def same(what: str, got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """Equal in dtype, shape and every bit."""
    if got is None or want is None:
        assert got is want, f"{what}: got {got}, expected {want}"
        return
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not torch.equal(_bits(got), _bits(want)):
        where = (_bits(got) != _bits(want)).nonzero()[0].tolist()
        raise AssertionError(f"{what} differs first at {where}: got {got[tuple(where)]}, expected {want[tuple(where)]}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(same_size[tensor.dtype.itemsize])


def check_masked(got: Masked, want: ref.MaskedRows) -> None:
    same("counts", got.counts, want.counts)
    assert got.x.shape == want.x.shape and got.x.is_contiguous(), f"x: {got.x.shape}, {got.x.stride()}"
    assert got.source.shape == want.source.shape and got.source.dtype == torch.int32, f"source: {got.source.shape}"
    if want.scales is None:
        assert got.scales is None, "scales without FP8"
    else:
        assert got.scales is not None and got.scales.shape == want.scales.shape, f"scales: {got.scales}"
        assert got.scales.stride() == want.scales.stride(), f"scales: strides {got.scales.stride()}"
    for e, n in enumerate(want.counts.tolist()):
        same(f"x of expert {e}", got.x[e, :n], want.x[e, :n])
        same(f"source of expert {e}", got.source[e, :n], want.source[e, :n])
        if got.scales is not None and want.scales is not None:
            same(f"scales of expert {e}", got.scales[e, :n], want.scales[e, :n])


def check_contiguous(got: Contiguous, want: ref.ContiguousRows) -> None:
    for field in ("x", "topk_ids", "topk_weights", "counts", "tokens_per_rank", "source", "scales"):
        same(field, getattr(got, field), getattr(want, field))
    assert got.x.is_contiguous(), f"x: strides {got.x.stride()}"
    if got.scales is not None and len(got.x):
        by_column = got.scales.dtype == torch.int32
        tight = got.scales.t() if by_column else got.scales
        assert tight.is_contiguous(), f"scales: strides {got.scales.stride()} of {tuple(got.scales.shape)}"


def check_grouped(got: Grouped, want: ref.GroupedRows) -> None:
    for field in ("expert_ids", "counts", "offsets", "topk_weights", "source"):
        same(field, getattr(got, field), getattr(want, field))
    assert got.x.shape == want.x.shape and got.x.is_contiguous(), f"x: {got.x.shape}, {got.x.stride()}"
    tokens = want.source >= 0
    same("x", got.x[tokens], want.x[tokens])
    if got.scales is None or want.scales is None:
        same("scales", got.scales, want.scales)
    else:
        assert got.scales.shape == want.scales.shape and got.scales.t().is_contiguous(), (
            f"scales: {got.scales.stride()}"
        )
        same("scales", got.scales[tokens], want.scales[tokens])


def check_dispatched(case: Case, world: World, rank: int, got: Masked | Contiguous | Grouped) -> None:
    """Compare a result of any layout with the oracle."""
    sizes = case.sizes(len(world.x))
    weights = world.weights if case.weights_at == "dispatch" else None
    if isinstance(got, Masked):
        check_masked(got, ref.dispatch_masked(sizes, world.rows, world.ids, rank, world.scales))
    elif isinstance(got, Contiguous):
        check_contiguous(got, ref.dispatch_contiguous(sizes, world.rows, world.ids, weights, rank, world.scales))
    else:
        want = ref.dispatch_grouped(sizes, world.rows, world.ids, weights, rank, case.alignment, world.scales)
        check_grouped(got, want)
    assert isinstance(got.handle, Handle)


# ------------------------------------------------------------------------------------------------------ what goes back


def expert_rows(case: Case, expert: torch.Tensor | int, start: torch.Tensor) -> torch.Tensor:
    """What `expert` makes of rows that begin with the numbers `start` [n, H]: rows [n, H] of the payload dtype."""
    number = start.long() + 7 * expert
    if case.exact:
        return (number % 9 - 4).to(case.dtype)
    return torch.sin(number.double()).to(case.dtype)


def _starts(case: Case, source: torch.Tensor) -> torch.Tensor:
    """source: [n] row numbers; returns int64 [n, H]."""
    return 31 * source.long()[:, None] + torch.arange(case.hidden)


def expert_output(case: Case, world: World, rank: int, got: Masked | Contiguous | Grouped) -> torch.Tensor:
    """The experts' output for a dispatched step. Rows that hold no token are NaN: combine must not read them."""
    first = rank * case.sizes(len(world.x)).experts_per_rank
    y = torch.full(got.x.shape, torch.nan, dtype=case.dtype)
    if isinstance(got, Masked):
        for e, n in enumerate(got.counts.tolist()):
            y[e, :n] = expert_rows(case, first + e, _starts(case, got.source[e, :n]))
    elif isinstance(got, Grouped):
        rows = got.expert_ids >= 0
        expert = first + got.expert_ids[rows].long()[:, None]
        y[rows] = expert_rows(case, expert, _starts(case, got.source[rows]))
    else:
        came = ref.arrivals(case.sizes(len(world.x)), world.ids, rank)
        weights, start = came.gather(world.weights), _starts(case, got.source)
        total = torch.zeros(got.x.shape)
        for k in range(case.top_k):
            rows = got.topk_ids[:, k] >= 0
            made = expert_rows(case, first + got.topk_ids[rows, k, None], start[rows])
            total[rows] += weights[rows, k, None] * made.float()
        y = total.to(case.dtype)
    return y


def expected_sum(
    case: Case, world: World, rank: int, hosts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what combine returns on `rank` [T, H], the sum of its terms' magnitudes)."""
    sizes, ids, weights = case.sizes(len(world.x)), world.ids[rank].long(), world.weights[rank]
    starts = _starts(case, rank * case.max_tokens + torch.arange(len(ids))).double()

    def summed(expert: Callable[[int, torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return ref.moe_output(sizes, starts, ids, weights, rank, expert, hosts, dtype)

    want = summed(lambda e, rows: expert_rows(case, e, rows), case.dtype)
    return want, summed(lambda e, rows: expert_rows(case, e, rows).abs().float(), torch.float32)


def check_sum(case: Case, world: World, rank: int, hosts: Sequence[Sequence[int]], out: torch.Tensor) -> None:
    """Compare what combine returned with the oracle: bit for bit where all sums are exact."""
    want, magnitude = expected_sum(case, world, rank, hosts)
    assert out.dtype == want.dtype and out.shape == want.shape, f"combine: {out.dtype} {tuple(out.shape)}"
    if case.exact:
        assert torch.equal(out, want), f"combine: largest error {(out.float() - want.float()).abs().max()}"
        return
    error = (out.double() - want.double()).abs() - TOLERANCE[case.dtype] * magnitude.double()
    assert not (error > 1e-30).any() and not out.isnan().any(), f"combine: {error.max()} beyond the tolerance"


# ------------------------------------------------------------------------------------------------------------- steps


def dispatch_args(case: Case, world: World, rank: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of dispatch or dispatch_send on `rank`."""
    weights = world.weights[rank] if case.weights_at == "dispatch" else None
    scales = world.given_scales[rank] if world.given_scales is not None else None
    return (world.x[rank], world.ids[rank], weights), {"fp8": case.fp8, "scales": scales}


def combine_weights(case: Case, world: World, rank: int, got: object) -> torch.Tensor | None:
    late = case.weights_at == "combine" and not isinstance(got, Contiguous)
    return world.weights[rank] if late else None


def run_step(a2a: AllToAll, case: Case, step: int, layout: Any, **more: Any) -> torch.Tensor:
    """One step, checked. Returns combine's result. more: arguments of dispatch."""
    rank = a2a.rank
    world = world_of(case, a2a.world_size, step)
    args, keywords = dispatch_args(case, world, rank)
    got = a2a.dispatch(*args, layout=layout, alignment=case.alignment, **keywords, **more)
    check_dispatched(case, world, rank, got)
    y = expert_output(case, world, rank, got)
    out = a2a.combine(y, got.handle, combine_weights(case, world, rank, got))
    check_sum(case, world, rank, a2a.hosts, out)
    return out


@dataclass
class Flight:
    """One step of one channel, made move by move and checked. Its number also chooses the layout."""

    a2a: AllToAll
    case: Case
    number: int
    channel: str | None = None
    world: World | None = None
    handle: Handle | None = None
    got: Any = None

    def send(self) -> None:
        self.world = world_of(self.case, self.a2a.world_size, self.number)
        args, keywords = dispatch_args(self.case, self.world, self.a2a.rank)
        self.handle = self.a2a.dispatch_send(*args, channel=self.channel, **keywords)

    def receive(self) -> None:
        layout = self.case.layouts[self.number % len(self.case.layouts)]
        self.got = self.a2a.dispatch_recv(self.handle, layout=layout, alignment=self.case.alignment)
        check_dispatched(self.case, self.world, self.a2a.rank, self.got)

    def send_back(self) -> None:
        y = expert_output(self.case, self.world, self.a2a.rank, self.got)
        self.a2a.combine_send(y, self.handle, combine_weights(self.case, self.world, self.a2a.rank, self.got))

    def finish(self) -> None:
        out = self.a2a.combine_recv(self.handle)
        check_sum(self.case, self.world, self.a2a.rank, self.a2a.hosts, out)

    def run(self) -> None:
        self.send()
        self.land()

    def land(self) -> None:
        self.receive()
        self.send_back()
        self.finish()


def run_case(ctx: Ctx, case: Case, **options: Any) -> None:
    """All steps of a case on an object of its own; a failure names the case and the step."""
    with ctx.a2a(case.config(), **options) as a2a:
        for step, layout in enumerate(case.layouts):
            try:
                run_step(a2a, case, step, layout)
            except AssertionError as error:
                raise AssertionError(f"{case}, step {step}, layout {layout}: {error}") from error


def run_cases(ctx: Ctx, cases: Iterable[Case]) -> int:
    """Returns how many ran."""
    count = 0
    for case in cases:
        run_case(ctx, case)
        count += 1
    return count


def payloads(ranks: int) -> Iterator[Case]:
    """Every dtype with every FP8 form, with the other choices taking turns beside them."""
    count = 0
    for dtype in DTYPES:
        for fp8 in FP8:
            yield Case(
                experts=4 * ranks,
                top_k=(4, 1, 3)[count % 3],
                hidden=(128, 384, 640)[count % 3],
                dtype=dtype,
                fp8=fp8,
                quantised=fp8 is not None and count % 2 == 0,
                weights_at=("dispatch", "combine")[count // 2 % 2],
                routing=("uniform", "zipf", "k-hot")[count // 3 % 3],
                alignment=(1, 128, 8)[count % 3],
                id_dtype=(torch.int64, torch.int32)[count % 2],
                exact=count % 4 != 3,
                seed=count,
            )
            count += 1
