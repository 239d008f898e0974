"""Every error that moe-a2a raises. Messages say what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_a2a.types import Handle


class MoeA2AError(RuntimeError):
    """Base of all errors of this package."""


class ConfigError(MoeA2AError, ValueError):
    """A configuration that cannot work, or that differs between ranks. Raised at construction."""


class InputError(MoeA2AError, ValueError):
    """A call's arguments are wrong. Nothing was sent; the object and the handle stay usable.

    ``handle`` is None, but for a `dispatch` whose ``out`` turned out to have too few rows for what arrived: then it is
    the handle of that step, for `dispatch_recv` with a larger ``out`` or for `discard`.
    """

    handle: Handle | None = None


class NotFinite(InputError):
    """Router weights, or hidden states to be quantised, hold a NaN or an infinity, or a weight is beyond the payload's
    range.

    GPU ranks send them as they are, and a later call raises this: no step is lost but for these values. On CPU ranks
    nothing was sent.
    """


class HandleError(MoeA2AError):
    """A handle was used out of order, twice, or with an object that did not make it: nothing was sent. Or some ranks
    combined a step that others discarded: then the object is broken and must be closed."""


class EngineError(MoeA2AError):
    """The Mooncake Transfer Engine cannot be loaded, is too old, or cannot reach a peer."""


class RankLost(MoeA2AError, TimeoutError):
    """A rank did not do its part of a step in time, or its process is gone.

    ``ranks`` names the ranks that are missing. The step's result is lost and the object cannot be used further:
    close it and build a new group.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class ExcludedFromView(MoeA2AError):
    """This rank is not part of the group's view: it was found failed, or it left. What it would send is not wanted.

    It may come back with `AllToAll.elastic.rejoin()`, or `Member.rejoin()`, which give it a new incarnation.
    """


class JoinRefused(MoeA2AError):
    """A process cannot have the slot that it asked for; the message says why. The group did not notice."""


class StoreAway(MoeA2AError, ConnectionError):
    """The membership store does not answer: the view is frozen until it is back. Steps go on without it."""


class MessageError(MoeA2AError, ValueError):
    """Bytes from the store or the network are not a message of this version of moe-a2a. They were not used."""
