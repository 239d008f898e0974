"""Server flags that cannot work with this package. Each check raises FlagError with flag, value and what to use."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_a2a.config import GROUP, MAX_EXPERTS, MAX_TOP_K
from moe_a2a.sglang_plugin.limits import FlagError, Limits, running_requests

INFINIBAND = Path("/sys/class/infiniband")

#: What the rows of a masked step may take on a rank: those that arrive, and those that the experts return.
MASKED_BYTES = 16 << 30

#: Upstream's size of its buffers. Here sizes follow from the flags.
UPSTREAM_LIMIT = "SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"


@dataclass(frozen=True)
class ModelSizes:
    """Routed experts without redundant ones, columns and experts of a token; None: the configuration does not say."""

    experts: int | None
    hidden: int | None
    top_k: int | None

    @classmethod
    def of(cls, model_config: Any) -> ModelSizes:
        """Sizes from SGLang's ModelConfig."""
        config = model_config.hf_text_config
        experts = _first(config, "n_routed_experts", "num_experts", "num_local_experts")
        return cls(experts, _first(config, "hidden_size"), _first(config, "num_experts_per_tok"))


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_request(args: Any) -> None:
    """Flags that are wrong whatever the others say; `args` may be unresolved."""
    _check_elastic(args)
    _check_gpu(args)
    _check_hosts(args)
    _check_ib_devices(args.mooncake_ib_device)
    if args.use_ray:
        raise FlagError(
            "--use-ray with --moe-a2a-backend mooncake: SGLang's Ray actors load no plug-ins; leave --use-ray out"
        )


def _check_elastic(args: Any) -> None:
    backend = args.elastic_ep_backend
    if backend not in (None, "none"):
        raise FlagError(
            f"--elastic-ep-backend {backend} with --moe-a2a-backend mooncake: moe-a2a does not serve elastic EP yet, "
            "and half of a server cannot run on it; use --elastic-ep-backend none, "
            "or Mooncake's own EP without this plug-in (MOE_A2A_SGLANG=0)"
        )


def _check_gpu(args: Any) -> None:
    import torch

    if args.device in (None, "cuda") and getattr(torch.version, "hip", None) is not None:
        raise FlagError(
            f"--moe-a2a-backend mooncake on an AMD GPU (ROCm {torch.version.hip}): moe-a2a serves NVIDIA GPUs; "
            "use --moe-a2a-backend mori"
        )


def _check_hosts(args: Any) -> None:
    hosts = args.nnodes // args.pp_size if args.pp_size else args.nnodes
    if hosts > 1:
        raise FlagError(
            f"--nnodes {args.nnodes} with --pp-size {args.pp_size} and --moe-a2a-backend mooncake: experts would be on "
            f"{hosts} hosts, and moe-a2a serves the GPUs of one host so far; use --nnodes {args.pp_size}, "
            "or Mooncake's own EP (MOE_A2A_SGLANG=0)"
        )


def _check_ib_devices(given: str | None) -> None:
    if not given:
        return
    named = ib_device_names(given)
    present = sorted(os.listdir(INFINIBAND)) if INFINIBAND.is_dir() else []
    absent = [name for name in named if name not in present]
    if absent:
        raise FlagError(
            f"--mooncake-ib-device {given}: {', '.join(absent)} not found in {INFINIBAND} "
            f"({'there are ' + ', '.join(present) if present else 'there is no such device'}); "
            "leave the flag out: the GPUs of one host need no RDMA device"
        )


def ib_device_names(given: str) -> list[str]:
    """Devices in SGLang's three spellings: with commas, a JSON map from GPU to devices, or a file with such a map."""
    text = given.strip()
    if text.endswith(".json") and os.path.isfile(text):
        text = Path(text).read_text()
    if text.startswith("{"):
        groups = [str(group) for group in json.loads(text).values()]
    else:
        groups = [text]
    return [name.strip() for group in groups for name in group.split(",") if name.strip()]


def check_resolved(args: Any, limits: Limits, sizes: ModelSizes) -> None:
    """Flags against one another and against the model; `args` is SGLang's resolved view."""
    _check_model(args, sizes)
    _check_masked_rows(args, limits, sizes)
    if args.deepep_mode != "low_latency" and args.cuda_graph_config.prefill.backend == "full":
        raise FlagError(
            f"--cuda-graph-backend-prefill full with --deepep-mode {args.deepep_mode}: prefill steps read counts on "
            "the host, which no graph can hold; use --cuda-graph-backend-prefill disabled"
        )


def _check_model(args: Any, sizes: ModelSizes) -> None:
    if sizes.experts is not None:
        redundant = args.ep_num_redundant_experts or 0
        experts, ranks = sizes.experts + redundant, args.ep_size
        if experts % ranks:
            raise FlagError(
                f"--ep-size {ranks} (with mooncake it is --tp-size) does not divide {sizes.experts} experts + "
                f"{redundant} redundant ones; use --ep-num-redundant-experts {redundant + ranks - experts % ranks}"
            )
        if experts > MAX_EXPERTS:
            raise FlagError(
                f"--ep-num-redundant-experts {redundant} makes {experts} experts; at most {MAX_EXPERTS} are allowed"
            )
    if sizes.hidden is not None and sizes.hidden % GROUP:
        raise FlagError(
            f"--moe-a2a-backend mooncake: the model's hidden size {sizes.hidden} is not a multiple of {GROUP}; "
            "use --moe-a2a-backend none"
        )
    if sizes.top_k is not None and sizes.top_k > MAX_TOP_K:
        raise FlagError(
            f"--moe-a2a-backend mooncake: the model has {sizes.top_k} experts per token, at most {MAX_TOP_K} are "
            "allowed; use --moe-a2a-backend none"
        )


def _check_masked_rows(args: Any, limits: Limits, sizes: ModelSizes) -> None:
    if sizes.experts is None or sizes.hidden is None or args.deepep_mode == "normal":
        return
    local = -(-(sizes.experts + (args.ep_num_redundant_experts or 0)) // args.ep_size)
    tokens = limits.max_tokens_per_rank_decode
    # Two sets of rows: at most two bytes a column that arrive, and two that go back.
    needed = local * args.ep_size * tokens * sizes.hidden * 4
    if needed <= MASKED_BYTES:
        return
    allowed = f"at most {MASKED_BYTES >> 30} GiB is allowed"
    what = f"{tokens} tokens per rank need {needed / 2**30:.1f} GiB for masked rows, {allowed}"
    if args.deepep_mode == "low_latency" and tokens > running_requests(args):
        raise FlagError(
            f"--deepep-mode low_latency with --chunked-prefill-size {args.chunked_prefill_size} (of a rank): {what}; "
            "use --deepep-mode auto, where prefill takes the contiguous layout, or smaller chunks"
        )
    raise FlagError(f"--max-running-requests {args.max_running_requests}: {what}; use fewer, or a larger --tp-size")
