"""What an operation hands back: torch's Work, which also says which ranks were lost."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.futures import Future

from moe_a2a.errors import MoeA2AError, RankLost

#: Drives an operation until it has ended or so many seconds are over; False in the latter case.
Drive = Callable[["CollectiveWork", "float | None"], bool]


class CollectiveWork(torch.distributed.Work):
    """One operation of a group. Ends exactly once, right or failed.

    failed_ranks: the ranks (slots) because of which it failed, as this rank sees it: evidence, no verdict. epoch,
    ranks: of the view that it ran in, and who took part in that.
    """

    def __init__(self, name: object, result: list[torch.Tensor], drive: Drive, raises: bool) -> None:
        super().__init__()
        self._name, self.epoch = name, 0
        self.ranks: tuple[int, ...] = ()
        self.failed_ranks: tuple[int, ...] = ()
        self._result, self._drive, self._raises = result, drive, raises
        #: Set by those who need them: slots of the group; called before it ends, by whoever drives it.
        self.slots = 0
        self.before_end: Callable[[], None] | None = None
        self._source = -1
        self._done = False
        self._error: MoeA2AError | None = None
        self._future: Future[Any] | None = None

    @property
    def name(self) -> str:
        """What was called."""
        return str(self._name)

    @property
    def succeeded(self) -> bool:
        """Whether it has ended and its result is right on this rank."""
        return self._done and self._error is None

    def is_completed(self) -> bool:
        return self._done

    def is_success(self) -> bool:
        return self.succeeded

    def exception(self) -> Any:
        """The error that it ended with, None if it was right or has not ended."""
        return self._error

    def result(self) -> list[torch.Tensor]:
        return self._result

    def source_rank(self) -> int:
        """The sender, of a receive that has ended."""
        return self._source

    def _source_rank(self) -> int:
        return self._source

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until it has ended, by its own budget at the latest. Returns `succeeded`.

        timeout: if above 0, wait no longer than this, and raise MoeA2AError if it has not ended; it goes on. Raises
        RankLost if it lost a rank, unless `Options.raises` is False; other errors always.
        """
        seconds = timeout.total_seconds()
        if not self._drive(self, seconds if seconds > 0 else None):
            raise MoeA2AError(f"{self.name} has not ended within {seconds:g} s; it goes on: wait() again")
        if self._error is not None and (self._raises or not isinstance(self._error, RankLost)):
            raise self._error
        return self.succeeded

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> Future[Any]:
        """Done when the operation has ended: with the list of its output tensors, or with its error."""
        if self._future is None:
            self._future = Future()
            if self._done:
                self._settle()
        return self._future

    # for the group

    def came_from(self, rank: int) -> None:
        self._source = rank

    def end(self, error: MoeA2AError | None = None, failed_ranks: tuple[int, ...] = ()) -> None:
        if self.before_end is not None:
            self.before_end()
        self._error, self.failed_ranks = error, failed_ranks
        self._done = True
        if self._future is not None and not self._future.done():
            self._settle()

    def _settle(self) -> None:
        assert self._future is not None
        if self._error is None:
            self._future.set_result(self._result)
        else:
            self._future.set_exception(self._error)
