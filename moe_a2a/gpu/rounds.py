"""Contiguous steps of a GPU rank whose buffers have room for fewer rows than can arrive: they go in rounds.

Each round takes `Layout.W` tokens of every rank. Their rows are sent into the buffers, and moved from there into
tensors of the caller; at combine, the rows of as many tokens come back and are added up. The rounds of a step are as
many as M tokens a rank need, so that no host waits; those in which nobody has tokens are launches that do nothing. With
host_counts the host knows how many there are.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_a2a.checks import padded
from moe_a2a.errors import HandleError
from moe_a2a.fp8 import FP8, scale_columns
from moe_a2a.gpu.contiguous import ContiguousRank
from moe_a2a.gpu.contiguous_state import ContiguousHandle, Sent, Tables
from moe_a2a.gpu.handle import Channel
from moe_a2a.gpu.lockstep import Launches, alone
from moe_a2a.gpu.masked import MaskedRank
from moe_a2a.kernels.round_combine import round_combine_recv, round_combine_send
from moe_a2a.kernels.round_recv import round_recv
from moe_a2a.kernels.round_send import round_send
from moe_a2a.step import Phase
from moe_a2a.types import Contiguous, Handle


def contiguous_rank(base: MaskedRank, num_sms: int) -> ContiguousRank:
    """One rank's contiguous steps, in rounds if its buffers ask for it."""
    return (ContiguousRank if base.layout.ROUNDS == 1 else RoundsRank)(base, num_sms)


