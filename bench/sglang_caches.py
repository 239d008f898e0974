"""Kernels that a server has compiled, packed for the next machine: most of a first start is their compilation."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

FOLDERS = (".cache/flashinfer", ".cache/tvm-ffi", ".cache/deep_gemm", ".deep_gemm", ".triton")
PART_BYTES = 15 << 20


def save(out: Path, home: Path | None = None) -> list[Path]:
    """Write caches-0, caches-1, ... of at most 15 MiB into `out`; returns them."""
    home = home or Path.home()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for folder in FOLDERS:
            if (home / folder).is_dir():
                tar.add(home / folder, folder)
    data = packed.getvalue()
    parts = []
    for begin in range(0, len(data), PART_BYTES):
        parts.append(out / f"caches-{len(parts)}")
        parts[-1].write_bytes(data[begin : begin + PART_BYTES])
    return parts


def restore(parts: Path, home: Path | None = None) -> None:
    """Unpack what `save` wrote."""
    files = sorted(parts.glob("caches-*"), key=lambda path: int(path.name.removeprefix("caches-")))
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in files)), mode="r:xz") as tar:
        tar.extractall(home or Path.home(), filter="fully_trusted")
