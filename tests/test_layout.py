"""Where things lie in a GPU rank's memory, and how much of it there is."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import Config, ConfigError
from moe_a2a.gpu.layout import Layout
from moe_a2a.gpu.report import NO_BAD_INPUT, describe_bad_input, describe_misuse, ranks_of

AREAS = ("flags", "headers", "chunks", "matrix", "counts", "bounds", "table", "weights", "source", "rows", "sums")


@pytest.mark.parametrize(
    "tokens, fp8_only, most", [(128, True, 12e6), (128, False, 16e6), (1024, True, 100e6), (1024, False, 120e6)]
)
def test_the_buffers_of_deepseek_v3_on_two_gpus_stay_small(tokens: int, fp8_only: bool, most: float) -> None:
    """DeepEP's low-latency mode takes 1.9 GB and 15.1 GB for these sizes."""
    assert Layout.of(Config(256, 7168, 8, tokens), 2, fp8_only).region_bytes <= most


@pytest.mark.parametrize("ranks, tokens", [(2, 4096), (8, 1024)])
def test_prefill_needs_little_beside_its_rows(ranks: int, tokens: int) -> None:
    rows = ranks * tokens * 7168 * 2
    assert Layout.of(Config(256, 7168, 8, tokens), ranks).region_bytes <= 1.1 * 2 * 2 * rows


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fp8_only", [False, True])
@pytest.mark.parametrize("window", [7, 3])
def test_areas_follow_one_another_aligned_and_without_overlap(
    ranks: int, dtype: torch.dtype, fp8_only: bool, window: int
) -> None:
    layout = Layout.of(Config(24, 640, 5, 7, dtype), ranks, fp8_only, ranks * window)
    slots, rounds = ranks * window, {7: 1, 3: 3}[window]
    found = (layout.W, layout.ROUNDS, layout.MOST)
    assert found == (window, rounds, ranks * 7)
    turns = 2 * rounds if rounds > 1 else 0
    needed = [
        (layout.PHASES + 2 * turns) * ranks * 8,
        ranks * 64,
        ranks * 1 * 8,  # chunks of 16 rows
        ranks * (ranks + 1) * 4,
        ranks * layout.E_L * 4,
        ranks * (rounds + 1) * 4 if rounds > 1 else 0,
        slots * 40,
        slots * 20,
        slots * 4,
        slots * layout.row_stride,
        slots * 640 * dtype.itemsize,
    ]
    starts = [getattr(layout, name) for name in AREAS] + [layout.parity_bytes]
    for start, end, size in zip(starts[:-1], starts[1:], needed, strict=True):
        assert start % 256 == 0 and start + size <= end < start + size + 256
    assert layout.region_bytes == 2 * layout.parity_bytes
    assert layout.row_stride % 16 == 0 and layout.row_stride >= 640 + 4 * 5
    assert layout.scales + slots * 20 <= layout.sums
    assert layout.row_stride >= 640 * dtype.itemsize or fp8_only


def test_sizes_beyond_the_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="allowed are 1 to 60"):
        Layout.of(Config(64, 128, 1, 1), 64)
    with pytest.raises(ConfigError, match="GPU ranks allow 1 to 1048576"):
        Layout.of(Config(2, 128, 1, 1 << 21), 2)


def test_the_name_tells_layouts_apart() -> None:
    """Triton's cache keys are made of it."""
    names = {repr(Layout(2, 8, 128, 2, m, 2, f, c)) for m in (1, 3, 12) for f in (False, True) for c in (2, 24)}
    assert len(names) == 10 and all(name.isidentifier() for name in names)


def bad_word(token: int, position: int, kind: int, value: int) -> int:
    return token << 42 | position << 35 | kind << 32 | value


def test_report_words_read_as_messages() -> None:
    layout = Layout(2, 256, 32768, 8, 1 << 20, 2)

    def says(*fields: int) -> str:
        return describe_bad_input(bad_word(*fields), layout, torch.float16)

    last = (1 << 20) - 1
    id_300, minus_inf = 300 + (1 << 31), 0xFF800000
    assert says(127, 7, 0, id_300) == "topk_ids[127, 7] = 300; allowed are 0 to 255, and -1 for no expert"
    assert says(last, 31, 1, id_300).startswith(f"topk_ids[{last}] names expert 300 twice")
    assert says(3, 2, 2, minus_inf).startswith("scales: token 3, columns 256 to 383 has scale -inf; scales must be")
    assert says(3, 127, 3, 0x7FC00000).startswith("x: token 3, columns 16256 or later has scale nan; scales must be")
    assert says(9, 31, 4, minus_inf) == (
        "topk_weights[9, 31] = -inf; router weights must be finite and within 65504 for torch.float16"
    )
    assert bad_word(last, 127, 4, 0xFFFFFFFF) < NO_BAD_INPUT
    assert ranks_of(0b10110) == [1, 2, 4]
    assert "while the one before the last was open" in describe_misuse(Layout.STARTED_EARLY)
    assert "that had ended" in describe_misuse(Layout.ENDED_TWICE)
