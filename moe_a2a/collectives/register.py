"""Backend "moe_a2a" of torch.distributed, made known when both packages are imported, in whichever order."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAME = "moe_a2a"
_TORCH = "torch.distributed.distributed_c10d"


def make(torch_options: Any, options: Any) -> Any:
    """What torch calls for `init_process_group("moe_a2a", pg_options=options)` and `new_group`."""
    from dataclasses import replace

    from torch.distributed import group

    from moe_a2a.collectives.options import Options
    from moe_a2a.collectives.process_group import ProcessGroupMoeA2A
    from moe_a2a.collectives.subgroups import within
    from moe_a2a.errors import ConfigError

    if options is not None and not isinstance(options, Options):
        raise ConfigError(
            f"pg_options is a {type(options).__name__}; backend {NAME} takes moe_a2a.collectives.Options or None"
        )
    given, store, world = torch_options, torch_options.store, group.WORLD
    if isinstance(world, ProcessGroupMoeA2A):
        if options is None:
            options = replace(world.options, slots=None, joining=False, store="", group="")
        store, options = within(lambda: world.member, store, given.group_id, options)
    return ProcessGroupMoeA2A(store, given.group_rank, given.group_size, given.timeout, options, given.group_id)


def register() -> None:
    """Now, if torch.distributed is there; else as soon as it is imported. Does nothing where torch has none."""
    module = sys.modules.get(_TORCH)
    if module is not None and hasattr(module, "Backend"):
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(module: ModuleType) -> None:
    backend: Any = module.__dict__["Backend"]
    if NAME.upper() not in backend._plugins:
        backend.register_backend(NAME, make, extended_api=True, devices=["cpu"])


class _Finder(importlib.abc.MetaPathFinder):
    """Lets torch's module be found as ever, and registers when it has been run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TORCH:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if hasattr(module, "Backend"):
            _register(module)
