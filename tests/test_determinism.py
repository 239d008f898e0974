"""Equal inputs give equal outputs, bit for bit, whoever comes first."""

from __future__ import annotations

import hashlib

import pytest
from ranks import Ctx, run_ranks
from steps import FP8, Case, dispatch_args, run_step, world_of

CASE = Case(experts=32, top_k=8, hidden=256, exact=False, tokens=(13, 9, 0, 11), routing="zipf")


def _outputs(ctx: Ctx) -> list[str]:
    """Digests of all that two rounds of steps give on this rank; the rounds must be equal."""
    rounds = []
    for _ in range(2):
        digest = hashlib.sha256()
        for fp8 in FP8:
            case = CASE.replace(fp8=fp8)
            with ctx.a2a(case.config()) as a2a:
                for step, layout in enumerate(case.layouts):
                    digest.update(run_step(a2a, case, step, layout).float().numpy().tobytes())
                    args, keywords = dispatch_args(case, world_of(case, ctx.world, step), ctx.rank)
                    got = a2a.dispatch(*args, layout="contiguous", **keywords)
                    for part in (got.x.float(), got.topk_ids, got.topk_weights, got.counts, got.source, got.scales):
                        if part is not None:
                            digest.update(part.contiguous().numpy().tobytes())
                    a2a.discard(got.handle)
        rounds.append(digest.hexdigest())
    assert rounds[0] == rounds[1], "the same inputs gave different outputs"
    return rounds


@pytest.mark.parametrize("labels", [["a"] * 4, ["a", "a", "b", "b"]], ids=["1 host", "2 x 2"])
def test_outputs_are_the_same_in_whichever_order_ranks_start(labels):
    runs = [run_ranks(_outputs, 4, hosts=labels, order=order) for order in (None, [3, 1, 0, 2], [2, 3, 1, 0])]
    assert runs[0] == runs[1] == runs[2]
    assert len({rounds[0] for rounds in runs[0]}) == 4  # the digests do say something


def test_names_of_hosts_do_not_matter():
    assert run_ranks(_outputs, 4, hosts=["x", "x", "y", "y"]) == run_ranks(_outputs, 4, hosts=["y", "y", "a", "a"])
