"""Launching a kernel: compiled once for what can change it, then straight to the driver.

Triton's own launch path looks again at every argument and every global at each call, 40 us for a kernel with twenty
arguments on a virtual machine. Here the caller names what a compiled kernel depends on: its constants and the dtypes
that vary. Everything else is fixed: addresses are multiples of 16 (`moe_a2a.gpu.inputs`), integers not specialised.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import triton

from moe_a2a.kernels.signals import PORTABLE

_AS_IT_IS: Mapping[int, torch.dtype] = {}


class Launch:
    """A kernel with everything that is the same at every launch. Keep it: the first launch on a device compiles.

    constants: the kernel's last parameters, in order. views: arguments (by place) that the kernel reads as another
    dtype. options: Triton's (num_warps, ...). An argument has the same dtype at every launch.
    """

    def __init__(
        self,
        kernel: Any,
        constants: tuple[Hashable, ...],
        views: Mapping[int, torch.dtype] = _AS_IT_IS,
        **options: Any,
    ) -> None:
        self._kernel, self._constants, self._views, self._options = kernel, constants, views, options
        self._compiled: dict[int, tuple[Any, Any, Any]] = {}

    def __call__(self, programs: int, arguments: tuple[torch.Tensor | int, ...]) -> None:
        """Run on the current device and stream, on a grid of `programs`. arguments: the kernel's first parameters."""
        if PORTABLE.value:
            self._kernel[(programs,)](*self._typed(arguments), *self._constants)
            return
        device = torch.cuda.current_device()
        compiled = self._compiled.get(device)
        if compiled is None or triton.knobs.runtime.launch_enter_hook.calls:  # a profiler wants to see every launch
            found = self._kernel[(programs,)](*self._typed(arguments), *self._constants, **self._options)
            self._compiled[device] = found.run, found.function, found.packed_metadata
            return
        run, function, metadata = compiled
        # What compiled[grid](...) does in Triton 3.6 to 3.8, without looking up device, stream and hooks once more. An
        # address as an int is taken as it is; of a tensor, the driver would be asked whose memory it is.
        run(
            programs,
            1,
            1,
            torch._C._cuda_getCurrentRawStream(device),
            function,
            metadata,
            None,
            None,
            None,
            *[a if a.__class__ is int else a.data_ptr() for a in arguments],  # type: ignore[union-attr]
            *self._constants,
        )

    def _typed(self, arguments: tuple[torch.Tensor | int, ...]) -> list[Any]:
        """The arguments as the kernel reads them."""
        typed: list[Any] = list(arguments)
        for place, dtype in self._views.items():
            typed[place] = typed[place].view(dtype)
        return typed


def warps(wanted: int, ranks: int) -> int:
    """How many warps a program may have that is unrolled over ranks: the more of these, the more registers each thread
    needs, of 64K that an SM has."""
    return min(wanted, 32 if ranks <= 2 else 16 if ranks <= 8 else 8)


_launches: dict[Hashable, Launch] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Hashable, ...],
    dtypes: tuple[torch.dtype, ...],
    **options: Any,
) -> None:
    """`Launch` for callers that need not save every microsecond. dtypes: of the arguments whose dtype may vary."""
    key = (kernel, constants, dtypes)
    found = _launches.get(key)
    if found is None:
        found = _launches[key] = Launch(kernel, constants, **options)
    found(programs, arguments)
