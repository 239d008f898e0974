"""The tensor of active ranks, while the watcher writes a view."""

from __future__ import annotations

import dataclasses
import threading
import time

import torch

from moe_a2a.compat.mooncake.mirror import Mirror
from moe_a2a.membership.page import _SEQUENCE, FIRST_SLOT, Page
from moe_a2a.membership.view import Endpoint, State, View
from moe_a2a.membership.wire import encode_view


class _Member:
    """What a mirror looks at: a page and the view in it."""

    def __init__(self) -> None:
        self.page, self.closed = Page(), False
        self.first = View.of([Endpoint("127.0.0.1:1", 1 + rank, "a") for rank in range(3)], 3)
        self.page.write(self.first, encode_view(self.first))

    @property
    def view(self) -> View:
        view = self.page.read()[0]
        assert view is not None
        return view

    def wait(self, until: object, timeout_s: float) -> None:
        time.sleep(timeout_s)


def test_who_has_seen_that_a_rank_is_gone_finds_it_gone_from_the_tensor():
    """Waits look at a rank's word, which is written before the rest of the view is."""
    member, tensor = _Member(), torch.zeros(3, dtype=torch.int32)
    mirror = Mirror(tensor, 3, "reconcile")
    mirror._member = member  # without the thread that follows
    mirror.refresh()
    assert tensor.tolist() == [1, 1, 1]
    slots = list(member.first.slots)
    slots[1] = dataclasses.replace(slots[1], state=State.FAILED)
    second = dataclasses.replace(member.first, epoch=member.first.epoch + 1, slots=tuple(slots))
    member.page.words[_SEQUENCE] |= 1
    member.page.words[FIRST_SLOT + 1] = 0
    assert not member.page.takes_part(1, slots[1].incarnation) and member.page.epoch == member.first.epoch
    rest = threading.Timer(0.05, lambda: member.page.write(second, encode_view(second)))
    rest.start()
    mirror.refresh()
    assert tensor.tolist() == [1, 0, 1]
    rest.join()
    member.page.close()
