"""The baselines of GPU ranks: which can run here, and each of them made ready for a case and checked against ours."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_a2a.bench.cases import Case
from moe_a2a.bench.deep_ep import DeepEp
from moe_a2a.bench.low_latency import LowLatency, Received, compare, expert_rows
from moe_a2a.bench.mooncake import Mooncake
from moe_a2a.bench.nccl import NcclAllToAll
from moe_a2a.bench.timing import Runner
from moe_a2a.config import Config
from moe_a2a.types import Masked

#: Baselines that other packages bring: the wheel, and the modules that have to load.
PEERS = {
    "deep_ep": ("sgl-deep-ep", ("deep_ep",)),
    "mooncake": ("mooncake-transfer-engine-cuda13", ("mooncake.ep", "mooncake.mooncake_ep_buffer")),
}
GPU_BASELINES = ("nccl", *PEERS)
_PEER_DTYPES = ("bf16", "fp8")


def why_absent(name: str) -> str | None:
    """Why a baseline cannot be used here, with the wheel to install, or None."""
    if name not in PEERS:
        return None
    wheel, modules = PEERS[name]
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # these packages look at the machine when they load, and raise what they like
            return f"the module {module} does not load ({type(error).__name__}: {error}); pip install {wheel}"
    return None


def in_words(error: Exception) -> str:
    """An exception of another library, with the line that raised it if it says nothing."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error) or where.line}"


@dataclass(frozen=True)
class OurStep:
    """A step of ours: its inputs, what dispatch gave, what the experts returned (`expert_rows`) and the sums."""

    case: Case
    config: Config
    rank: int
    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    got: Masked
    y: torch.Tensor
    sums: torch.Tensor


class Baselines:
    """What is to be measured beside ours, in all cases of a run. Collective; close it before the process group."""

    def __init__(self, names: Sequence[str], cases: Sequence[Case], device: torch.device) -> None:
        self.names, self._device = tuple(names), device
        self._group: dist.ProcessGroup | None = None
        if {"nccl", "mooncake"} & set(names):
            group = dist.new_group(backend="nccl")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._cases = [case for case in cases if case.dtype in _PEER_DTYPES]
        self._open: dict[str, LowLatency] = {}
        self._broken: dict[str, str] = {}

    def prepare(self, name: str, step: OurStep) -> tuple[Runner | None, str | None]:
        """A baseline for the inputs of a step, after one checked step of its own, and what is wrong with it, if so."""
        if name in PEERS and step.case.dtype not in _PEER_DTYPES:
            return None, f"it has no {step.case.dtype}, only {' and '.join(_PEER_DTYPES)}"
        try:
            return self._nccl(step) if name == "nccl" else self._peer(name, step)
        except Exception as error:  # a baseline's failure is reported beside it: ours is what the run is for
            return None, in_words(error)

    def buffer_bytes(self, name: str, case: Case) -> int | None:
        """Bytes of one rank's communication buffer, if the baseline has one of its own."""
        return self._open[name].buffer_bytes(case) if name in self._open else None

    def close(self) -> None:
        """Collective."""
        for peer in self._open.values():
            peer.close()
        self._open.clear()

    def _nccl(self, step: OurStep) -> tuple[Runner, str | None]:
        case, got = step.case, step.got
        assert self._group is not None
        nccl = NcclAllToAll(step.config, self._group, self._device, case.fp8)
        out = torch.empty_like(step.sums)

        def dispatch() -> tuple[torch.Tensor, torch.Tensor]:
            return nccl.dispatch(step.x, step.topk_ids, step.topk_weights)

        def combine(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return nccl.combine(nccl.x[:-1].view(step.y.shape) if case.fp8 is None else step.y, *found, out)

        found = dispatch()
        wrong = compare(nccl.counts, nccl.combine(step.y, *found, out), got.counts, step.sums, case.fp8 is not None)
        valid = torch.arange(step.y.shape[1], device=self._device) < got.counts[:, None]
        rows = nccl.x[:-1].view(torch.uint8).view(*step.y.shape[:2], -1)
        if wrong is None and not torch.equal(rows[valid], got.x.view(torch.uint8)[valid]):
            wrong = "rows differ from ours"
        return Runner(dispatch, combine), wrong

    def _peer(self, name: str, step: OurStep) -> tuple[Runner, str | None]:
        case = step.case
        peer = self._open.get(name) or self._make(name)
        peer.start(case)
        out = torch.empty_like(step.sums)
        got = peer.dispatch(step.x, step.topk_ids)
        y = expert_rows(got.x, got.scales, got.counts, step.rank, case)
        sums = peer.combine(y, step.topk_ids, step.topk_weights, got, out)
        wrong = compare(got.counts, sums, step.got.counts, step.sums, case.fp8 is not None)
        ready = None if case.fp8 is None else y  # FP8 rows cannot be combined: bf16 rows that lie ready can
        del y

        def combine(got: Received) -> torch.Tensor:
            rows = got.x if ready is None else ready
            return peer.combine(rows, step.topk_ids, step.topk_weights, got, out)

        return Runner(lambda: peer.dispatch(step.x, step.topk_ids), combine), wrong

    def _make(self, name: str) -> LowLatency:
        if name in self._broken:  # what failed half-way is not tried again
            raise RuntimeError(self._broken[name])
        group = dist.group.WORLD if name == "deep_ep" else self._group
        assert group is not None
        try:
            self._open[name] = DeepEp(group, self._cases) if name == "deep_ep" else Mooncake(group, self._device)
        except Exception as error:
            self._broken[name] = f"it did not start: {in_words(error)}"
            raise
        return self._open[name]
