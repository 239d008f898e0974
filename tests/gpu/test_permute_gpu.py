"""permute and unpermute on a GPU: against the torch code of CPU tensors, which tests/test_permute.py checks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import triton
from permuting import DTYPES, NAMES, bits, check, routing, rows_of

from moe_a2a import InputError, Permuted, permute, unpermute, worst_case_rows
from moe_a2a.fp8 import pack_ue8m0, quantize
from moe_a2a.workload import make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set; run tests/gpu without it"),
]


def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cuda()


def same(got: Permuted, want: Permuted) -> None:
    """Equal bits wherever a row is not padding. want: of CPU tensors, with the same number of rows."""
    got.check()
    for name in (*NAMES, "topk_weights"):
        there, here = getattr(got, name), getattr(want, name)
        assert (there is None) == (here is None)
        assert there is None or torch.equal(there.cpu(), here), name
    rows = want.source >= 0
    assert torch.equal(bits(got.x[rows.cuda()]), bits(want.x[rows]))
    if want.scales is not None:
        assert got.scales is not None and got.scales.stride() == want.scales.stride()
        assert torch.equal(bits(got.scales[rows.cuda()]), bits(want.scales[rows]))


def both(
    x: torch.Tensor,
    ids: torch.Tensor,
    experts: int,
    *,
    alignment: int = 128,
    weights: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    valid: int | None = None,
) -> Permuted:
    """permute on the GPU, checked against that on the CPU."""
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    options: dict[str, Any] = {"alignment": alignment}
    rows = worst_case_rows(*ids.shape, experts, alignment)
    want = permute(x, ids, experts, topk_weights=weights, scales=scales, valid=count, capacity=rows, **options)
    on_gpu = {"topk_weights": there(weights), "scales": there(scales), "valid": there(count)}
    if scales is not None and scales.stride(0) == 1:
        on_gpu["scales"] = scales.t().cuda().t()
    got = permute(x.cuda(), ids.cuda(), experts, **on_gpu, **options)
    assert len(got.x) == rows
    same(got, want)
    return got


@pytest.mark.parametrize("fp8", [None, "fp32", "ue8m0"])
@pytest.mark.parametrize("layout", ["row-major", "column-major"])
@pytest.mark.parametrize("experts, routed", [(128, "uniform"), (32, "zipf"), (1024, "k-hot")])
def test_deepseek_v3_tokens_are_grouped_as_on_a_cpu(fp8: str | None, layout: str, experts: int, routed: Any) -> None:
    given = make_inputs(0, 0, 0, 500, hidden=7168, experts=experts, top_k=8, routing=routed, holes=0.2, padding=0.1)
    x, scales = given.x, None
    if fp8 is not None:
        x, scales = quantize(x, fp8 == "ue8m0")
        scales = pack_ue8m0(scales) if fp8 == "ue8m0" else scales
        scales = scales.t().contiguous().t() if layout == "column-major" else scales
    both(x, given.topk_ids, experts, weights=given.topk_weights, scales=scales)


def test_many_counting_programs_and_rounds_of_the_scan() -> None:
    """30000 tokens: 938 programs count, for 1024 experts the scan takes them 8 at a time."""
    for experts, holes in ((1024, 0.0), (7, 0.9)):
        both(rows_of(30_000, 8, torch.bfloat16), routing(30_000, 8, experts, holes=holes), experts, alignment=16)


def test_random_small_routings_match_the_cpu() -> None:
    """Sizes, formats and routings change, so that storage which is used again holds older rows."""
    chance = random.Random(0)
    for seed in range(60):
        tokens, top_k, experts = chance.choice([0, 1, chance.randint(2, 300)]), chance.choice([1, 3, 8, 32]), 9
        x, scales = rows_of(tokens, chance.choice([128, 640]), chance.choice(DTYPES), seed), None
        if chance.random() < 0.4:
            x, scales = quantize(x)
        ids = routing(tokens, top_k, experts, seed, chance.choice([0.0, 0.5, 1.0]))
        ids = ids.to(chance.choice([torch.int32, torch.int64]))
        weights = torch.rand(tokens, top_k) if chance.random() < 0.5 else None
        valid = chance.choice([None, None, -1, 0, tokens // 2, tokens + 7])
        alignment = chance.choice([1, 8, 128])
        got = both(x, ids, experts, alignment=alignment, weights=weights, scales=scales, valid=valid)
        y = rows_of(len(got.x), 136, chance.choice(DTYPES), seed)
        want = unpermute(y, got.places.cpu(), weights)
        assert torch.equal(bits(unpermute(y.cuda(), got.places, there(weights))), bits(want))


def test_loops_agree_too() -> None:
    x, ids, weights = rows_of(90, 256, torch.bfloat16), routing(90, 5, 12), torch.rand(90, 5)
    got = permute(x.cuda(), ids.cuda(), 12, topk_weights=weights.cuda(), alignment=16)
    check(got, x, ids, 12, 16, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_sums_have_the_bits_of_the_cpu(dtype: torch.dtype, weighted: bool) -> None:
    given = make_inputs(3, 0, 0, 300, hidden=7168, experts=64, top_k=8, dtype=dtype, holes=0.2, padding=0.1)
    got = permute(given.x.cuda(), given.topk_ids.cuda(), 64)
    y = rows_of(len(got.x), 7168, dtype, seed=7)
    weights = given.topk_weights if weighted else None
    want = unpermute(y, got.places.cpu(), weights)
    assert torch.equal(bits(unpermute(y.cuda(), got.places, there(weights))), bits(want))


def test_the_same_inputs_give_the_same_bits() -> None:
    x, ids = rows_of(4096, 1024, torch.bfloat16).cuda(), routing(4096, 8, 128, holes=0.0).cuda()
    weights = torch.rand(4096, 8, device="cuda")
    first = permute(x, ids, 128)
    sums = unpermute(first.x, first.places, weights)
    for _ in range(5):
        again = permute(x, ids, 128)
        assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in NAMES)
        assert torch.equal(bits(unpermute(again.x, again.places, weights)), bits(sums))


def test_a_graph_takes_new_routings_and_counts_without_a_synchronisation() -> None:
    tokens, top_k, experts, alignment = 200, 4, 16, 32
    x, ids = torch.zeros(tokens, 256, dtype=torch.bfloat16, device="cuda"), torch.full((tokens, top_k), -1).cuda()
    weights = torch.zeros(tokens, top_k, device="cuda")
    valid = torch.zeros(1, dtype=torch.int32, device="cuda")

    def step() -> tuple[Permuted, torch.Tensor]:
        got = permute(x, ids, experts, topk_weights=weights, alignment=alignment, valid=valid)
        return got, unpermute(got.x, got.places, weights, valid=valid, out=out)

    out = torch.zeros_like(x)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            got, _ = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for turn in range(6):
        new_x, new_ids = rows_of(tokens, 256, torch.bfloat16, turn), routing(tokens, top_k, experts, turn)
        new_weights = torch.rand(tokens, top_k)
        count = torch.tensor([turn * 40], dtype=torch.int32)
        for static, new in zip((x, ids, weights, valid), (new_x, new_ids, new_weights, count), strict=True):
            static.copy_(new)
        got.x.view(torch.uint8).fill_(0x7F)
        out.fill_(-1)
        graph.replay()
        rows = worst_case_rows(tokens, top_k, experts, alignment)
        want = permute(
            new_x, new_ids, experts, topk_weights=new_weights, alignment=alignment, valid=count, capacity=rows
        )
        same(got, want)
        assert (bits(got.x)[want.source < 0] == 0x7F).all(), "padding was written"
        wanted = unpermute(want.x, want.places, new_weights, valid=count, out=torch.full_like(new_x, -1))
        assert torch.equal(bits(out), bits(wanted))


def test_a_wrong_id_is_reported_by_check() -> None:
    x, ids = rows_of(3000, 128, torch.bfloat16).cuda(), routing(3000, 8, 64).cuda()
    ids[2000, 3], ids[2900, 0] = 64, -7
    got = permute(x, ids, 64)
    with pytest.raises(InputError, match=r"topk_ids\[2000, 3\] = 64; allowed are 0 to 63, and -1 for no expert"):
        got.check()
    ids[2000, 3] = ids[2900, 0] = -1
    clean = permute(x, ids, 64)
    assert all(torch.equal(getattr(got, name), getattr(clean, name)) for name in NAMES)


def test_a_capacity_that_is_too_small_is_reported_by_check() -> None:
    x, ids = rows_of(300, 128, torch.bfloat16).cuda(), routing(300, 8, 64).cuda()
    needed = int(permute(x, ids, 64).offsets[-1])
    permute(x, ids, 64, capacity=needed).check()
    got = permute(x, ids, 64, capacity=needed - 1)
    with pytest.raises(InputError, match=rf"capacity={needed - 1}, but this routing needs {needed} rows"):
        got.check()
    assert not got.counts.any() and not got.offsets.any() and (got.places == -1).all() and (got.source == -1).all()
    assert not unpermute(got.x, got.places).any()


def test_a_place_beyond_the_rows_makes_its_token_nan() -> None:
    y = rows_of(3, 128, torch.bfloat16).cuda()
    out = unpermute(y, torch.tensor([[0, 3], [1, 2], [1 << 30, -1]], dtype=torch.int32, device="cuda"))
    assert out[0].isnan().all() and out[2].isnan().all() and not out[1].isnan().any()


def test_tensors_of_two_devices_are_refused() -> None:
    x, ids = rows_of(3, 128, torch.bfloat16).cuda(), routing(3, 2, 4)
    with pytest.raises(InputError, match="topk_ids is on cpu"):
        permute(x, ids, 4)
    with pytest.raises(InputError, match="places is on cpu"):
        unpermute(x, ids.int())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_tensors_may_be_on_another_gpu_than_the_current_one() -> None:
    torch.cuda.set_device(0)
    x, ids = rows_of(50, 128, torch.bfloat16), routing(50, 2, 4)
    got = permute(x.to("cuda:1"), ids.to("cuda:1"), 4, alignment=16)
    assert got.x.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    check(got, x, ids, 4, 16)
    assert torch.equal(unpermute(got.x, got.places).cpu(), unpermute(got.x.cpu(), got.places.cpu()))
