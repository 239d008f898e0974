"""What a group agrees on: an immutable `View`, and the pure functions that make the next one.

Every function returns a view with the next epoch, or the very same object if there is nothing to change. That makes
them idempotent: a proposal may be made twice, by several ranks, or again after its outcome was lost.

The idea of an immutable view with a generation that every change bumps is TensorRT-LLM's expert-parallel health.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from moe_a2a.errors import ConfigError, JoinRefused

MAX_RANKS = 1024
MAX_CHANNELS = 64
MAX_TEXT = 255
MAX_NUMBER = (1 << 63) - 1
#: A store that lost its data starts anew at the next multiple of this, so that epochs grow through its loss as well.
LIFE = 1 << 20


class State(str, Enum):
    """Of a slot. Only ranks that are ACTIVE or LEAVING take part in steps."""

    FREE = "free"  # nobody has had it
    READY = "ready"  # a process holds it and waits to be activated
    ACTIVE = "active"
    LEAVING = "leaving"  # takes part until its last steps
    LEFT = "left"
    FAILED = "failed"


_TAKES_PART = (State.ACTIVE, State.LEAVING)
_HELD = (State.READY, State.ACTIVE, State.LEAVING)


@dataclass(frozen=True)
class Endpoint:
    """A process that holds a slot.

    address: "host:port" where the watcher of its host takes messages; equal for the ranks of a host.
    incarnation: 1 to 2^63 - 1, drawn at random for each life of a slot. A new incarnation always comes with a fresh
        communication region, so that a slot can be given again while its old process may still be writing.
    host: label of its host; ranks with one label share memory (hosts.py).
    """

    address: str
    incarnation: int
    host: str

    def __post_init__(self) -> None:
        _check_text("address", self.address)
        _check_text("host", self.host)
        _check_number("incarnation", self.incarnation, 1)


@dataclass(frozen=True)
class Slot:
    """One numbered place of a group.

    first: [channels], the first step of each channel that this rank takes part in.
    last: [channels], the first steps that it takes no part in any more; only of a rank that is LEAVING or has LEFT.
    note: why it FAILED.
    """

    state: State = State.FREE
    endpoint: Endpoint | None = None
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    note: str = ""

    @property
    def incarnation(self) -> int:
        """Of the process that holds or held it; 0 if it is free."""
        return self.endpoint.incarnation if self.endpoint else 0

    @property
    def takes_part(self) -> bool:
        return self.state in _TAKES_PART


@dataclass(frozen=True)
class View:
    """What all members agree on. Slots are never renumbered: a dead rank leaves a hole.

    epoch: number of this view, from 1.
    channels: names of the group's channels; `first` and `last` of slots are in this order.
    slots: one for each rank that the group can ever have at a time (max_ranks).

    A view takes effect at once for ranks that fail: a step under way ends without them and is faulted. For ranks that
    join or leave it takes effect at the steps that their slots name, which are still to come: `members` has the rule.
    """

    epoch: int
    channels: tuple[str, ...]
    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        _check_number("epoch", self.epoch, 1)
        if not 1 <= len(self.slots) <= MAX_RANKS:
            raise ConfigError(f"max_ranks={len(self.slots)}; allowed is 1 to {MAX_RANKS}")
        if not 1 <= len(self.channels) <= MAX_CHANNELS or len(set(self.channels)) != len(self.channels):
            raise ConfigError(f"channels={self.channels!r}; give 1 to {MAX_CHANNELS} different names")
        for name in self.channels:
            _check_text("channel", name)
        seen: dict[int, int] = {}
        for rank, slot in enumerate(self.slots):
            if (slot.state is State.FREE) != (slot.endpoint is None):
                raise ConfigError(f"slot {rank} is {slot.state.value} and has endpoint {slot.endpoint}")
            if len(slot.note) > MAX_TEXT:
                raise ConfigError(f"slot {rank} has a note of {len(slot.note)} characters; allowed are {MAX_TEXT}")
            for name, steps, needed in (
                ("first", slot.first, slot.takes_part),
                ("last", slot.last, slot.state is State.LEAVING),
            ):
                if len(steps) not in ((len(self.channels),) if needed else (0, len(self.channels))):
                    raise ConfigError(
                        f"slot {rank} is {slot.state.value} with {len(steps)} {name} steps; "
                        f"give one for each of the {len(self.channels)} channels"
                    )
                for step in steps:
                    _check_number(f"{name} step", step, 0)
            if slot.endpoint and seen.setdefault(slot.incarnation, rank) != rank:
                raise ConfigError(f"slots {seen[slot.incarnation]} and {rank} have one incarnation; draw each anew")

    @classmethod
    def of(cls, endpoints: Sequence[Endpoint], max_ranks: int, channels: Sequence[str] = ("default",)) -> View:
        """The first view of a group: rank i has endpoints[i] and takes part from step 0; the other slots are free."""
        if not 1 <= len(endpoints) <= max_ranks <= MAX_RANKS:
            raise ConfigError(
                f"max_ranks={max_ranks} for {len(endpoints)} ranks; allowed is {len(endpoints)} to {MAX_RANKS}"
            )
        start = (0,) * len(channels)
        slots = [Slot(State.ACTIVE, endpoint, start) for endpoint in endpoints]
        return cls(1, tuple(channels), (*slots, *[Slot()] * (max_ranks - len(endpoints))))

    @property
    def max_ranks(self) -> int:
        return len(self.slots)

    @property
    def active(self) -> tuple[bool, ...]:
        """[max_ranks], the active mask."""
        return tuple(slot.takes_part for slot in self.slots)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The active ranks, ascending."""
        return tuple(rank for rank, slot in enumerate(self.slots) if slot.takes_part)

    @property
    def size(self) -> int:
        """One past the highest active rank (torch.distributed's world size of a group with holes)."""
        return max(self.ranks, default=-1) + 1

    def members(self, channel: str, step: int) -> tuple[int, ...]:
        """The ranks that take part in a step of a channel, as far as this view knows."""
        index = self.channels.index(channel)
        return tuple(
            rank
            for rank, slot in enumerate(self.slots)
            if slot.takes_part and slot.first[index] <= step and not (slot.last and slot.last[index] <= step)
        )

    def incarnations(self, ranks: Sequence[int]) -> dict[int, int]:
        """rank -> incarnation, as `mark_failed` takes it."""
        return {rank: self.slots[rank].incarnation for rank in ranks}

    def holds(self, rank: int, incarnation: int) -> bool:
        """Whether this very process takes part."""
        return (
            0 <= rank < self.max_ranks and self.slots[rank].takes_part and self.slots[rank].incarnation == incarnation
        )

    def open_slot(self) -> int:
        """The lowest slot that nobody holds. Raises JoinRefused if all are taken."""
        found = next((rank for rank, slot in enumerate(self.slots) if slot.state not in _HELD), None)
        if found is None:
            raise JoinRefused(f"all {self.max_ranks} slots are taken; wait for one to be free, or raise max_ranks")
        return found

    def watchers(self) -> dict[str, str]:
        """host -> address of its watcher, of the hosts that hold a slot."""
        return {
            slot.endpoint.host: slot.endpoint.address for slot in self.slots if slot.endpoint and slot.state in _HELD
        }


