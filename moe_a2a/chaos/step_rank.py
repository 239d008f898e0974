"""A rank of a chaos run that makes steps of an elastic all-to-all."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

from moe_a2a.all_to_all import AllToAll
from moe_a2a.chaos.rank import Place, Rank, Run
from moe_a2a.chaos.steps import Flight
from moe_a2a.config import Options
from moe_a2a.elastic.backend import ElasticBackend
from moe_a2a.elastic.options import Elastic
from moe_a2a.errors import ExcludedFromView
from moe_a2a.membership.member import Member


def make(pipe: Connection, run: Run, rank: int, place: Place) -> Rank:
    return _StepRank(pipe, run, rank, place)


class _StepRank(Rank):
    _a2a: AllToAll

    def found(self) -> None:
        run = self.run
        founders: dict[str, Any] = {"store": self.meeting(), "rank": self.rank, "world_size": run.load.ranks}
        self._a2a = AllToAll(run.load.config(), elastic=self._elastic(False), **founders, **self._options())

    def join(self) -> None:
        self._a2a = AllToAll(self.run.load.config(), rank=self.rank, elastic=self._elastic(True), **self._options())

    def rejoin(self) -> None:
        assert self._a2a.elastic is not None
        self._a2a.elastic.rejoin()

    def leave(self, steps: int) -> None:
        assert self._a2a.elastic is not None
        self._a2a.elastic.leave(steps)

    def close(self) -> None:
        self._a2a.close()

    @property
    def member(self) -> Member:
        return self._backend.member

    @property
    def next(self) -> int:
        return self._backend._number[0] + 1

    def make_steps(self) -> None:
        """The next step, or the next two together: which, the number says, so that all ranks do the same."""
        number, began = self.next, time.monotonic()
        flights: list[Flight] = []
        left: ExcludedFromView | None = None
        for ahead in range(2 if number % 4 == 2 else 1):
            flight = Flight(self.run.load, self._a2a)
            try:
                self.reach(number + ahead, 0)
                flight.send(number + ahead)
            except ExcludedFromView as error:  # a rank that leaves still ends the step that is open
                left = error
                break
            flights.append(flight)
            self.reach(number + ahead, 1)
        for flight in flights:
            flight.receive()
            self.reach(flight.number, 2)
            flight.send_back()
            self.reach(flight.number, 3)
            flight.finish()
            members, missing = flight.roll.incarnations, flight.missing
            self.report(flight.number, members, missing, flight.not_received if missing else (), flight.rows, began)
            self.reach(flight.number, 4)
        if left is not None:
            raise left

    @property
    def _backend(self) -> ElasticBackend:
        backend = self._a2a._backend
        assert isinstance(backend, ElasticBackend)
        return backend

    def _options(self) -> dict[str, Any]:
        run, place = self.run, self.place
        return {"options": Options(timeout_s=run.timeout_s, host=place.host, host_address=place.host_address)}

    def _elastic(self, join: bool) -> Elastic:
        run, address = self.run, self.place.address
        return Elastic(run.store, group=run.group, join=join, control_address=address, timeout_s=run.patience_s)
