"""`--elastic-ep-backend mooncake`: its arguments, their validation, and the places where a plug-in can come in.

Elastic EP is not served yet. These tests fail when a release moves what that will rest on.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("sglang.srt", reason="SGLang is not installed: make test-sglang")

import sglang
from servers import Failed, in_child, resolve

ELASTIC = ["--moe-a2a-backend", "nixl", "--elastic-ep-backend", "mooncake"]
SOURCES = Path(sglang.__file__).parent / "srt"

#: What SGLang takes from Mooncake for elastic EP, and where: all of it inside functions, so that modules of ours can be
#: put in place of `mooncake.pg` and `mooncake.mooncake_ep_buffer` before it is first asked for.
IMPORTS = {
    ("mooncake.mooncake_ep_buffer", "Buffer"): "layers/moe/token_dispatcher/mooncake.py",
    ("mooncake.pg", "MooncakeBackendOptions"): "distributed/parallel_state.py",
    ("mooncake.pg", "get_peer_state"): "elastic_ep/elastic_ep.py",
    ("mooncake.pg", "join_group"): "elastic_ep/elastic_ep.py",
    ("mooncake.pg", "recover_ranks"): "elastic_ep/elastic_ep.py",
    ("mooncake.pg", "set_transfer_engine"): "distributed/device_communicators/mooncake_transfer_engine.py",
}

#: Functions that a plug-in would hook, with the parameters that it relies on.
PLACES = {
    "sglang.srt.elastic_ep.elastic_ep": {
        "maybe_recover_ep_ranks": set(),
        "maybe_rebalance_after_rank_fault": {"eplb_manager"},
        "try_recover_ranks": {"global_ranks"},
        "join_process_groups": set(),
        "_refresh_ep_members": set(),
    },
    "sglang.srt.distributed.parallel_state": {"init_distributed_environment": {"backend"}},
    "sglang.srt.distributed.device_communicators.mooncake_transfer_engine": {
        "maybe_init_shared_mooncake_transfer_engine": {"gpu_id"},
    },
}


def decided(*flags: str) -> dict[str, Any]:
    from moe_a2a.sglang_plugin import adapter

    args = adapter.view(resolve(*flags))
    names = ["elastic_ep_backend", "eplb_algorithm", "mooncake_ib_device", "ep_join_mode", "max_ep_size"]
    return {name: getattr(args, name) for name in names}


def test_the_arguments_are_known() -> None:
    assert in_child(decided, *ELASTIC) == {
        "elastic_ep_backend": "mooncake",
        "eplb_algorithm": "auto",
        "mooncake_ib_device": None,
        "ep_join_mode": None,
        "max_ep_size": None,
    }
    assert in_child(decided, *ELASTIC, "--enable-eplb")["eplb_algorithm"] == "elasticity_aware"
    assert in_child(decided, *ELASTIC, "--elastic-ep-join-mode", "recover")["ep_join_mode"] == "recover"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--enable-eplb", "--eplb-algorithm", "deepseek"], "Elastic EP requires eplb_algorithm"),
        (["--mooncake-ib-device", "mlx5_99"], "InfiniBand|IB device"),
        (["--max-ep-size", "0"], "--max-ep-size must be a positive integer"),
    ],
)
def test_sglang_validates_them(flags: list[str], message: str) -> None:
    with pytest.raises(Failed, match=message):
        in_child(decided, *ELASTIC, *flags)


def test_a_join_needs_a_backend() -> None:
    with pytest.raises(Failed, match="--elastic-ep-join-mode requires --elastic-ep-backend"):
        in_child(decided, "--elastic-ep-join-mode", "recover")


def test_scale_up_wants_another_a2a_backend() -> None:
    flags = ["--max-ep-size", "4", "--disable-cuda-graph", "--load-balance-method", "round_robin"]
    assert in_child(decided, *ELASTIC, *flags)["max_ep_size"] == 4
    other = ["--moe-a2a-backend", "deepep", "--elastic-ep-backend", "mooncake"]
    with pytest.raises(Failed, match="scale-up requires --moe-a2a-backend nixl"):
        in_child(decided, *other, *flags)


def test_all_of_mooncake_is_imported_within_functions() -> None:
    found: dict[tuple[str, str], set[str]] = {}
    for path in SOURCES.rglob("*.py"):
        text = path.read_text(errors="replace")
        if "from mooncake." not in text:
            continue
        tree = ast.parse(text)
        inside = {
            node
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mooncake."):
                assert node in inside, (path, node.lineno)
                for alias in node.names:
                    found.setdefault((node.module or "", alias.name), set()).add(str(path.relative_to(SOURCES)))
    of_elastic_ep = {
        name: files for name, files in found.items() if name[0] in ("mooncake.pg", "mooncake.mooncake_ep_buffer")
    }
    assert of_elastic_ep == {name: {file} for name, file in IMPORTS.items()}


def test_the_places_to_hook_are_there() -> None:
    for module, functions in PLACES.items():
        for name, parameters in functions.items():
            function = getattr(importlib.import_module(module), name)
            known = set(inspect.signature(function).parameters)
            if name == "maybe_init_shared_mooncake_transfer_engine" and "server_args" in known:
                continue  # up to 0.5.19
            assert parameters <= known, (module, name, known)


def test_members_are_refreshed_on_the_existing_buffer() -> None:
    """SGLang asks the class EPBuffer for a buffer and that for `update_ep_member`: ours can be given there."""
    from sglang.srt.elastic_ep import elastic_ep
    from sglang.srt.layers.moe.token_dispatcher.mooncake import EPBuffer

    buffer = mock.Mock()
    with mock.patch.object(EPBuffer, "get_existing_buffer", return_value=buffer):
        elastic_ep._refresh_ep_members()
    buffer.update_ep_member.assert_called_once_with()


def test_a_process_group_module_of_ours_is_what_sglang_gets() -> None:
    from sglang.srt.elastic_ep import elastic_ep

    ours = ModuleType("mooncake.pg")
    asked: list[Any] = []
    ours.get_peer_state = lambda group, ranks: asked.append((group, ranks)) or [True for _ in ranks]  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"mooncake.pg": ours}):
        elastic_ep._wait_for_peer_state("group", [1, 2])
    assert asked == [("group", [1, 2])]
