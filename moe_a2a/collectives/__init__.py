"""A torch.distributed process group for CPU tensors that goes on when ranks die (backend "moe_a2a").

`import moe_a2a` registers the backend; docs/collectives.md explains it.
"""

import importlib
from typing import TYPE_CHECKING

# Imported on first use: registering the backend must not cost a program that never asks for it.
if TYPE_CHECKING:
    from moe_a2a.collectives.options import Options
    from moe_a2a.collectives.process_group import ProcessGroupMoeA2A
    from moe_a2a.collectives.work import CollectiveWork

__all__ = ["CollectiveWork", "Options", "ProcessGroupMoeA2A"]

_MODULE_OF = {"CollectiveWork": "work", "Options": "options", "ProcessGroupMoeA2A": "process_group"}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
