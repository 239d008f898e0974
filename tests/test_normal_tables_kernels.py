"""The kernels of DeepEP's normal mode in Triton's interpreter, against the torch code of CPU ranks."""

from __future__ import annotations

import os
import sys

# Before anything imports Triton, which decides then how it runs kernels.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton

from moe_a2a.compat import normal_tables as torch_code
from moe_a2a.gpu.layout import Layout
from moe_a2a.kernels import normal_tables as kernels

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton was imported to compile in this process; run without tests/gpu"
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, and several turns of each loop, with little work in each."""
    monkeypatch.setattr(kernels, "_TOKENS", 8)
    monkeypatch.setattr(kernels, "_BLOCK", 16)


def ids_of(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    ids[::7, 0] = experts + 3  # no expert's number
    ids[1::7, 0] = -(1 << 40)
    return ids


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [0, 1, 8, 61])
def test_layouts(ranks: int, tokens: int) -> None:
    ids = ids_of(tokens, 3, 4 * ranks)
    want = torch_code.dispatch_layout(ids, ranks, 4 * ranks)
    for got, wanted in zip(kernels.dispatch_layout(ids, ranks, 4 * ranks), want, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted) and got.is_contiguous()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("tokens", "rows", "channels"), [(0, 0, 4), (1, 5, 3), (61, 40, 1), (61, 33, 2), (13, 0, 10), (64, 16, 4)]
)
def test_tables_of_handles(ranks: int, tokens: int, rows: int, channels: int) -> None:
    layout = Layout(ranks, 4 * ranks, 128, 3, 64, 2)
    hit = torch_code.dispatch_layout(ids_of(tokens, 3, 4 * ranks), ranks, 4 * ranks)[2]
    generator = torch.Generator().manual_seed(rows)
    source = torch.randint(0, ranks * layout.M, (rows,), generator=generator, dtype=torch.int32)
    source[rows // 2 :] = -1
    region = torch.full((layout.region_bytes,), 0x7F, dtype=torch.uint8)
    matrix = torch.randint(0, 64, (ranks, ranks + 1), generator=generator, dtype=torch.int32)
    for step in (6, 7):
        start = step % 2 * layout.parity_bytes + layout.matrix
        region[start : start + 4 * matrix.numel()].view(torch.int32).copy_(matrix.flatten() * step)
        handle = torch.zeros(layout.HANDLE_WORDS, dtype=torch.int64)
        handle[layout.STEP] = step
        between, prefix, unused, numbers, head = kernels.handle_tables(layout, hit, source, channels, region, handle)
        assert torch.equal(between, (matrix[:, :ranks] * step).cumsum(0, dtype=torch.int32))
        wanted_prefix, wanted_head = torch_code.channel_tables(hit, channels)
        assert torch.equal(prefix, wanted_prefix) and torch.equal(head, wanted_head)
        assert torch.equal(unused, torch.zeros_like(prefix))
        assert torch.equal(numbers, torch.where(source < 0, -1, source % layout.M))


def test_tensors_that_start_anywhere() -> None:
    ids = ids_of(9, 3, 8)
    spaced = torch.cat([ids[:1], ids])[1:]
    assert spaced.data_ptr() % 16
    assert torch.equal(kernels.dispatch_layout(spaced, 2, 8)[2], torch_code.dispatch_layout(ids, 2, 8)[2])
