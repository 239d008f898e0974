"""Which channel names are in use in this process."""

from __future__ import annotations

import threading
from typing import ClassVar

from moe_a2a.errors import ConfigError


class Names:
    """Channel names in use in this process, by group or store: two objects on one would read each other's rows."""

    _lock = threading.Lock()
    _used: ClassVar[dict[tuple[int, str], object]] = {}

    @classmethod
    def claim(cls, identity: object, channels: tuple[str, ...]) -> None:
        with cls._lock:
            taken = [c for c in channels if (id(identity), c) in cls._used]
            if taken:
                raise ConfigError(
                    f"channel {taken[0]!r} of this group is in use by another AllToAll; close that one, or give "
                    f"other channel names"
                )
            for channel in channels:
                cls._used[id(identity), channel] = identity  # held, so that the id is not given again

    @classmethod
    def release(cls, identity: object, channels: tuple[str, ...]) -> None:
        with cls._lock:
            for channel in channels:
                cls._used.pop((id(identity), channel), None)
