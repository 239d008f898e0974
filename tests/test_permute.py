"""permute and unpermute of CPU tensors: against loops, the oracle's grouped layout, and transformers' experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permuting import DTYPES, bits, check, routing, rows_of, summed

from moe_a2a import InputError, permute, unpermute, worst_case_rows
from moe_a2a import reference as ref
from moe_a2a.fp8 import FP8, pack_ue8m0, quantize
from moe_a2a.workload import make_inputs

IDS = st.tuples(st.integers(0, 20), st.integers(1, 8), st.integers(1, 12), st.integers(0, 1 << 20))


@settings(max_examples=150, deadline=None)
@given(
    IDS,
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 2, 16, 128]),
    st.sampled_from([torch.int32, torch.int64]),
    st.none() | st.integers(-2, 25),
    st.booleans(),
)
def test_any_routing_is_grouped_and_summed_back(sizes, holes, alignment, id_dtype, valid, weighted):
    tokens, top_k, experts, seed = sizes
    x = rows_of(tokens, 16, torch.bfloat16, seed)
    ids = routing(tokens, top_k, experts, seed, holes).to(id_dtype)
    weights = torch.rand(tokens, top_k) if weighted else None
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    got = permute(x, ids, experts, topk_weights=weights, alignment=alignment, valid=count)
    real = None if valid is None else min(max(valid, 0), tokens)
    check(got, x, ids, experts, alignment, weights, valid=real)
    assert len(got.x) == got.offsets[-1] <= worst_case_rows(tokens, top_k, experts, alignment)
    y = rows_of(len(got.x), 16, torch.bfloat16, seed + 1)
    assert torch.equal(bits(unpermute(y, got.places, weights)), bits(summed(y, got.places, weights)))


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize("experts", [1, 3, 40])
def test_the_worst_case_is_reached_and_not_exceeded(experts, alignment):
    """One expert takes what is left when every other one has a single row."""
    tokens, top_k = 5, 4
    ids = torch.zeros(tokens * top_k, dtype=torch.int64)
    spread = min(experts, len(ids))
    ids[:spread] = torch.arange(spread)
    for count in range(len(ids) - spread + 1):
        last = ids.clone()
        last[spread : spread + count] = -1
        rows = permute(
            rows_of(tokens, 8, torch.float32), last.view(tokens, top_k), experts, alignment=alignment
        ).offsets
        assert rows[-1] <= worst_case_rows(tokens, top_k, experts, alignment)
    if alignment == 1 or spread == len(ids):
        whole = permute(rows_of(tokens, 8, torch.float32), ids.view(tokens, top_k), experts, alignment=alignment)
        assert whole.offsets[-1] == worst_case_rows(tokens, top_k, experts, alignment)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_dtype_are_copied_and_rounded_once(dtype):
    x, ids, weights = rows_of(70, 1408, dtype), routing(70, 6, 9), torch.rand(70, 6)
    got = permute(x, ids, 9, topk_weights=weights)
    check(got, x, ids, 9, 128, weights)
    y = rows_of(len(got.x), 1408, dtype, seed=3)
    assert torch.equal(bits(unpermute(y, got.places, weights)), bits(summed(y, got.places, weights)))
    out = torch.full((70, 1408), torch.nan, dtype=dtype)
    assert unpermute(y, got.places, out=out) is out
    assert torch.equal(bits(out), bits(summed(y, got.places, None)))


@pytest.mark.parametrize("form", ["row-major fp32", "column-major fp32", "row-major ue8m0", "column-major ue8m0"])
def test_fp8_rows_bring_their_scales(form):
    x, scales = quantize(rows_of(30, 640, torch.bfloat16), power_of_two=True)
    if "ue8m0" in form:
        scales = pack_ue8m0(scales)
    if "column" in form:
        scales = scales.t().contiguous().t()
    ids = routing(30, 4, 7)
    check(permute(x, ids, 7, scales=scales, alignment=32), x, ids, 7, 32, scales=scales)
    check(permute(x, ids, 7), x, ids, 7, 128)


@pytest.mark.parametrize("fp8", [None, "fp32", "ue8m0"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_grouped_layout_is_the_permuted_contiguous_layout(fp8, rank):
    sizes = ref.Sizes(ranks=2, experts=10, max_tokens_per_rank=40)
    inputs = [make_inputs(1, r, 0, [40, 33][r], hidden=256, experts=10, top_k=3, holes=0.2) for r in range(2)]
    x, scales = [i.x for i in inputs], None
    ids, weights = [i.topk_ids for i in inputs], [i.topk_weights for i in inputs]
    if fp8 is not None:
        x, scales = map(list, zip(*(quantize(rows, fp8 == "ue8m0") for rows in x), strict=True))
        scales = [pack_ue8m0(s) for s in scales] if fp8 == "ue8m0" else scales
    flat = ref.dispatch_contiguous(sizes, x, ids, weights, rank, scales)
    want = ref.dispatch_grouped(sizes, x, ids, weights, rank, 16, scales)
    got = permute(flat.x, flat.topk_ids, 5, topk_weights=flat.topk_weights, scales=flat.scales, alignment=16)
    for name in ("expert_ids", "counts", "offsets", "topk_weights"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    there = want.source >= 0
    assert torch.equal(torch.where(there, flat.source[got.source], -1), want.source)
    assert torch.equal(bits(got.x[there]), bits(want.x[there]))
    if scales is not None:
        assert got.scales.stride() == want.scales.stride()
        assert torch.equal(bits(got.scales[there]), bits(want.scales[there]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpermute_has_the_bits_of_combine(dtype):
    """On one rank, combine of the grouped layout is unpermute."""
    given_ = make_inputs(2, 0, 0, 50, hidden=256, experts=6, top_k=4, dtype=dtype, holes=0.2, padding=0.1)
    got = permute(given_.x, given_.topk_ids, 6, alignment=16)
    y = rows_of(len(got.x), 256, dtype, seed=5)
    want = ref.combine_grouped(ref.Sizes(1, 6, 50), [y], [given_.topk_ids], given_.topk_weights, 0, 16)
    assert torch.equal(bits(unpermute(y, got.places, given_.topk_weights)), bits(want))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model", ["deepseek_v3", "mixtral"])
def test_transformers_experts_compute_the_same(model: str, implementation: str):
    """Its experts, fed expert by expert with our rows, give what it gets from its own grouping of the same tokens."""
    pytest.importorskip("transformers")
    from transformers import DeepseekV3Config, MixtralConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes: dict[str, Any] = {"hidden_size": 64, "num_experts_per_tok": 3}
    if model == "mixtral":
        config = MixtralConfig(intermediate_size=48, num_local_experts=7, **sizes)
        experts = MixtralExperts(config)
    else:
        config = DeepseekV3Config(moe_intermediate_size=48, n_routed_experts=7, **sizes)
        experts = DeepseekV3Experts(config)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(90, 64)
    weights, ids = torch.rand(90, 7).softmax(1).topk(3)
    with torch.no_grad():
        want = experts(x, ids, weights)
        got = permute(x, ids, 7, alignment=16)
        y = torch.full_like(got.x, torch.nan)  # of padding rows
        for e, count in enumerate(got.counts.tolist()):
            start = int(got.offsets[e])
            gate, up = (got.x[start : start + count] @ experts.gate_up_proj[e].T).chunk(2, dim=1)
            y[start : start + count] = (experts.act_fn(gate) * up) @ experts.down_proj[e].T
        out = unpermute(y, got.places, weights)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_capacity_sets_the_rows_and_must_suffice():
    x, ids = rows_of(10, 8, torch.float32), routing(10, 2, 3, holes=0.0)
    got = permute(x, ids, 3, alignment=16, capacity=70)
    assert got.x.shape == (70, 8)
    check(got, x, ids, 3, 16)
    got.check()
    with pytest.raises(InputError, match=r"capacity=47, but this routing needs 48 rows"):
        permute(x, ids, 3, alignment=16, capacity=47)


def test_rows_of_later_tokens_are_left_alone():
    y, places = rows_of(4, 8, torch.float32), torch.tensor([[0], [1], [2]], dtype=torch.int32)
    out = torch.full((3, 8), -1.0)
    unpermute(y, places, valid=torch.tensor([2], dtype=torch.int32), out=out)
    assert torch.equal(out[:2], y[:2]) and (out[2] == -1).all()


def test_a_weight_of_no_choice_may_be_anything():
    y, places = rows_of(2, 8, torch.bfloat16), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int32)
    out = unpermute(y, places, torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]]))
    assert torch.equal(out, torch.stack([y[1], torch.zeros_like(y[1])]))


def test_the_names_are_the_functions_even_where_modules_are_imported():
    import moe_a2a.permutation
    import moe_a2a.permutation_cpu
    import moe_a2a.permuted

    assert moe_a2a.permute is moe_a2a.permutation.permute
    assert moe_a2a.unpermute is moe_a2a.permutation.unpermute


X = rows_of(4, 128, torch.bfloat16)
XQ, SCALES = quantize(rows_of(4, 128, torch.bfloat16))
CHOSEN = torch.tensor([[0, 1], [2, -1], [3, 0], [1, 2]])


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X.tolist(), CHOSEN, 4), {}, "x is a list"),
        ((X.double(), CHOSEN, 4), {}, "x has dtype torch.float64; allowed: torch.bfloat16"),
        ((X[0], CHOSEN, 4), {}, "x has shape"),
        ((X.t(), CHOSEN, 4), {}, "x has strides"),
        ((X.to("meta"), CHOSEN, 4), {}, "x is on meta; allowed: cpu, cuda"),
        ((X[:, :4].contiguous(), CHOSEN, 4), {}, "x has 4 columns of torch.bfloat16; give a multiple of 8"),
        ((X, CHOSEN.float(), 4), {}, "topk_ids has dtype torch.float32; allowed: torch.int32, torch.int64"),
        ((X, CHOSEN[:3], 4), {}, r"topk_ids has shape \[3, 2\]; expected \[4, K\]"),
        ((X, CHOSEN.to("meta"), 4), {}, "topk_ids is on meta"),
        ((X, torch.zeros(4, 33, dtype=torch.int64), 4), {}, "topk_ids has 33 columns; allowed are 1 to 32"),
        ((X, torch.zeros(4, 0, dtype=torch.int64), 4), {}, "topk_ids has 0 columns"),
        ((X, CHOSEN, 3), {}, r"topk_ids\[2, 0\] = 3; allowed are 0 to 2, and -1 for no expert"),
        ((X, CHOSEN - 1, 4), {}, r"topk_ids\[1, 1\] = -2; allowed are 0 to 3"),
        ((X, CHOSEN, 0), {}, "num_experts=0; allowed is an int from 1 to 1024"),
        ((X, CHOSEN, True), {}, "num_experts=True"),
        ((X, CHOSEN, 4), {"alignment": 48}, "alignment=48; give a power of two"),
        ((X, CHOSEN, 4), {"alignment": 1 << 30}, "may need 4294967296 rows, and capacity=None; allowed are 536870912"),
        ((X, CHOSEN, 4), {"capacity": 1 << 40}, "capacity=1099511627776; allowed are 536870912"),
        ((X, CHOSEN, 4), {"capacity": -1}, "capacity=-1; give a number of rows"),
        ((X, CHOSEN, 4), {"capacity": 1.5}, "capacity=1.5"),
        ((X, CHOSEN, 4), {"topk_weights": torch.rand(4, 3)}, "topk_weights has shape"),
        ((X, CHOSEN, 4), {"topk_weights": torch.rand(4, 2).double()}, "topk_weights has dtype torch.float64"),
        ((X, CHOSEN, 4), {"valid": 3}, "valid is a int; give a torch tensor"),
        ((X, CHOSEN, 4), {"valid": torch.tensor([3])}, "valid has dtype torch.int64; allowed: torch.int32"),
        ((X, CHOSEN, 4), {"scales": SCALES}, "scales belong to an x that is float8_e4m3fn; x is torch.bfloat16"),
        ((XQ, CHOSEN, 4), {"scales": SCALES.double()}, r"scales is torch.float64 \[4, 1\] on cpu; give torch.float32"),
        (
            (XQ, CHOSEN, 4),
            {"scales": SCALES[:3]},
            r"scales is torch.float32 \[3, 1\] on cpu; give torch.float32 \[4, 1\]",
        ),
        ((XQ, CHOSEN, 4), {"scales": 1.0}, "scales is float; give"),
        ((XQ[:, :64].contiguous(), CHOSEN, 4), {"scales": SCALES}, "x has 64 columns; scales are for groups of 128"),
    ],
)
def test_bad_input_of_permute(arguments, options, message):
    with pytest.raises(InputError, match=message):
        permute(*arguments, **options)


def test_scales_must_be_a_plain_matrix():
    x, scales = quantize(rows_of(4, 512, torch.float32))
    strided = torch.zeros(8, 8)[::2, ::2]
    assert strided.shape == scales.shape
    with pytest.raises(InputError, match=r"scales has strides \(16, 2\)"):
        permute(x, CHOSEN, 4, scales=strided)
    assert x.dtype == FP8


PLACES = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((XQ, PLACES), {}, "y has dtype torch.float8_e4m3fn; allowed: torch.bfloat16, torch.float16, torch.float32"),
        ((X, PLACES.long()), {}, "places has dtype torch.int64; allowed: torch.int32"),
        ((X, PLACES.tolist()), {}, "places is no matrix; give the places"),
        ((X, PLACES[0]), {}, "places is no matrix"),
        ((X, PLACES[:, :0]), {}, "places has 0 columns; allowed are 1 to 32"),
        ((X[:2], PLACES), {}, r"places\[1, 0\] = 2, and y has 2 rows"),
        ((X, PLACES, torch.rand(2, 3)), {}, "topk_weights has shape"),
        ((X, PLACES), {"out": torch.empty(2, 128)}, "out has dtype torch.float32; allowed: torch.bfloat16"),
        ((X, PLACES), {"out": X}, r"out has shape \[4, 128\]; expected \[2, 128\]"),
        ((X, PLACES), {"valid": torch.zeros(2, dtype=torch.int32)}, r"valid has shape \[2\]; expected \[1\]"),
    ],
)
def test_bad_input_of_unpermute(arguments, options, message):
    with pytest.raises(InputError, match=message):
        unpermute(*arguments, **options)
