"""Who is in the group: views that all members agree on, the store that they agree through, and the watchers that see
ranks die (DESIGN.md D5, D6, D8). docs/membership.md explains how the parts fit."""

import importlib
from typing import TYPE_CHECKING

# Imported on first use: watchers live in this package, and should start quickly.
if TYPE_CHECKING:
    from moe_a2a.membership.group import found_group, join_group
    from moe_a2a.membership.member import Member, MemberOptions
    from moe_a2a.membership.store import open_store
    from moe_a2a.membership.store_process import start_store
    from moe_a2a.membership.view import Endpoint, Slot, State, View

__all__ = [
    "Endpoint",
    "Member",
    "MemberOptions",
    "Slot",
    "State",
    "View",
    "found_group",
    "join_group",
    "open_store",
    "start_store",
]

_MODULE_OF = {
    "Endpoint": "view",
    "Member": "member",
    "MemberOptions": "member",
    "Slot": "view",
    "State": "view",
    "View": "view",
    "found_group": "group",
    "join_group": "group",
    "open_store": "store",
    "start_store": "store_process",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
