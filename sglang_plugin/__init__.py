"""The SGLang plug-in: with this package installed, `--moe-a2a-backend mooncake` runs on it. See docs/sglang.md.

SGLang logs exceptions of plug-ins and goes on without them, so `register` only places hooks, which import what they
need when they run: an error there is raised inside SGLang's own start-up and stops the server. Hooks do nothing in a
server that does not ask for mooncake.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

#: "0" in this environment variable leaves SGLang as it was.
SWITCH = "MOE_A2A_SGLANG"

_ARGUMENTS = "sglang.srt.server_args.ServerArgs"
_SCHEDULER = "sglang.srt.managers.scheduler"


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`: place this package's hooks in this process."""
    if os.environ.get(SWITCH) == "0":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ServerArgs

    place = HookRegistry.register
    # Where resolution begins. Up to 0.5.19 that is with the object itself.
    begin = "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"
    place(f"{_ARGUMENTS}.{begin}", _on_arguments, HookType.BEFORE)
    # Only a process that runs schedulers has imported their module by now, and the others should not because of us.
    if _SCHEDULER in sys.modules:
        place(f"{_SCHEDULER}.Scheduler.__init__", _on_scheduler, HookType.BEFORE)
    _place_resolution_hooks(lambda target, hook: place(target, hook, HookType.AROUND))


def _place_resolution_hooks(place_around: Callable[[str, Callable[..., None]], None]) -> None:
    """Steps of SGLang's argument resolution that ours follow. Versions without them are refused by `_on_arguments`."""
    steps: dict[str, Callable[..., None]] = {"handle_a2a_moe": _after_a2a, "handle_other_validations": _after_all}
    try:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    except ImportError:  # up to 0.5.19 the steps are methods
        for name, hook in steps.items():
            place_around(f"{_ARGUMENTS}._{name}", hook)
    else:
        for name, hook in steps.items():
            register_resolution_hook(name)(_wrapper(hook))


def _wrapper(hook: Callable[..., None]) -> Callable[[Any, Callable[[Any], None]], None]:
    return lambda server_args, previous: hook(previous, server_args)


def asks_for_mooncake(args: Any) -> bool:
    """Whether a server with these arguments, resolved or not, is for this package: its model, or its draft model."""
    fields = ("moe_a2a_backend", "speculative_moe_a2a_backend")
    return any(getattr(args, field, None) == "mooncake" for field in fields)


def _on_arguments(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Before anything is resolved: refuse what cannot work whatever the rest says."""
    if asks_for_mooncake(server_args):
        from moe_a2a.sglang_plugin import arguments

        arguments.on_request(server_args)


def _after_a2a(step: Callable[[Any], None], server_args: Any) -> None:
    step(server_args)
    if asks_for_mooncake(server_args):
        from moe_a2a.sglang_plugin import arguments

        arguments.after_a2a(server_args)


def _after_all(step: Callable[[Any], None], server_args: Any) -> None:
    step(server_args)
    if asks_for_mooncake(server_args):
        from moe_a2a.sglang_plugin import arguments

        arguments.after_all(server_args)


def _on_scheduler(scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Before a scheduler builds its model: put this package's dispatcher in place."""
    if asks_for_mooncake(server_args):
        from moe_a2a.sglang_plugin import activation

        activation.activate(server_args)
