"""Generated steps against the oracle: routing, T, K, E, H, ranks, hosts, dtypes, FP8, skew and layouts at once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from ranks import Ctx, RankFailed, RankPool
from steps import DTYPES, FP8, Case, run_case

from moe_a2a.types import LAYOUTS

#: The hosts of the ranks. Each starts its ranks once and keeps them.
WORLDS = ("a", "aa", "ab", "aab", "abc", "aaaa", "aabb", "abab", "abcd")
EXAMPLES = 150
#: Seconds for making a failing example smaller, within which the test's own time limit is kept.
SHRINK_S = 40


@st.composite
def examples(draw: st.DrawFn) -> tuple[str, Case]:
    world = draw(st.sampled_from(WORLDS))
    experts = len(world) * draw(st.integers(1, 8) | st.sampled_from([32, 256 // len(world), 1024 // len(world)]))
    top_k = draw(st.integers(1, min(8, experts)) | st.integers(1, min(32, experts)))
    most = draw(st.integers(1, 40))
    fp8 = draw(st.sampled_from(FP8))
    return world, Case(
        experts=experts,
        hidden=128 * draw(st.integers(1, 6)),
        top_k=top_k,
        max_tokens=most,
        tokens=tuple(draw(st.lists(st.integers(0, most) | st.just(most), min_size=1, max_size=5))),
        dtype=draw(st.sampled_from(DTYPES)),
        fp8=fp8,
        quantised=fp8 is not None and draw(st.booleans()),
        weights_at=draw(st.sampled_from(["dispatch", "combine"])),
        routing=draw(st.sampled_from(["uniform", "zipf", "k-hot"])),
        padding=draw(st.sampled_from([0.0, 0.2, 0.9])),
        holes=draw(st.sampled_from([0.0, 0.3])),
        alignment=2 ** draw(st.integers(0, 7)),
        exact=top_k <= 16 and draw(st.booleans()),
        id_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        layouts=tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4))),
        seed=draw(st.integers(0, 2**20)),
    )


class Runner:
    """Runs examples on ranks that stay. Remembers failures, so that shrinking ends in time with one that did fail."""

    def __init__(self) -> None:
        self.pools = {world: RankPool(world) for world in WORLDS}
        self.failures: dict[tuple[str, Case], str] = {}
        self.first_failure = 0.0
        self.ran = 0

    def check(self, world: str, case: Case) -> None:
        example = world, case
        if example not in self.failures:
            if self.failures and time.monotonic() > self.first_failure + SHRINK_S:
                reject()
            self._run(world, case)
        if example in self.failures:  # one place to raise from: what is raised elsewhere counts as another failure
            raise RankFailed(self.failures[example])

    def _run(self, world: str, case: Case) -> None:
        self.ran += 1
        try:
            self.pools[world].call(_check, case)
        except RankFailed as error:
            self.first_failure = self.first_failure or time.monotonic()
            self.failures[world, case] = f"ranks on hosts {world!r}, {case}:\n{error}"


def _check(ctx: Ctx, case: Case) -> None:
    run_case(ctx, case, timeout_s=5.0)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    for pool in made.pools.values():
        pool.close()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(examples())
def test_any_step_is_what_the_oracle_says(runner: Runner, example: tuple[str, Case]) -> None:
    runner.check(*example)


def test_that_many_examples_ran(runner: Runner) -> None:
    assert runner.ran >= EXAMPLES * 0.9 or runner.failures
