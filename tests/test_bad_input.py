"""Wrong arguments raise before anything is sent, say what is wrong and what is allowed, and leave the object usable.

One rank makes a wrong call, then all ranks make a right step: had anything been sent, or were the step lost, it would
fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ctx, run_ranks
from steps import Case, check_dispatched, check_sum, dispatch_args, expert_output, run_step, world_of

from moe_a2a import AllToAll, InputError, NotFinite

PLAIN = Case(experts=16, hidden=256, top_k=4, tokens=(5, 7, 6, 13), padding=0.0, holes=0.0)
QUANTISED = PLAIN.replace(fp8="fp32", quantised=True)

Arguments = dict[str, Any]


def change(name: str, how: Callable[[torch.Tensor], Any]) -> Callable[[Arguments], Arguments]:
    """Replace one argument by something made of it."""
    return lambda arguments: {name: how(arguments[name])}


def give(**more: Any) -> Callable[[Arguments], Arguments]:
    return lambda _: more


def put(name: str, where: Any, value: float) -> Callable[[Arguments], Arguments]:
    """Put a value into a copy of an argument."""

    def changed(arguments: Arguments) -> Arguments:
        tensor = arguments[name].clone()
        tensor[where] = value
        return {name: tensor}

    return changed


def twice(expert: int) -> Callable[[Arguments], Arguments]:
    def changed(arguments: Arguments) -> Arguments:
        ids = arguments["topk_ids"].clone()
        ids[2] = torch.tensor([3, expert, 5, expert])
        return {"topk_ids": ids}

    return changed


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return tensor.t().contiguous().t()


def on_another_device(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def fp8_rows(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


# name -> (what is wrong, words of the message)
DISPATCH: dict[str, tuple[Callable[[Arguments], Arguments], list[str]]] = {
    "x of another dtype": (change("x", torch.Tensor.float), ["x has dtype", "torch.float32", "torch.bfloat16"]),
    "x not a tensor": (change("x", torch.Tensor.tolist), ["x is a list", "torch tensor", "[T, 256]"]),
    "x flat": (change("x", torch.Tensor.flatten), ["x has shape", "[T, 256]"]),
    "x of another hidden size": (change("x", lambda x: x[:, :128].contiguous()), ["128]", "[T, 256]"]),
    "x not contiguous": (change("x", strided), ["x has strides", "contiguous()"]),
    "x on another device": (change("x", on_another_device), ["x is on meta", "CPU"]),
    "x with a dimension more": (change("x", lambda x: x[None]), ["x has shape [1, ", "[T, 256]"]),
    "too many tokens": (
        give(x=torch.zeros(14, 256).bfloat16(), topk_ids=torch.full((14, 4), -1), topk_weights=torch.zeros(14, 4)),
        ["max_tokens_per_rank=13", "14 tokens", "split the batch"],
    ),
    "ids of another dtype": (change("topk_ids", torch.Tensor.float), ["topk_ids", "torch.float32", "torch.int64"]),
    "ids int16": (change("topk_ids", torch.Tensor.short), ["topk_ids", "torch.int16", "torch.int32", "torch.int64"]),
    "ids of another top-k": (change("topk_ids", lambda i: i[:, :3].contiguous()), ["topk_ids", ", 3]", ", 4]"]),
    "ids of fewer tokens": (change("topk_ids", lambda i: i[1:].contiguous()), ["topk_ids has shape", "expected ["]),
    "ids not contiguous": (change("topk_ids", strided), ["topk_ids has strides", "contiguous()"]),
    "ids not a tensor": (change("topk_ids", torch.Tensor.numpy), ["topk_ids is a ndarray", "torch tensor"]),
    "ids on another device": (change("topk_ids", on_another_device), ["topk_ids is on meta", "CPU"]),
    "an id of E": (put("topk_ids", (2, 3), 16), ["topk_ids[2, 3] = 16", "0 to 15", "-1"]),
    "an id of -2": (put("topk_ids", (4, 0), -2), ["topk_ids[4, 0] = -2", "0 to 15", "-1"]),
    "an id beyond int32": (put("topk_ids", (0, 1), 2**40), ["topk_ids[0, 1] = 1099511627776", "0 to 15"]),
    "an id that int32 would fold to 0": (put("topk_ids", (0, 1), 2**32), ["4294967296", "0 to 15"]),
    "an expert twice": (twice(9), ["topk_ids[2]", "expert 9 twice", "differ"]),
    "expert 0 twice": (twice(0), ["topk_ids[2]", "expert 0 twice", "differ"]),
    "weights of another dtype": (change("topk_weights", torch.Tensor.half), ["topk_weights", "float16", "float32"]),
    "weights of another shape": (change("topk_weights", lambda w: w[:, :2].contiguous()), ["topk_weights", ", 4]"]),
    "weights not contiguous": (change("topk_weights", strided), ["topk_weights has strides"]),
    "weights not a tensor": (give(topk_weights=0.5), ["topk_weights is a float"]),
    "weights NaN": (put("topk_weights", (3, 1), torch.nan), ["topk_weights[3, 1] = nan", "finite"]),
    "weights infinite": (put("topk_weights", (3, 1), torch.inf), ["topk_weights[3, 1] = inf", "finite"]),
    "an unknown FP8 form": (give(fp8="e5m2"), ["fp8='e5m2'", "None", "'fp32'", "'pow2'", "'ue8m0'"]),
    "scales of rows that have none": (give(scales=torch.ones(5, 2)), ["scales", "float8_e4m3fn", "torch.bfloat16"]),
    "NaN to be quantised": (
        lambda a: {**put("x", (1, 200), torch.nan)(a), "fp8": "fp32"},
        ["x: token 1", "columns 128 to 255", "nan", "finite"],
    ),
    "infinity to be quantised": (
        lambda a: {**put("x", (0, 3), -torch.inf)(a), "fp8": "ue8m0"},
        ["x: token 0", "columns 0 to 127", "inf", "finite"],
    ),
    "an unknown channel": (give(channel="second"), ["channel='second'", "'default'"]),
    "an unknown layout": (give(layout="normal"), ["layout='normal'", "'masked'", "'contiguous'", "'grouped'"]),
    "an alignment of 3": (give(layout="grouped", alignment=3), ["alignment=3", "power of two"]),
    "an alignment of 0": (give(alignment=0), ["alignment=0", "power of two"]),
    "an alignment of 1.0": (give(alignment=1.0), ["alignment=1.0", "power of two"]),
    "out of another dtype": (
        give(layout="contiguous", out=torch.zeros(99, 256)),
        ["out has dtype torch.float32", "torch.bfloat16"],
    ),
    "out of plain rows for FP8": (
        give(layout="contiguous", fp8="fp32", out=torch.zeros(99, 256).bfloat16()),
        ["out has dtype torch.bfloat16", "float8_e4m3fn"],
    ),
    "out of another hidden size": (
        give(layout="grouped", out=torch.zeros(99, 128).bfloat16()),
        ["out has shape [99, 128]", "[rows, 256]"],
    ),
    "out of another masked shape": (
        give(layout="masked", out=torch.zeros(4, 51, 256).bfloat16()),
        ["out has shape [4, 51, 256]", "[4, 52, 256]"],
    ),
    "out not contiguous": (
        give(layout="contiguous", out=torch.zeros(99, 512).bfloat16()[:, ::2]),
        ["out has strides", "contiguous"],
    ),
}

FP8_DISPATCH: dict[str, tuple[Callable[[Arguments], Arguments], list[str]]] = {
    "FP8 rows without scales": (give(scales=None), ["float8_e4m3fn", "scales is None", "[T, H/128]"]),
    "scales of another shape": (change("scales", lambda s: s[:, :1].contiguous()), ["scales has shape", ", 2]"]),
    "scales of another dtype": (change("scales", torch.Tensor.double), ["scales", "float64", "float32"]),
    "scales stored by column": (change("scales", strided), ["scales has strides", "contiguous()"]),
    "a NaN scale": (put("scales", (2, 1), torch.nan), ["token 2", "columns 128 to 255", "nan", "finite"]),
    "an infinite scale": (put("scales", (0, 0), torch.inf), ["token 0", "columns 0 to 127", "inf", "finite"]),
    "a scale of zero": (put("scales", (1, 0), 0.0), ["token 1", "scale 0.0", "above 0"]),
    "a negative scale": (put("scales", (1, 0), -0.5), ["token 1", "scale -0.5", "above 0"]),
    "a scale that UE8M0 cannot hold": (
        lambda a: {**put("scales", (1, 0), 3.0)(a), "fp8": "ue8m0"},
        ["fp8='ue8m0'", "powers of two"],
    ),
}


def attempt(name: str, call: Callable[[], Any], words: list[str]) -> None:
    """The call must be refused with these words."""
    error: InputError | None = None
    try:
        call()
    except InputError as raised:
        error = raised
    assert error is not None, f"{name}: was not refused"
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{name}: {missing} not in {str(error)!r}"
    # An error of their own for what GPU ranks send as it is.
    assert isinstance(error, NotFinite) == str(error).startswith(("x: token", "topk_weights[")), name


def arguments_of(case: Case, a2a: AllToAll, step: int) -> Arguments:
    (x, ids, weights), keywords = dispatch_args(case, world_of(case, a2a.world_size, step), a2a.rank)
    given = {"x": x, "topk_ids": ids, "topk_weights": weights, **keywords}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def _bad_dispatches(ctx: Ctx) -> int:
    step = 0
    for case, attempts in ((PLAIN, DISPATCH), (QUANTISED, FP8_DISPATCH)):
        with ctx.a2a(case.config()) as a2a:
            for name, (wrong, words) in attempts.items():
                if step % ctx.world == ctx.rank:
                    arguments = arguments_of(case, a2a, step)
                    arguments.update(wrong(arguments))
                    attempt(name, lambda arguments=arguments: a2a.dispatch(**arguments), words)
                    if not {"layout", "alignment", "out"} & set(arguments):
                        attempt(name, lambda arguments=arguments: a2a.dispatch_send(**arguments), words)
                run_step(a2a, case, step, case.layouts[step % 3])
                step += 1
    return step


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_wrong_dispatch_is_refused_before_anything_is_sent(hosts):
    assert run_ranks(_bad_dispatches, 4, hosts=hosts) == [len(DISPATCH) + len(FP8_DISPATCH)] * 4


def _bad_receives(ctx: Ctx) -> None:
    with ctx.a2a(PLAIN.config()) as a2a:
        for step, layout in enumerate(PLAIN.layouts * 2):
            _bad_receive(a2a, PLAIN, step, layout)


def _bad_receive(a2a: AllToAll, case: Case, step: int, layout: Any) -> None:
    world = world_of(case, a2a.world_size, step)
    args, keywords = dispatch_args(case, world, a2a.rank)
    handle = a2a.dispatch_send(*args, **keywords)

    def receive(**given: Any) -> Any:
        return a2a.dispatch_recv(handle, **{"layout": layout, "alignment": case.alignment, **given})

    attempt("layout", lambda: receive(layout="normal"), ["layout='normal'", "'masked'"])
    attempt("alignment", lambda: receive(alignment=12), ["alignment=12", "power of two"])
    attempt("out dtype", lambda: receive(out=torch.zeros(200, 256)), ["out has dtype", "torch.bfloat16"])
    shape = (4, 50, 256) if layout == "masked" else (200, 128)
    attempt("out shape", lambda: receive(out=torch.zeros(shape).bfloat16()), ["out has shape", "expected"])
    if layout != "masked":
        small = torch.zeros(1, 256).bfloat16()
        attempt("out small", lambda: receive(out=small), ["out has 1 rows", "received", "larger"])
    got = receive()
    check_dispatched(case, world, a2a.rank, got)
    out = a2a.combine(expert_output(case, world, a2a.rank, got), handle)
    check_sum(case, world, a2a.rank, a2a.hosts, out)


def test_a_wrong_receive_is_refused_and_can_be_made_again():
    run_ranks(_bad_receives, 4, hosts=2)


def _small_out(ctx: Ctx) -> None:
    """How many rows arrive is known only when they have: the step goes on, with the handle that the error carries."""
    case = PLAIN
    with ctx.a2a(case.config()) as a2a:
        for step, layout in enumerate(("contiguous", "grouped", "contiguous")):
            world = world_of(case, ctx.world, step)
            args, keywords = dispatch_args(case, world, ctx.rank)
            with pytest.raises(InputError) as caught:
                a2a.dispatch(*args, layout=layout, out=torch.zeros(1, 256).bfloat16(), **keywords)
            assert "out has 1 rows" in str(caught.value) and caught.value.handle is not None
            if step == 2:
                a2a.discard(caught.value.handle)
                continue
            got = a2a.dispatch_recv(caught.value.handle, layout=layout, alignment=case.alignment)
            check_dispatched(case, world, ctx.rank, got)
            out = a2a.combine(expert_output(case, world, ctx.rank, got), got.handle)
            check_sum(case, world, ctx.rank, a2a.hosts, out)
        run_step(a2a, case, 3, "masked")


def test_a_step_whose_out_is_too_small_for_what_arrived_is_not_lost():
    run_ranks(_small_out, 4, hosts=2)


def _bad_combines(ctx: Ctx) -> None:
    for at in ("dispatch", "combine"):
        case = PLAIN.replace(weights_at=at)
        with ctx.a2a(case.config()) as a2a:
            for step, layout in enumerate(case.layouts):
                _bad_combine(a2a, case, step, layout)


def _bad_combine(a2a: AllToAll, case: Case, step: int, layout: Any) -> None:
    world = world_of(case, a2a.world_size, step)
    args, keywords = dispatch_args(case, world, a2a.rank)
    got = a2a.dispatch(*args, layout=layout, alignment=case.alignment, **keywords)
    good, weights = expert_output(case, world, a2a.rank, got), world.weights[a2a.rank]
    late = weights if case.weights_at == "combine" and layout != "contiguous" else None
    rows, tokens = list(good.shape), len(weights)

    def wrong_y(name: str, y: Any, words: list[str]) -> None:
        attempt(f"{layout}, {name}", lambda: a2a.combine(y, got.handle, late), words)
        attempt(f"{layout}, {name}", lambda: a2a.combine_send(y, got.handle, late), words)

    more = torch.cat([good, good[:1]])
    wrong_y("a row more", more, ["y has shape", str(list(more.shape)), str(rows)])
    wrong_y("a row less", good[:-1], ["y has shape", str(rows)])
    wrong_y("half the columns", good[..., :128].contiguous(), ["y has shape", "128]", str(rows)])
    wrong_y("another dtype", good.float(), ["y has dtype torch.float32", "torch.bfloat16"])
    wrong_y("not contiguous", good.transpose(-1, -2).contiguous().transpose(-1, -2), ["y has strides", "contiguous()"])
    wrong_y("another device", on_another_device(good), ["y is on meta", "CPU"])
    wrong_y("not a tensor", None, ["y is a NoneType", "torch tensor"])

    def wrong_weights(name: str, given: Any, words: list[str]) -> None:
        attempt(f"{layout}, {name}", lambda: a2a.combine(good, got.handle, given), words)

    if layout == "contiguous":
        wrong_weights("weights of a contiguous combine", weights, ["contiguous", "leave topk_weights out"])
    elif case.weights_at == "dispatch":
        wrong_weights("weights twice", weights, ["topk_weights were given at dispatch", "once"])
    else:
        wrong_weights("no weights", None, ["not given at dispatch", "[T, K]"])
        wrong_weights("weights of another shape", weights[:, :1].contiguous(), ["topk_weights", f"[{tokens}, 4]"])
        wrong_weights("weights of another dtype", weights.double(), ["topk_weights", "float64", "float32"])
        bad = weights.clone()
        bad[1, 2] = -torch.inf
        wrong_weights("weights not finite", bad, ["topk_weights[1, 2] = -inf", "finite"])

    def wrong_out(name: str, out: Any, words: list[str]) -> None:
        attempt(f"{layout}, {name}", lambda: a2a.combine(good, got.handle, late, out=out), words)

    empty = torch.empty(tokens, case.hidden, dtype=case.dtype)
    wrong_out("out with a token more", torch.cat([empty, empty[:1]]), ["out has shape", f"[{tokens}, 256]"])
    wrong_out("out of another dtype", empty.float(), ["out has dtype torch.float32"])
    wrong_out("out not contiguous", strided(empty), ["out has strides"])
    a2a.combine_send(good, got.handle, late)
    attempt("out of combine_recv", lambda: a2a.combine_recv(got.handle, out=empty.float()), ["out has dtype"])
    check_sum(case, world, a2a.rank, a2a.hosts, a2a.combine_recv(got.handle, out=empty))


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_wrong_combine_is_refused_before_anything_is_sent(hosts):
    run_ranks(_bad_combines, 4, hosts=hosts)


def _fp16_weights(ctx: Ctx) -> None:
    case = PLAIN.replace(dtype=torch.float16)
    with ctx.a2a(case.config()) as a2a:
        arguments = arguments_of(case, a2a, 0)
        arguments["topk_weights"][0, 0] = 70000.0
        attempt("a weight beyond fp16", lambda: a2a.dispatch(**arguments), ["70000", "65504", "float16"])


def test_a_weight_that_the_payload_cannot_hold_is_refused():
    run_ranks(_fp16_weights, 1)


def _forms_differ(ctx: Ctx) -> list[str]:
    """Ranks that send different forms cannot be told before they send: the step fails on all, soon, and says why."""
    messages = []
    for case, other in ((PLAIN, PLAIN.replace(fp8="fp32")), (PLAIN, PLAIN.replace(weights_at="combine"))):
        mine = other if ctx.rank == 1 else case
        with ctx.a2a(case.config()) as a2a:
            args, keywords = dispatch_args(mine, world_of(mine, ctx.world, 0), ctx.rank)
            with pytest.raises(RuntimeError) as caught:
                a2a.dispatch(*args, **keywords)
            messages.append(str(caught.value))
            ctx.barrier(f"told {case is PLAIN} {other.fp8}")
    return messages


@pytest.mark.parametrize("hosts", [1, 2])
def test_ranks_that_send_different_forms_are_told(hosts):
    results = run_ranks(_forms_differ, 2, hosts=hosts)
    for rank, (formats, weights) in enumerate(results):
        assert f"rank {1 - rank}" in formats and "FP8 rows" in formats and "plain rows" in formats
        assert f"rank {1 - rank}" in weights and "without router weights" in weights
