"""What the plug-in does while SGLang resolves the arguments of a server that asks for mooncake."""

from __future__ import annotations

import logging
from typing import Any

from moe_a2a.sglang_plugin import adapter, asks_for_mooncake, flags, versions
from moe_a2a.sglang_plugin.limits import attention_data_parallel, default_running_requests, limits_from_server_args

logger = logging.getLogger(__name__)

#: Set on arguments that have passed all checks; travels with them to the scheduler processes.
MARK = "_moe_a2a_checked"


def on_request(server_args: Any) -> None:
    """Before resolution: the version, and flags that are wrong whatever the others say. Raises FlagError."""
    versions.check()
    flags.check_request(server_args)
    # SGLang takes the word "none" for a backend's name and would poll the state of an elastic group that nobody has.
    if server_args.elastic_ep_backend == "none":
        server_args.elastic_ep_backend = None


def after_a2a(server_args: Any) -> None:
    """After SGLang has settled the backend: steps of `normal` read counts on the host, which no graph can hold."""
    args = adapter.view(server_args)
    if args.moe_a2a_backend == "mooncake" and args.deepep_mode == "normal":
        logger.warning("CUDA graphs are off because of --deepep-mode normal; auto has them in decode.")
        adapter.declare(server_args, cuda_graph_config=adapter.without_graphs(args.cuda_graph_config))


def after_all(server_args: Any) -> None:
    """After the last step that changes sizes: limit the requests of a batch, and check everything. Raises FlagError."""
    args = adapter.view(server_args)
    if not asks_for_mooncake(args):  # SGLang has chosen another backend, for waterfill for example
        return
    if args.max_running_requests is None:
        # Otherwise SGLang derives thousands from free memory, and the masked buffers would have to hold them.
        requests = default_running_requests(args) * attention_data_parallel(args)
        adapter.declare(server_args, max_running_requests=requests)
        logger.info("--max-running-requests is set to %d, the largest batch of the decode graphs.", requests)
        args = adapter.view(server_args)
    limits = limits_from_server_args(args, adapter.most_draft_tokens(server_args))
    flags.check_resolved(args, limits, flags.ModelSizes.of(adapter.model_config(server_args)))
    setattr(server_args, MARK, True)
