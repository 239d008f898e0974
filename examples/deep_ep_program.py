"""A program written for DeepEP's low-latency mode: it runs on moe-a2a by changing its import.

torchrun --nproc-per-node 2 examples/deep_ep_program.py

A decode loop of one MoE layer: FP8 dispatch with a receive hook, the shared expert meanwhile, the experts, combine with
a hook. On GPUs the layer is captured in a CUDA graph and replayed; without GPUs the same program runs on CPU ranks.
"""

import torch
import torch.distributed as dist

# For DeepEP itself: from deep_ep import Buffer
from moe_a2a.compat.deep_ep import Buffer

HIDDEN, EXPERTS, TOP_K, MAX_TOKENS, TOKENS = 2048, 16, 4, 16, 12
STEPS = 5


class Layer:
    """One MoE layer whose expert e multiplies by 1 + e, so that the right output is known."""

    def __init__(self, buffer: Buffer, device: torch.device) -> None:
        self.buffer = buffer
        local = EXPERTS // buffer.group_size
        first = local * buffer.rank
        self.factors = (1.0 + torch.arange(first, first + local, device=device))[:, None, None]

    def experts(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Dequantise and multiply. Rows that hold no token are computed too; nobody reads them."""
        values = rows.float().unflatten(-1, (-1, 128)) * scales[..., None]
        return (values.flatten(-2) * self.factors).to(torch.bfloat16)

    def __call__(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        (rows, scales), _counts, handle, _, receive = self.buffer.low_latency_dispatch(
            x, topk_idx, MAX_TOKENS, EXPERTS, use_fp8=True, return_recv_hook=True
        )
        shared = 2 * x  # the shared expert needs nothing from other ranks
        receive()
        out, _, receive = self.buffer.low_latency_combine(
            self.experts(rows, scales), topk_idx, topk_weights, handle, return_recv_hook=True
        )
        receive()
        return out + shared


def main() -> None:
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    group = dist.group.WORLD
    size = Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, dist.get_world_size(), EXPERTS)
    buffer = Buffer(
        group,
        num_rdma_bytes=size,
        low_latency_mode=True,
        num_qps_per_rank=EXPERTS // dist.get_world_size(),
        explicitly_destroy=True,
    )
    layer = Layer(buffer, device)

    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    topk_idx = torch.zeros(TOKENS, TOP_K, dtype=torch.int64, device=device)
    topk_weights = torch.zeros(TOKENS, TOP_K, device=device)

    def fill(step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x.copy_(torch.randn(x.shape, generator=generator))
        weights, ids = torch.rand(TOKENS, EXPERTS, generator=generator).softmax(dim=1).topk(TOP_K)
        ids[0, 1:] = -1
        topk_idx.copy_(ids)
        topk_weights.copy_(weights)

    for step in range(2):  # before a capture: builds buffers, compiles kernels
        fill(step)
        out = layer(x, topk_idx, topk_weights)
    graph = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x, topk_idx, topk_weights)

    worst = 0.0
    for step in range(2, 2 + STEPS):
        fill(step)
        if graph is not None:
            graph.replay()
        else:
            out = layer(x, topk_idx, topk_weights)
        factor = ((1.0 + topk_idx) * topk_weights).where(topk_idx >= 0, 0).sum(dim=1, keepdim=True)
        expected = (2 + factor) * x.float()
        worst = max(worst, float((out.float() - expected).norm() / expected.norm()))
    assert worst < 0.05, worst
    print(f"rank {rank} on {device}: {STEPS} steps of {TOKENS} tokens, off by {worst:.1%} (FP8)", flush=True)
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
