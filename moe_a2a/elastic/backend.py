"""CPU ranks of an elastic group: `CpuBackend` with a roll for every step, which ends without those that are lost."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from moe_a2a.backend import Health
from moe_a2a.bootstrap import Bootstrap
from moe_a2a.config import Config, Options
from moe_a2a.cpu_backend import CpuBackend
from moe_a2a.elastic.meeting import Group, found, join
from moe_a2a.elastic.options import Elastic
from moe_a2a.elastic.places import slot_host
from moe_a2a.elastic.shared import roll_of
from moe_a2a.errors import ExcludedFromView, HandleError, MoeA2AError
from moe_a2a.membership.member import Member
from moe_a2a.membership.view import State, View
from moe_a2a.routing import Contribution
from moe_a2a.step import Phase, Roll, Step
from moe_a2a.transport.protocol import SumOrder, Transport
from moe_a2a.transport.wait import Pause
from moe_a2a.transport.wire import FloatArray, Kind, step_words, withdrawn_word
from moe_a2a.types import Dispatched, Handle, Layout

#: While processes wait to be activated, this rank begins no more than so many steps of a channel without them; they
#: are activated from a step on that is so far ahead that nobody can have begun it. Ranks are at most 2 steps apart.
_STEPS_BEFORE, _STEPS_AHEAD = 2, 8
#: For so long at most, and for this share of the time-out: then they are given up, and wait for the next occasion.
_LONGEST_HOLD_S, _HOLD_SHARE = 1.0, 0.4
#: Share of the time-out that a rank takes to find the way to others before its step.
_FIND_SHARE = 0.3


class _ElasticHealth(Health):
    def refusal(self, broken: BaseException) -> MoeA2AError:
        return ExcludedFromView(str(broken)) if isinstance(broken, ExcludedFromView) else super().refusal(broken)


class ElasticBackend(CpuBackend):
    """A `Backend` for CPU ranks of an elastic group. Raises what `meeting.found` and `meeting.join` raise."""

    def __init__(
        self, config: Config, options: Options, elastic: Elastic, bootstrap: Bootstrap | None, rank: int | None
    ) -> None:
        """bootstrap: of the founders; None to join, as `rank` if given."""
        self._prepare(config, options)
        self._elastic = elastic
        self.resources = ExitStack()
        with ExitStack() as stack:
            if bootstrap is None:
                group = join(config, options, elastic, rank, stack)
            else:
                group = found(config, options, elastic, bootstrap, stack)
            self._enter(group)
            self.resources = stack.pop_all()

    def _enter(self, group: Group) -> None:
        self._group = group
        self._start(group.meeting, group.member.rank, group.member.view.max_ranks)
        self._number[:] = group.started
        self._health = _ElasticHealth()
        memory = self._arena.memory
        self._words = [
            [step_words(memory.bytes, memory.position(self.rank, block.mailbox), len(Kind)) for block in blocks]
            for blocks in self._arena.layout.blocks
        ]
        self._sequence = -1
        self._found_epoch = -1
        self._waiting: dict[int, int] = {}
        self._waiting_since = 0
        self._held_for: dict[int, int] = {}
        self._hold: list[int] = []
        self._hold_until = 0.0

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        by_host: dict[str, list[int]] = {}
        view = self._group.member.view
        for rank in view.ranks:
            by_host.setdefault(slot_host(view, rank), []).append(rank)
        return tuple(tuple(ranks) for ranks in by_host.values())

    # steps

    def _call_roll(self, channel: int) -> Roll | None:
        number = self._number[channel] + 1
        self._look_round()
        if self._held_for and number > self._hold[channel]:
            self._wait_for_activation()
        roll = self._group.lookout.roll(channel, number)
        roll.finished = min((step.number for step in self._open[channel]), default=number) - 1
        self._find_way(roll)
        return roll

    def _begin(self, step: Step) -> None:
        # Not those about sums: peers may still be reading the ones of the step before last.
        self._words[step.channel][step.parity][: Kind.PARTIALS_AWAY] = withdrawn_word(step.number)

    def _begin_sums(self, step: Step) -> None:
        self._words[step.channel][step.parity][Kind.PARTIALS_AWAY :] = withdrawn_word(step.number)

    def _receive(self, step: Step) -> None:
        super()._receive(step)
        # One that had died before this step began may have left its rows, all the same.
        roll_of(step).missing.difference_update(arrival.rank for arrival in step.arrivals)
        if self._waiting:
            self._welcome(step)

    def dispatch_recv(
        self, handle: Handle, layout: Layout | None, alignment: int, out: torch.Tensor | None, host_counts: bool
    ) -> Dispatched:
        step = self._step(handle, Phase.SENT)
        reserved = handle._reserved
        while True:
            result = super().dispatch_recv(handle, layout, alignment, out, host_counts)
            torn = self._torn(step)
            if not torn:
                return result
            roll_of(step).missing.update(torn)
            step.arrivals = [arrival for arrival in step.arrivals if arrival.rank not in torn]
            step.phase, handle._reserved = Phase.SENT, reserved

    def _torn(self, step: Step) -> set[int]:
        """Ranks that went on without this one while it read what they had announced. They count as read no more."""
        reading = roll_of(step).reading
        torn = {rank for rank, spot in reading.items() if not spot.stands(step.number)}
        for rank in torn:
            del reading[rank]
        try:
            self._group.lookout.check()
        except ExcludedFromView as error:
            self._break(error)
            raise
        return torn

    def _summed(self, step: Step, transport: Transport, arrived: Mapping[int, FloatArray]) -> Collection[int]:
        roll, railed = roll_of(step), transport is self._group.rail
        sources = [
            a.rank
            for a in step.arrivals
            if (a.rank in roll.holders) is railed and (a.rank in arrived or step.layout == "contiguous")
        ]
        roll.summed.update(sources)
        return sources

    def _add_up(self, step: Step, sums: dict[SumOrder, Contribution], out: torch.Tensor) -> None:
        roll = roll_of(step)
        while True:
            super()._add_up(step, sums, out)
            torn = self._torn(step)
            if not torn:
                return
            roll.returned -= torn
            sums = {order: sum_ for order, sum_ in sums.items() if order[1] not in torn}

    def discard(self, handle: Handle) -> None:
        step = self._step(handle, Phase.SENT, Phase.RECEIVED)
        if not step.arrivals:
            self._receive(step)
        roll_of(step).summed.update(arrival.rank for arrival in step.arrivals)
        super().discard(handle)

    def _finish(self, step: Step) -> None:
        roll, pause, lookout = roll_of(step), Pause(), self._group.lookout
        if step.tasks:
            with self._meeting.watch.driving() as drive:
                while not all(task.done for task in step.tasks):
                    if drive():
                        pause.reset()
                    else:
                        pause.rest()
                        lookout.say_that_it_waits()
        roll.missing.update(roll.incarnations.keys() - roll.returned - roll.left)
        step.phase = Phase.DONE
        self._open[step.channel].remove(step)

    def _break(self, error: MoeA2AError) -> None:
        self._health.broken = error

    # what went wrong

    def missing(self, handle: Handle) -> list[int]:
        self._health.check_open()
        roll = roll_of(self._own(handle))
        return sorted(roll.missing - roll.left)

    def lost_choices(self, handle: Handle) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """[T, K] of this rank's tokens: the expert if its output is not in the sum, else -1."""
        step = self._own(handle)
        if step.phase is not Phase.DONE:
            raise HandleError(f"{step} is {step.phase.value}; what was lost is known after combine_recv")
        ids = step.outgoing.ids
        served = np.zeros(self.world_size + 1, dtype=np.bool_)
        served[list(roll_of(step).returned)] = True
        owner = np.where(ids >= 0, ids // self.local_experts, self.world_size)
        return np.where((ids >= 0) & ~served[owner], ids, -1).astype(np.int32)

    # coming and going

    @property
    def view(self) -> View:
        return self._group.member.view

    @property
    def member(self) -> Member:
        return self._group.member

    def leave(self, steps: int) -> None:
        """Take part in so many more steps of each channel, and no longer."""
        self._health.check()
        self._group.member.leave(last=[number + 1 + steps for number in self._number])

    def rejoin(self) -> None:
        """Come back to the group that this rank was excluded from."""
        self._health.check_open()
        member = self._group.member
        elastic = replace(self._elastic, store=member.options.store, max_ranks=None, join=True)
        self._unpacker.close()
        self.resources.close()
        self._enter(join(self.config, self.options, elastic, member.rank, self.resources))

    def close(self) -> None:
        if not self._health.closed:
            self._group.keeper.close()
            self._group.member.close()
        super().close()

    def _look_round(self) -> None:
        """Between steps: take in those that were found, and see who waits to be activated."""
        group = self._group
        sequence = group.member.page.sequence
        if sequence == self._sequence and not group.keeper.has_found:
            return
        self._sequence = sequence
        group.take_in(group.keeper.take_found())
        slots = group.member.view.slots
        waiting = {rank: slot.incarnation for rank, slot in enumerate(slots) if slot.state is State.READY}
        if waiting != self._waiting:
            self._waiting, self._waiting_since = waiting, group.member.view.epoch
        if not self._held_for.items() & waiting.items():
            self._held_for = {}

    def _welcome(self, step: Step) -> None:
        """If all ranks of a step have found those who wait, hold on until they are activated; the lowest rank does
        that."""
        roll, lookout = roll_of(step), self._group.lookout
        reached = min([roll.reachable, *roll.epochs.values()])
        if (
            self._group.member.frozen
            or roll.missing
            or any(lookout.lost(roll, rank) for rank in roll.incarnations)
            or reached < self._waiting_since
            or self._held_for.items() >= self._waiting.items()
        ):
            return
        self._held_for = dict(self._waiting)
        self._hold = [number + _STEPS_BEFORE for number in self._number]
        self._hold_until = time.monotonic() + min(_LONGEST_HOLD_S, _HOLD_SHARE * self.options.timeout_s)
        if self.rank == min(roll.incarnations):
            self._group.keeper.activate(self._waiting, [number + _STEPS_AHEAD for number in self._number])

    def _find_way(self, roll: Roll) -> None:
        """Wait for the way to those that take part and were activated before this rank had found them: they came
        together with it."""
        group, lookout, pause = self._group, self._group.lookout, Pause()
        if roll.epoch == self._found_epoch:
            return
        deadline = time.monotonic() + _FIND_SHARE * self.options.timeout_s

        def unknown() -> list[int]:
            ranks = roll.incarnations.keys() - {self.rank}
            return [r for r in ranks if group.known.get(r) != roll.incarnations[r] and not lookout.lost(roll, r)]

        while left := unknown():
            group.take_in(group.keeper.take_found())
            if time.monotonic() > deadline:
                for rank in left:
                    lookout.accuse(roll, rank, f"rank {self.rank} did not find the way to it in time")
            pause.rest()
        self._found_epoch = roll.epoch
        roll.missing.update(rank for rank in roll.incarnations if lookout.lost(roll, rank))

    def _wait_for_activation(self) -> None:
        pause = Pause()
        while self._held_for and time.monotonic() < self._hold_until:
            pause.rest()
            self._look_round()
        self._held_for = {}
