"""Two operators of torchvision, which its import needs on a CPU: its build from a package index is for CUDA."""

from __future__ import annotations

import inspect


def declare() -> None:
    """Once in a process."""
    from torch import library

    for name in ("nms", "qnms"):
        library.define("torchvision::" + name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


#: For processes that a test starts.
PROGRAM = inspect.getsource(declare) + "\n\ndeclare()\n"