def mark_failed(view: View, ranks: Mapping[int, int], note: str = "") -> View:
    """The view without these ranks. ranks: rank -> incarnation; one that does not hold its slot is ignored."""

    def fail(slot: Slot) -> Slot:
        return Slot(State.FAILED, slot.endpoint, slot.first, (), note[:MAX_TEXT])

    return _change(view, ranks, _HELD, fail)


def reserve(view: View, rank: int, endpoint: Endpoint) -> View:
    """The view in which a new process holds a slot and waits for `join`. Raises JoinRefused if another one has it."""
    if not 0 <= rank < view.max_ranks:
        raise JoinRefused(f"slot {rank} does not exist; this group has slots 0 to {view.max_ranks - 1}")
    slot = view.slots[rank]
    if slot.incarnation == endpoint.incarnation:
        if slot.state in _HELD:
            return view
        raise JoinRefused(f"this incarnation of rank {rank} is {slot.state.value}; come back with a new one")
    if slot.state in _HELD:
        raise JoinRefused(
            f"slot {rank} is taken by a live rank of {_host(slot)} ({slot.state.value}); take another slot"
        )
    return _next(view, {rank: Slot(State.READY, endpoint)})


def join(view: View, ranks: Mapping[int, int], first: Sequence[int]) -> View:
    """The view in which ranks that are ready take part, from these steps on.

    ranks: rank -> incarnation; one that takes part already stays as it is. first: [channels], steps that no active rank
    has begun. Raises JoinRefused if a rank is not ready.
    """
    _check_steps(view, first)
    for rank, incarnation in ranks.items():
        slot = view.slots[rank] if 0 <= rank < view.max_ranks else Slot()
        if slot.incarnation != incarnation or slot.state not in _HELD:
            raise JoinRefused(
                f"rank {rank} is {slot.state.value}, and not ready; let its process reserve the slot first"
            )
    return _change(view, ranks, (State.READY,), lambda slot: replace(slot, state=State.ACTIVE, first=tuple(first)))