class RoundsRank(ContiguousRank):
    """`ContiguousRank` in rounds. What differs: arguments of a dispatch must stay unchanged until its receiving half
    has run, and y until that of combine has; and results are not views of the channel's memory, but the caller's."""

    def dispatch_rows(self, handle: ContiguousHandle, *, receive: bool = False) -> None:
        """Launch the first round's sending, after `dispatch_layout`. receive changes nothing: rows have to be moved.
        Raises HandleError."""
        mine, state = self._step(handle, Phase.SENT)
        if mine.rounds:
            raise HandleError(f"{mine!r}: its rows are sent already")
        mine.rounds = self.layout.ROUNDS
        assert mine.sent is not None
        self._send(mine, state, mine.sent, 0)

    def dispatch_recv(
        self,
        handle: Handle,
        *,
        alignment: int = 128,
        host_counts: bool = False,
        out: torch.Tensor | None = None,
    ) -> Contiguous:
        """Launch the receiving half, and the sending of all rounds but the first. The result has R*M rows, or, with
        host_counts, which waits for the counts, exactly the received ones; what of it is not `out` is new. Raises
        InputError, HandleError."""
        return alone(self.receiving(handle, alignment=alignment, host_counts=host_counts, out=out))

    def receiving(
        self,
        handle: Handle,
        *,
        alignment: int = 128,
        host_counts: bool = False,
        out: torch.Tensor | None = None,
    ) -> Launches[Contiguous]:
        """`dispatch_recv`, for ranks that share a stream."""
        mine, state = self._step(handle, Phase.SENT)
        layout, base, sent = self.layout, self.base, mine.sent
        if sent is None or not mine.rounds:
            raise HandleError(f"{mine!r}: its rows are not sent yet")
        dtype = self.config.dtype if mine._fp8 is None else FP8
        most, rounds, counts_list = layout.MOST, layout.ROUNDS, None
        if host_counts:
            *words, rounds = self.counts_on_host(mine)
            most, counts_list = sum(words[: layout.R]), padded(words[layout.R :], alignment)
        if out is not None:
            self.check_out(out, dtype, most)
            out = out[:most]
        x, device = torch.empty((most, layout.H), dtype=dtype, device=self.device) if out is None else out, self.device
        scales = None
        if mine._fp8 is not None:
            width, form = scale_columns(layout.H, mine._fp8)
            shape = (width, most) if mine._fp8 == "ue8m0" else (most, width)
            scales = torch.empty(shape, dtype=form, device=device)
        counts = torch.empty(layout.E_L, dtype=torch.int32, device=device)
        tokens_per_rank = torch.empty(layout.R, dtype=torch.int32, device=device)
        if mine.tables is None:
            mine.tables = self._new_tables(mine)
        if mine.wait_times is not None:
            base._watch(mine, layout.DISPATCH)
        mine.rounds = rounds
        for turn in range(rounds):
            if turn > 0:
                yield
                self._send(mine, state, sent, turn)
                yield
            round_recv(
                layout,
                base.rank,
                x,
                mine.tables,
                scales,
                counts,
                tokens_per_rank,
                mine.bits,
                mine.known,
                mine.block,
                turn,
                turn == rounds - 1,
                came=mine.slot.places,
                routing=mine.routing,
                **self._waiting(mine, state),
            )
        mine.sent, mine.rows, mine.phase = None, most, Phase.RECEIVED
        ids, weights, source = mine.tables
        return Contiguous(
            x,
            ids[:most],
            None if weights is None else weights[:most],
            counts,
            tokens_per_rank,
            source[:most],
            scales.t() if scales is not None and mine._fp8 == "ue8m0" else scales,
            mine,
            counts_list,
            rounds,
        )

    # combine

    def combine_send(self, y: torch.Tensor, handle: Handle) -> None:
        """Launch the first round of the way back. y: as for `ContiguousRank`, but it must stay unchanged until
        `combine_recv` has run. Raises InputError, HandleError."""
        mine, state = self._step(handle, Phase.RECEIVED)
        mine.outputs = self._outputs_of_experts(y, mine)
        self._send_sums(mine, state, mine.outputs, 0)
        mine.phase = Phase.COMBINING

    def combine_recv(self, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Launch the sums over ranks, and the sending of all rounds but the first; ends the step. Returns [T, H] of
        config.dtype, in `out` if given. Raises InputError, HandleError."""
        return alone(self._summing(handle, out))

    def combine(self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """`combine_send` and `combine_recv`. Raises InputError, HandleError, before anything is sent."""
        return alone(self.combining(y, handle, out=out))

    def combining(self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None) -> Launches[torch.Tensor]:
        """`combine`, for ranks that share a stream."""
        mine, _ = self._step(handle, Phase.RECEIVED)
        result = self.base._outputs.sums(mine.tokens, out)
        self.combine_send(y, mine)
        yield
        return (yield from self._summing(mine, result))

    def combine_apart(self, y: torch.Tensor, handle: Handle) -> None:
        """`combine_send`: in rounds there is no other way."""
        self.combine_send(y, handle)

    def combine_sums(self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """`combine_recv`, which does not take y anew."""
        return self.combine_recv(handle, out=out)

    def _summing(self, handle: Handle, out: torch.Tensor | None) -> Launches[torch.Tensor]:
        mine, state = self._step(handle, Phase.COMBINING)
        result, y = self.base._outputs.sums(mine.tokens, out), mine.outputs
        assert y is not None
        if mine.wait_times is not None:
            self.base._watch(mine, self.layout.COMBINE)
        for turn in range(mine.rounds):
            if turn > 0:
                yield
                self._send_sums(mine, state, y, turn)
                yield
            round_combine_recv(
                self.layout,
                self.base.rank,
                y,
                result,
                turn,
                turn == mine.rounds - 1,
                came=mine.slot.places,
                routing=mine.routing,
                **self._waiting(mine, state),
            )
        mine.outputs = None
        return self._done(mine, result)

    # helpers

    def _send(self, mine: ContiguousHandle, state: Channel, sent: Sent, turn: int) -> None:
        """Launch the sending of one round of dispatch."""
        if turn == 1:  # other kernels than the first round's
            self.base.before_launch(mine, ("later rounds", sent.mode, mine._fp8, mine.known, mine.has_weights))
        round_send(
            self.layout,
            self.base.rank,
            sent.x,
            sent.weights,
            sent.scales,
            sent.mode,
            mine.bits,
            mine.known,
            mine.ticket,
            turn,
            largest_weight=self.base._largest_weight,
            routing=mine.routing,
            host=mine.slot.host,
            **self._waiting(mine, state),
        )

    def _send_sums(self, mine: ContiguousHandle, state: Channel, y: torch.Tensor, turn: int) -> None:
        """Launch the sending of one round of combine."""
        if turn < 2:
            self.base.before_launch(mine, ("combine in rounds", turn))
        round_combine_send(self.layout, self.base.rank, y, turn, came=mine.slot.places, **self._waiting(mine, state))

    def _new_tables(self, mine: ContiguousHandle) -> Tables:
        """As many rows as any later step that follows this one's routing may hand out."""
        layout, device = self.layout, self.device
        return (
            torch.empty((layout.MOST, layout.K), dtype=torch.int64, device=device),
            torch.empty((layout.MOST, layout.K), device=device) if mine.has_weights else None,
            torch.empty(layout.MOST, dtype=torch.int32, device=device),
        )

    def _waiting(self, mine: ContiguousHandle, state: Channel) -> dict[str, Any]:
        """What every launch of a round takes."""
        return {
            "region": state.region,
            "peers": state.peers,
            "control": self.base.control,
            "alive": self.base._alive,
            "live": state.live,
            "handle": mine.slot.handle,
            "report": self.base.report,
            "programs": self._programs,
        }
