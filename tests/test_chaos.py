"""`moe-a2a chaos`: a short run of everything that it does, what it can be asked for, and that it would notice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from elastic_steps import Where, new_group
from ranks import Ctx, run_ranks

from moe_a2a import AllToAll, Elastic, Options
from moe_a2a.chaos import steps
from moe_a2a.chaos.command import chaos
from moe_a2a.chaos.events import CUTS, KINDS, MOVES, POINTS, draw
from moe_a2a.chaos.network import Network, inside, why_not
from moe_a2a.chaos.tally import Tally
from moe_a2a.cli import main
from moe_a2a.errors import ConfigError

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = why_not()


def run(*arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "moe_a2a.cli", "chaos", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def test_a_group_gets_over_whatever_is_lost_and_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    """With the hosts that this machine can have: namespaces, and partitions, if it is root's."""
    state, figures = tmp_path / "state", tmp_path / "chaos.json"
    given = ["--ranks", "4", "--hosts", "2", "--seed", "1", "--timeout", "3", "--resume", str(state)]
    first = run("--kills", "3", *given)
    assert first.returncode == 0, first.stdout + first.stderr
    assert json.loads(state.read_text())["events"] == 3
    second = run("--kills", "6", *given, "--json", str(figures))
    assert second.returncode == 0, second.stdout + second.stderr
    found = json.loads(figures.read_text())
    assert found["events"] == sum(found["counts"].values()) == 6
    assert not any(found["faults"].values()) and found["steps_checked"] > 100
    assert found["why_no_namespaces"] == NO_NETWORK
    drawn = [draw(1, number, 4, 2).kind for number in range(6 + sum(found["skipped"].values()))]
    assert Counter(drawn) == Counter(found["counts"]) + Counter(found["skipped"])
    assert not set(found["skipped"]) - set(CUTS) and (NO_NETWORK or not found["skipped"])


def test_a_process_group_gets_over_the_same(tmp_path: Path) -> None:
    figures = tmp_path / "chaos.json"
    done = run("--make=collectives", "--ranks=4", "--hosts=2", "--kills=5", "--seed=3", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["makes"] == "collectives" and found["events"] == 5 and not any(found["faults"].values())
    assert found["steps_checked"] > 100 and found["rows_checked"] > 4 * found["steps_checked"]
    assert not set(found["points"]) & set(MOVES)


@pytest.mark.skipif(bool(NO_NETWORK), reason=NO_NETWORK)
def test_a_host_that_is_cut_off_is_lost_and_comes_back_in_place(tmp_path: Path) -> None:
    """Both hosts cannot tell which of them is cut off; the one that the store does not hear finds itself outside."""
    figures = tmp_path / "chaos.json"
    done = run("--ranks=4", "--hosts=2", "--kills=1", "--seed=0", "--only=cut host", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    times = json.loads(figures.read_text())["times_ms"]
    assert times["cut host: masked"]["count"] == 1 and times["back (in place)"]["count"] == 2


def test_events_follow_from_seed_and_number() -> None:
    events = [draw(5, number, 8, 4) for number in range(600)]
    assert events == [draw(5, number, 8, 4) for number in range(600)]
    assert events != [draw(6, number, 8, 4) for number in range(600)]
    assert {event.kind for event in events} == set(KINDS)
    assert {event.point for event in events if event.ranks} == set(POINTS)
    assert {rank for event in events for rank in event.ranks} == set(range(8))
    assert {host for event in events for host in event.hosts} == set(range(4))
    for event in events:
        assert len(set(event.ranks)) == len(event.ranks) or event.point == "join"
        assert len(event.steps) == len(event.ranks)
    assert {event.kind for event in (draw(0, number, 2, 1) for number in range(200))} <= set(KINDS) - {
        *("kill two", "stop two", "host", "cut host", "cut hosts")
    }


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(chaos, arguments)
        assert result.exit_code == 2, result.output
        return result.output

    assert "--hosts 5 is more than 4 ranks" in refused("--ranks", "4", "--hosts", "5")
    assert "allowed: kill" in refused("--only", "meteor")
    assert "not with 2 ranks on 1 hosts" in refused("--ranks", "2", "--hosts", "1", "--only", "kill two,host")
    state = tmp_path / "state"
    state.write_text("{}")
    assert "is not what a chaos run has left" in refused("--resume", str(state))
    Tally({"seed": 1}).save(state)
    with pytest.raises(ConfigError, match="is of a run with seed=1, this one has 2"):
        Tally.load(state, {"seed": 2})


def test_the_command_line_knows_it() -> None:
    assert "chaos" in CliRunner().invoke(main, ["--help"]).output


@pytest.mark.skipif(bool(NO_NETWORK), reason=NO_NETWORK)
def test_a_network_of_namespaces_is_cut_and_healed_and_leaves_nothing() -> None:
    network = Network(2)
    try:

        def reaches(one: int, other: int) -> bool:
            with inside(network.name(other)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hears:
                hears.bind((network.address(other), 0))
                hears.settimeout(0.3)
                with inside(network.name(one)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as says:
                    for _ in range(10):
                        try:
                            says.sendto(b"x", hears.getsockname())
                            return hears.recv(1) == b"x"
                        except OSError:
                            continue
            return False

        assert reaches(0, 1)
        for silent in (True, False):
            network.cut(0, silent)
            assert not reaches(0, 1) and reaches(1, network.store)
            network.heal(0, silent)
            assert reaches(0, 1)
        network.part((0, 1), True)
        assert not reaches(0, 1) and reaches(0, network.store) and reaches(network.store, 1)
        network.part((0, 1), False)
        assert reaches(0, 1)
    finally:
        network.close()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert network.name(0).rpartition("-")[0] not in left


def _one_that_is_wrong(ctx: Ctx, where: Where, what: str) -> str:
    """Rank 1 brings other rows than it should, or its experts compute something else."""
    load = steps.Workload(2, 1 if what == "rows" and ctx.rank == 1 else 0)
    if what == "sums" and ctx.rank == 1:
        right = steps.Workload.expert
        steps.Workload.expert = lambda *args: right(*args) + 1  # type: ignore[method-assign]
    elastic = Elastic(where.store, group=where.group)
    founders = {"store": ctx.store, "rank": ctx.rank, "world_size": 2}
    with AllToAll(load.config(), options=Options(timeout_s=10.0, host=ctx.host), elastic=elastic, **founders) as a2a:
        said = ""
        for number in range(1, 5):
            flight = steps.Flight(load, a2a)
            flight.send(number)
            for move in (flight.receive, flight.send_back, flight.finish):
                try:
                    move()
                except steps.WrongRows as error:
                    said = said or str(error)
        ctx.barrier("checked")
        return said


@pytest.mark.parametrize("what, said", [("", ""), ("rows", "differ from the oracle"), ("sums", "sums differ")])
def test_wrong_rows_and_wrong_sums_are_noticed(what: str, said: str) -> None:
    found = run_ranks(_one_that_is_wrong, 2, new_group(), what)
    assert said in found[0] and bool(found[0]) == bool(what)
