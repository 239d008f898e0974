"""Launching a kernel: compiled once for what can change it, then straight to the driver.

Triton's own launch path looks again at every argument and every global at each call, 40 us for a kernel with twenty
arguments on a virtual machine. Here the caller names what a compiled kernel depends on: its constants and the dtypes
that vary. Everything else is fixed: addresses are multiples of 16 (`moe_a2a.gpu.inputs`), integers not specialised.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton

from moe_a2a.kernels.signals import PORTABLE

_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Hashable, ...],
    dtypes: tuple[torch.dtype, ...],
    **options: Any,
) -> None:
    """Run `kernel` on the current device and stream, on a grid of `programs`.

    arguments, then constants, are its parameters in order. dtypes: of the arguments whose dtype is not always the same.
    options: Triton's (num_warps, ...), always the same for one kernel.
    """
    if PORTABLE.value:
        kernel[(programs,)](*arguments, *constants)
        return
    device = torch.cuda.current_device()
    key = (id(kernel), device, dtypes, constants)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(programs,)](*arguments, *constants, **options)
    elif triton.knobs.runtime.launch_enter_hook.calls:  # a profiler that wants to see every launch
        compiled[(programs, 1, 1)](*arguments, *constants)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        # What compiled[grid](...) does in Triton 3.6 to 3.8, without looking up device, stream and hooks once more.
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *constants)