def leave(view: View, ranks: Mapping[int, int], last: Sequence[int] | None = None) -> View:
    """The view in which ranks leave of their own will.

    last: [channels], the first steps that they take no part in; until then they drain (LEAVING), and a second call
    without `last` ends it. Without `last` they are out at once. Ranks that do not hold their slot are ignored.
    """
    if last is not None:
        _check_steps(view, last)
        steps = tuple(last)
        return _change(view, ranks, (State.ACTIVE,), lambda slot: replace(slot, state=State.LEAVING, last=steps))
    return _change(view, ranks, _HELD, lambda slot: replace(slot, state=State.LEFT))


def strike(view: View, ranks: Mapping[int, int]) -> View:
    """The view in which ranks that failed have left: whoever went on counting on them need not any more."""
    return _change(view, ranks, (State.FAILED,), lambda slot: replace(slot, state=State.LEFT))


def move_watcher(view: View, host: str, address: str) -> View:
    """The view in which a host's watcher takes messages elsewhere."""
    changed = {
        rank: replace(slot, endpoint=replace(slot.endpoint, address=address))
        for rank, slot in enumerate(view.slots)
        if slot.state in _HELD and slot.endpoint and slot.endpoint.host == host and slot.endpoint.address != address
    }
    return _next(view, changed) if changed else view


def reborn(view: View) -> View:
    """The same view as the first of a store that has lost its data."""
    return replace(view, epoch=(view.epoch // LIFE + 1) * LIFE)


def _change(view: View, ranks: Mapping[int, int], states: Sequence[State], new: Callable[[Slot], Slot]) -> View:
    changed = {
        rank: new(view.slots[rank])
        for rank, incarnation in ranks.items()
        if 0 <= rank < view.max_ranks
        and view.slots[rank].incarnation == incarnation
        and view.slots[rank].state in states
    }
    return _next(view, changed) if changed else view


def _next(view: View, changed: Mapping[int, Slot]) -> View:
    slots = tuple(changed.get(rank, slot) for rank, slot in enumerate(view.slots))
    return replace(view, epoch=view.epoch + 1, slots=slots)


def _host(slot: Slot) -> str:
    return f"host {slot.endpoint.host}" if slot.endpoint else "no host"


def _check_steps(view: View, steps: Sequence[int]) -> None:
    if len(steps) != len(view.channels):
        raise ConfigError(f"{len(steps)} steps for {len(view.channels)} channels {view.channels}; give one for each")
    for step in steps:
        _check_number("step", step, 0)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT or not value.isprintable():
        raise ConfigError(f"{name}={value!r}; give 1 to {MAX_TEXT} printable characters")


def _check_number(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_NUMBER:
        raise ConfigError(f"{name}={value!r}; give an int from {low} to 2^63 - 1")
