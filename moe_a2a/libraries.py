"""The Transfer Engine's wheels, and the system libraries that they link to but do not bring.

Imports neither torch nor the engine, so that it can explain why one of them does not load.
"""

from __future__ import annotations

import re

# The first release whose TCP writes are acknowledged: "sent" then means "applied".
MINIMUM_ENGINE = "0.3.13.post1"
# Distribution -> the extra of moe-a2a that picks it. All three install the same package, `mooncake`.
ENGINE_WHEELS = {
    "mooncake-transfer-engine-non-cuda": "cpu",
    "mooncake-transfer-engine": "cuda12",
    "mooncake-transfer-engine-cuda13": "cuda13",
}

# Library -> its package on Debian and Ubuntu. Every wheel links to the first three, the CUDA wheels to all.
SYSTEM_LIBRARIES = {
    "libibverbs.so.1": "libibverbs1",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
    "libmlx5.so.1": "ibverbs-providers",
}


def install_engine(extra: str = "cpu") -> str:
    """The command that installs a Transfer Engine. extra: "cpu", "cuda12" or "cuda13"."""
    (wheel,) = (name for name, picked_by in ENGINE_WHEELS.items() if picked_by == extra)
    return f'pip install "{wheel}>={MINIMUM_ENGINE}"'


def replace_engine(extra: str = "cpu") -> str:
    """The command that puts another wheel in place of the installed ones.

    They share their files: removing one breaks the others, so all go first.
    """
    return f"pip uninstall -y {' '.join(ENGINE_WHEELS)} && {install_engine(extra)}"


def missing_library(message: str) -> str | None:
    """The library that a failed import names: "libX.so.1: cannot open shared object file" gives "libX.so.1"."""
    match = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file", message)
    return match.group(1) if match else None


def how_to_get(library: str, extra: str = "cpu") -> str:
    """The command that mends an engine whose `library` is missing. extra: the wheel that suits the installed torch."""
    if library in SYSTEM_LIBRARIES:
        return f"apt-get install -y {SYSTEM_LIBRARIES[library]}"
    if library == "libcuda.so.1":  # comes with NVIDIA's driver only: no GPU here, so the CPU wheel is the right one
        return replace_engine("cpu")
    if library.startswith("libcudart.so"):
        return replace_engine(extra)
    return f"apt-get install -y apt-file && apt-file update && apt-file search {library}"
