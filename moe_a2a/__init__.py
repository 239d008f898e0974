"""moe-a2a: expert-parallel all-to-all for mixture-of-experts models.

a2a = AllToAll(Config(num_experts=256, hidden_size=7168, top_k=8, max_tokens_per_rank=128))
got = a2a.dispatch(x, topk_ids, topk_weights)
out = a2a.combine(experts(got.x, got.counts), got.handle)
"""

import importlib
from typing import TYPE_CHECKING

# Imported on first use: `moe-a2a doctor` lives in this package and must run where torch cannot be imported.
if TYPE_CHECKING:
    from moe_a2a.all_to_all import AllToAll
    from moe_a2a.bootstrap import KeyValue
    from moe_a2a.config import Config, Options
    from moe_a2a.elastic.options import Elastic
    from moe_a2a.errors import (
        ConfigError,
        EngineError,
        ExcludedFromView,
        HandleError,
        InputError,
        JoinRefused,
        MessageError,
        MoeA2AError,
        RankLost,
        StoreAway,
    )
    from moe_a2a.permutation import permute, unpermute
    from moe_a2a.permuted import Permuted, worst_case_rows
    from moe_a2a.types import Contiguous, Grouped, Handle, Masked

__version__ = "0.1.0"

__all__ = [
    "AllToAll",
    "Config",
    "ConfigError",
    "Contiguous",
    "Elastic",
    "EngineError",
    "ExcludedFromView",
    "Grouped",
    "Handle",
    "HandleError",
    "InputError",
    "JoinRefused",
    "KeyValue",
    "Masked",
    "MessageError",
    "MoeA2AError",
    "NotFinite",
    "Options",
    "Permuted",
    "RankLost",
    "StoreAway",
    "permute",
    "unpermute",
    "worst_case_rows",
]

_MODULES = {
    "all_to_all": ["AllToAll"],
    "bootstrap": ["KeyValue"],
    "config": ["Config", "Options"],
    "elastic.options": ["Elastic"],
    "errors": [
        "ConfigError",
        "EngineError",
        "ExcludedFromView",
        "HandleError",
        "InputError",
        "JoinRefused",
        "MessageError",
        "MoeA2AError",
        "NotFinite",
        "RankLost",
        "StoreAway",
    ],
    "permutation": ["permute", "unpermute"],
    "permuted": ["Permuted", "worst_case_rows"],
    "types": ["Contiguous", "Grouped", "Handle", "Masked"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_backend() -> None:
    from moe_a2a.collectives.register import register

    register()


_register_backend()
