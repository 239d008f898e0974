"""What a transport is."""

from __future__ import annotations

from typing import Protocol

from moe_a2a.routing import Arrival, Contribution
from moe_a2a.step import Step
from moe_a2a.transport.wire import FloatArray

#: Where a contribution stands in a token's sum: (host, rank). Equal on every rank, whoever looks.
SumOrder = tuple[int, int]


class Transport(Protocol):
    """Moves one step's rows to and from `sources`, in four moves: dispatch, (weights), partial sums, combine.

    `send_*` never waits for a peer. `recv_*` waits until every source, those with no tokens included, has announced
    its part, and
    raises RankLost after the budget. Rows are read where they lie: an `Arrival` or `Contribution` names rows of the
    host's memory table (`Arena`), valid until this rank starts the step after the next.
    """

    sources: tuple[int, ...]

    def send_dispatch(self, step: Step) -> None:
        """Make `step.outgoing` readable for the ranks that this transport reaches."""

    def recv_dispatch(self, step: Step) -> list[Arrival]:
        """What the sources sent, in rank order."""

    def send_weights(self, step: Step, weights: FloatArray) -> None:
        """Send router weights [T, K] after the dispatch (weights given at combine)."""

    def recv_weights(self, step: Step) -> dict[int, FloatArray]:
        """Source rank -> weights [n, K], in the order of its arrival's rows."""

    def send_combine(self, step: Step, discarded: bool) -> None:
        """Announce that the partial sums for the sources lie in `Arena.partials`, or that there are none."""

    def recv_combine(self, step: Step, discarded: bool = False) -> dict[SumOrder, Contribution]:
        """The sums that came back for this rank's own tokens. Raises HandleError unless
        all ranks did the same: combine the step, or discard it (then the result means nothing)."""
