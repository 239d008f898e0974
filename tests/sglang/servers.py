"""Server arguments that SGLang itself resolves on a machine without a GPU, and processes for what cannot be undone.

SGLang refuses to resolve arguments without an accelerator. `fake_gpu` answers its questions as two H200 would; nothing
runs on them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Before any fake: what these import depends on whether there is a GPU.
import sglang.srt.managers.scheduler
import sglang.srt.models.deepseek_v2
import sglang.srt.plugins
import torch
from sglang.srt.server_args import prepare_server_args

from moe_a2a import sglang_plugin

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_deepseek_v3"

#: A server on two GPUs, as bench/sglang_server.py starts it.
FLAGS = f"""--model-path {MODEL} --load-format dummy --skip-tokenizer-init --tp-size 2 --dp-size 2 --enable-dp-attention
    --moe-dense-tp-size 1 --enable-dp-lm-head --attention-backend triton --sampling-backend pytorch
    --grammar-backend none --disable-custom-all-reduce --mem-fraction-static 0.3 --chunked-prefill-size 256""".split()

MOONCAKE = ["--moe-a2a-backend", "mooncake"]


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Two H200, as far as SGLang's questions about them go."""
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=141 << 30, multi_processor_count=132, major=9, minor=0
    )
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_device_properties": lambda *args, **kwargs: properties,
        "mem_get_info": lambda device=None: (140 << 30, 141 << 30),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        yield


def resolve(*flags: str) -> Any:
    """SGLang's ServerArgs, resolved, of a command line."""
    with fake_gpu():
        args = prepare_server_args([*FLAGS, *flags])
        if hasattr(args, "resolve_once"):  # from 0.5.20 on; before, construction resolves
            args.resolve_once()
    return args


def load_plugins() -> None:
    """What SGLang does first in each process, with this package's entry point as an installed package has it."""
    entry = importlib.metadata.EntryPoint(
        "moe-a2a", "moe_a2a.sglang_plugin:register", sglang.srt.plugins.GENERAL_PLUGINS_GROUP
    )

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [entry] if group == entry.group else []

    with mock.patch.object(sglang.srt.plugins, "entry_points", entry_points):
        sglang.srt.plugins.load_plugins()


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a forked process, since hooks cannot be taken back. Raises Failed for its exceptions."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send((True, function(*args)))
        except BaseException as error:
            theirs.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))

    process = context.Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        good, value = ours.recv()
    except EOFError:
        raise Failed("the process died", "") from None
    finally:
        process.join(10)
    if good:
        return value
    raise Failed(*value)


class Failed(Exception):
    """An exception in a child: its type and text."""

    def __init__(self, text: str, details: str) -> None:
        super().__init__(text)
        self.details = details


def is_active() -> bool:
    """Whether SGLang's two-batch overlap, which builds dispatchers, has ours."""
    import sglang.srt.batch_overlap.two_batch_overlap as two_batch_overlap

    return two_batch_overlap.MooncakeEPDispatcher.__module__.startswith(sglang_plugin.__name__)
