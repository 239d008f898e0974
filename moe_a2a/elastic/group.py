"""What `AllToAll.elastic` offers: who is in the group, what a step lost, and coming and going."""

from __future__ import annotations

from dataclasses import dataclass

from moe_a2a.elastic.backend import ElasticBackend
from moe_a2a.errors import InputError
from moe_a2a.membership.view import View
from moe_a2a.types import Handle


@dataclass(frozen=True)
class Lost:
    """What is not in a step's sums, of this rank's own tokens.

    tokens: how many of them miss the output of one or more of their experts. experts: those experts, ascending.
    """

    tokens: int
    experts: tuple[int, ...]


class ElasticGroup:
    """The elastic group of one `AllToAll`."""

    def __init__(self, backend: ElasticBackend) -> None:
        self._backend = backend

    @property
    def rank(self) -> int:
        """This rank's slot."""
        return self._backend.rank

    @property
    def max_ranks(self) -> int:
        return self._backend.world_size

    @property
    def view(self) -> View:
        """The newest view that this rank knows."""
        return self._backend.view

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that take part, by that view."""
        return self._backend.view.ranks

    @property
    def active(self) -> tuple[bool, ...]:
        """[max_ranks], the mask of `ranks`: what `moe_a2a.placement` takes."""
        return self._backend.view.active

    @property
    def store(self) -> str:
        """Address of the membership store, for those who join."""
        return self._backend.member.options.store

    @property
    def frozen(self) -> bool:
        """Whether the view cannot change at the moment, because the store is away. Steps go on."""
        return self._backend.member.frozen

    def lost(self, handle: Handle) -> Lost:
        """What a finished step's sums lack. Raises HandleError."""
        choices = self._backend.lost_choices(handle)
        gone = choices >= 0
        return Lost(int(gone.any(axis=1).sum()), tuple(sorted({int(expert) for expert in choices[gone]})))

    def leave(self, steps: int = 4) -> None:
        """Leave in order: this rank takes part in `steps` more steps of each channel; then `dispatch` raises
        ExcludedFromView, and it is closed. The others' steps without it are good ones.

        Raises InputError, ExcludedFromView, StoreAway.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= 1 << 32:
            raise InputError(f"steps={steps!r}; give an int from 0 to 2^32")
        self._backend.leave(steps)

    def rejoin(self) -> None:
        """Come back after ExcludedFromView, in the same slot and with fresh memory. Open steps are lost.

        Waits until the others, who must go on making steps, let this rank take part. Raises JoinRefused if another
        process has the slot, StoreAway, MoeA2AError if the group makes no steps.
        """
        self._backend.rejoin()
