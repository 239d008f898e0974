"""What differs between the supported releases of SGLang, on the side of its arguments."""

from __future__ import annotations

import dataclasses
from typing import Any


def view(server_args: Any) -> Any:
    """The arguments as resolved so far. From 0.5.20 on, resolution declares values and leaves the fields as given."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(server_args)


def declare(server_args: Any, **fields: Any) -> None:
    """Decide fields, from within a step of resolution."""
    from sglang.srt.arg_groups import overrides

    if hasattr(overrides, "declare_resolution"):
        overrides.declare_resolution(server_args, "moe_a2a", **fields)
        return
    for name, value in fields.items():
        setattr(server_args, name, value)


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of these arguments."""
    if hasattr(server_args, "get_model_config"):
        return server_args.get_model_config()
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(server_args)


def most_draft_tokens(server_args: Any) -> int | None:
    """The most draft tokens of a request under adaptive speculation; None without speculation."""
    if view(server_args).speculative_algorithm is None:
        return None
    from sglang.srt.arg_groups import overrides

    if hasattr(overrides, "max_speculative_num_draft_tokens"):
        most = overrides.max_speculative_num_draft_tokens(server_args)
    else:
        most = server_args.max_speculative_num_draft_tokens
    return None if most is None else int(most)


def without_graphs(config: Any) -> Any:
    """A copy of SGLang's CUDA-graph configuration in which neither phase captures graphs."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    phases = {
        name: dataclasses.replace(getattr(config, name), backend=Backend.DISABLED) for name in phase_names(config)
    }
    return dataclasses.replace(config, **phases)


def phase_names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]
