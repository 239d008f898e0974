"""What makes a group elastic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_a2a.errors import ConfigError
from moe_a2a.membership.store import check_group, split_url

#: Announcements of sums have one bit for each rank.
MOST_RANKS = 64


@dataclass(frozen=True)
class Elastic:
    """An elastic group: it goes on when ranks are lost, and takes new ones in. CPU ranks only.

    store: address of the membership store ("tcp://10.0.0.1:2379", `moe-a2a store`). "": rank 0 starts one on its
        machine's loopback when the group is founded, for ranks on one machine.
    max_ranks: slots that the group has for its whole life, 1 to 64; experts and buffers are shared out among all of
        them. None: as many as there are ranks at the start.
    group: the group's name in the store.
    join: take a slot of a group that exists (`rank=`, or the lowest that is free) in place of founding one.
    timeout_s: seconds that founding, joining, leaving and the store may take. How long a step may wait for a rank says
        Options.timeout_s.
    control_address: address of this machine where hosts tell each other of deaths; loopback suits one machine only.

    Raises ConfigError.
    """

    store: str = ""
    max_ranks: int | None = None
    group: str = "default"
    join: bool = False
    control_address: str = "127.0.0.1"
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.store:
            split_url(self.store)
        elif self.join:
            raise ConfigError("join=True needs store=, the address of the group's membership store")
        check_group(self.group)
        slots = self.max_ranks
        if slots is not None and (
            isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= MOST_RANKS
        ):
            raise ConfigError(f"max_ranks={slots!r}; give an int from 1 to {MOST_RANKS}")
        if not isinstance(self.timeout_s, (int, float)) or not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            raise ConfigError(f"timeout_s={self.timeout_s!r}; give a finite number of seconds above 0")
        if not isinstance(self.join, bool):
            raise ConfigError(f"join={self.join!r}; give True or False")
