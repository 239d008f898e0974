"""SGLang's Python without a server: what a scheduler process sets before it builds a model. Imports SGLang.

CPU machines lack what SGLang expects of torchvision's binary, so two of its operators are declared here.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import operators
import torch

if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
    operators.declare()

from sglang.srt.batch_overlap import two_batch_overlap
from sglang.srt.layers.moe import utils as moe_utils
from sglang.srt.layers.moe.fused_moe_triton import layer as moe_layer
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs

from moe_a2a.sglang_plugin.dispatcher import MooncakeDispatcher


def publish(**fields: Any) -> None:
    """Give the process server arguments, and what SGLang's MoE layers read of them. Flags are not validated: that needs
    an accelerator. fields: of `ServerArgs`."""
    given = {"model_path": "none", "moe_a2a_backend": "mooncake", "deepep_mode": "auto", **fields}
    if hasattr(ServerArgs, "resolve_once"):  # 0.5.18 and later validate apart from construction
        args = ServerArgs(**given)
    else:
        args = ServerArgs.__new__(ServerArgs)
        for field in dataclasses.fields(ServerArgs):
            if field.default is not dataclasses.MISSING:
                setattr(args, field.name, field.default)
            elif field.default_factory is not dataclasses.MISSING:
                setattr(args, field.name, field.default_factory())
        for name, value in given.items():
            setattr(args, name, value)
    get_context().set_server_args(args)
    takes = inspect.signature(moe_utils.initialize_moe_config).parameters
    moe_utils.initialize_moe_config(*([args] if takes else []))


def make_dispatcher(group: Any, num_experts: int, hidden: int, top_k: int, ranks: int) -> Any:
    """What a MoE layer gets from SGLang's own `create_moe_dispatcher`, with our dispatcher in place of upstream's, as
    the plug-in's hook puts it there."""
    two_batch_overlap.MooncakeEPDispatcher = MooncakeDispatcher
    moe_layer._get_deepep_comm_group = lambda backend: group
    known = {field.name for field in dataclasses.fields(MoeRunnerConfig)}
    fields = {
        "num_experts": num_experts,
        "num_local_experts": num_experts // ranks,
        "hidden_size": hidden,
        "top_k": top_k,
        "params_dtype": torch.bfloat16,
    }
    assert fields.keys() <= known
    takes = inspect.signature(moe_layer.create_moe_dispatcher).parameters
    method = {"quant_method": None} if "quant_method" in takes else {}  # 0.5.23 asks it about another backend
    return moe_layer.create_moe_dispatcher(MoeRunnerConfig(**fields), **method)
