"""What the plug-in does in a scheduler process of a server that asks for mooncake, before the model is built."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from moe_a2a import __version__
from moe_a2a.config import DEFAULT_SMS
from moe_a2a.sglang_plugin import adapter, asks_for_mooncake, flags, limits, versions
from moe_a2a.sglang_plugin.arguments import MARK

logger = logging.getLogger(__name__)

_UPSTREAM = "sglang.srt.layers.moe.token_dispatcher.mooncake"


def activate(server_args: Any) -> None:
    """Put this package's dispatcher in place of SGLang's. Raises FlagError, and whatever an import raises."""
    args = adapter.view(server_args)
    if not asks_for_mooncake(args):
        return
    begin = time.monotonic()
    versions.check()
    if not getattr(server_args, MARK, False):
        raise limits.FlagError(
            "--moe-a2a-backend mooncake: these server arguments were resolved before the moe-a2a plug-in was loaded; "
            "call sglang.srt.plugins.load_plugins() before ServerArgs(...) is made, or set MOE_A2A_SGLANG=0"
        )
    limits.use(limits.limits_from_server_args(args, adapter.most_draft_tokens(server_args)))
    replace_dispatcher()
    provide_sms(args)
    watch()
    _log(args, time.monotonic() - begin)


def replace_dispatcher() -> None:
    """Every module that holds SGLang's MooncakeEPDispatcher gets ours. RuntimeError if one still builds the other."""
    import sglang.srt.batch_overlap.two_batch_overlap as two_batch_overlap
    import sglang.srt.layers.moe.token_dispatcher.mooncake as upstream

    from moe_a2a.sglang_plugin.dispatcher import MooncakeDispatcher

    theirs = upstream.MooncakeEPDispatcher
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get("MooncakeEPDispatcher") is theirs:
            module.MooncakeEPDispatcher = MooncakeDispatcher  # type: ignore[attr-defined]
    if two_batch_overlap.MooncakeEPDispatcher is not MooncakeDispatcher:
        raise RuntimeError(
            f"{two_batch_overlap.__name__} builds {two_batch_overlap.MooncakeEPDispatcher} for mooncake and not "
            f"{MooncakeDispatcher}: another plug-in has replaced it; leave that one out (SGLANG_PLUGINS=moe-a2a)"
        )


def provide_sms(args: Any) -> None:
    """Two-batch overlap asks DeepEP how many SMs communication takes from GEMMs, and DeepEP need not be installed."""
    if args.moe_a2a_backend != "mooncake":
        return
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPConfig

    DeepEPConfig._instance = SimpleNamespace(
        num_sms=DEFAULT_SMS, normal_dispatch_config=None, normal_combine_config=None
    )


def watch() -> None:
    """Have each expert layer checked when it is built, and errors of replayed graphs raised after a forward pass."""
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
    from sglang.srt.model_executor.model_runner import ModelRunner

    from moe_a2a.sglang_plugin import buffers

    _follow(DeepEPMoE, "__init__", check_runner)
    _follow(ModelRunner, "forward", lambda runner: buffers.poll())


def _follow(owner: Any, name: str, then: Callable[[Any], None]) -> None:
    """Call `then(self)` whenever a method has returned."""
    method = getattr(owner, name)
    if hasattr(method, "_moe_a2a"):
        return

    @functools.wraps(method)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        then(self)
        return result

    followed._moe_a2a = True  # type: ignore[attr-defined]
    setattr(owner, name, followed)


def check_runner(layer: Any) -> None:
    """Raise FlagError for an expert layer that no runner serves; let DeepGEMM's bf16 runner serve unquantised ones."""
    from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend

    if not get_moe_a2a_backend().is_mooncake() or layer.deprecate_flag or layer.use_w4afp8:
        return
    quantisation = None if layer.quant_config is None else layer.quant_config.get_name()
    # 0.5.23 settles the runner for each layer.
    runner = getattr(layer, "runner_backend", None) or get_moe_runner_backend()
    if quantisation is None and runner.is_deep_gemm() and _deep_gemm():
        # SGLang has this branch for DeepEP only: DeepGEMM takes bf16 rows in both layouts.
        layer.deprecate_flag = True
        layer.dispatcher.set_quant_config({"dispatcher_output_dtype": "bf16"})
        return
    raise limits.FlagError(
        f"--moe-runner-backend {runner.value} with --moe-a2a-backend mooncake and a model quantised as {quantisation}"
        f"{'' if _deep_gemm() else ' (DeepGEMM is not installed, or off)'}: no runner takes these experts from a "
        "dispatcher; use an FP8 model with DeepGEMM, a W4AFP8 one, or an unquantised one with "
        "--moe-runner-backend deep_gemm"
    )


def _deep_gemm() -> bool:
    from sglang.srt.layers import deep_gemm_wrapper

    return bool(deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM)


def _log(args: Any, seconds: float) -> None:
    import sglang

    now = limits.current()
    on_gpu = args.device in (None, "cuda")
    transport = (
        "mapped memory of the GPUs of one host"
        if on_gpu
        else "shared memory in a host, the Transfer Engine between hosts"
    )
    logger.info(
        "moe-a2a %s serves --moe-a2a-backend mooncake in SGLang %s: EP %d over %s, --deepep-mode %s, "
        "at most %d tokens per rank in decode and %d in prefill, %d micro-batch%s in flight, set up in %.2f s.%s",
        __version__,
        sglang.__version__,
        args.ep_size,
        transport,
        args.deepep_mode,
        now.max_tokens_per_rank_decode,
        now.max_tokens_per_rank_prefill,
        len(now.channels),
        "es" if len(now.channels) > 1 else "",
        seconds,
        f" {flags.UPSTREAM_LIMIT} is not read." if flags.UPSTREAM_LIMIT in os.environ else "",
    )
