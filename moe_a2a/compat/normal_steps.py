"""Which steps of an `AllToAll` DeepEP's handles have open, and how a step ends that nobody combines."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_a2a.all_to_all import AllToAll
from moe_a2a.compat.arguments import capturing
from moe_a2a.errors import HandleError
from moe_a2a.types import Handle

#: The attribute of a handle's recv_src_idx that says what the handle stands for: it lives as long as that tensor.
_MARK = "_moe_a2a_routed"


@dataclass(eq=False)
class Routed:
    """What a handle stands for. tokens, rows: T and N of this rank. step: the one that is open. overwritten: it had
    one, which was not combined before others needed its buffers."""

    steps: Steps
    tokens: int
    rows: int
    step: Step | None = None
    overwritten: bool = False


@dataclass(eq=False)
class Step:
    """A step that has not ended. captured: in a CUDA graph. kept: its results are copies."""

    number: int
    handle: Handle
    routed: Routed
    captured: bool
    kept: bool


@dataclass(eq=False)
class Steps:
    """The open steps of one `AllToAll`. weights: another one, for router weights that combine sends back."""

    a2a: AllToAll
    name: str
    open: list[Step] = field(default_factory=list)
    count: int = 0
    weights: AllToAll | None = None

    def make_room(self, own: Step | None) -> None:
        """End the steps whose buffers the next step uses, and `own`, which its handle has. Raises HandleError."""
        ending = [step for step in self.open if step is own or step.number < self.count]
        for step in ending:
            self.check_side(step)
        for step in ending:
            self.a2a.discard(step.handle)
            self.ended(step)
            step.routed.overwritten = step is not own and not step.kept

    def check_side(self, step: Step) -> None:
        """Raises HandleError if a step is on the other side of a graph capture: a replay makes steps of its own."""
        if step.captured != capturing(self.a2a.device):
            raise HandleError(
                f"this dispatch was made {'in' if step.captured else 'before'} a graph capture and not combined there: "
                "combine it on that side of the capture"
            )

    def begun(self, handle: Handle, routed: Routed, kept: bool) -> None:
        """A step was sent and received."""
        self.count += 1
        routed.overwritten = False
        routed.step = Step(self.count, handle, routed, capturing(self.a2a.device), kept)
        self.open.append(routed.step)

    def ended(self, step: Step) -> None:
        """A step was combined or discarded."""
        self.open.remove(step)
        step.routed.step = None


def mark(recv_src_idx: torch.Tensor, routed: Routed) -> None:
    """Let a handle with this tensor stand for `routed`."""
    setattr(recv_src_idx, _MARK, routed)


def marked(recv_src_idx: object) -> Routed | None:
    """What a handle with this tensor stands for; None for a tensor that no dispatch returned."""
    return getattr(recv_src_idx, _MARK, None)
