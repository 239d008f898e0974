"""A program written for DeepEP's normal mode: it runs on moe-a2a by changing its import.

torchrun --nproc-per-node 2 examples/deep_ep_prefill.py

Prefill of a few MoE layers in two micro-batches: while one computes its experts, the other's rows are on their way. FP8
dispatch with events, experts, combine; batches of any size, and a different one on every rank. Without GPUs the same
program runs on CPU ranks.
"""

import torch
import torch.distributed as dist

# For DeepEP itself: from deep_ep import Buffer
from moe_a2a.compat.deep_ep import Buffer

HIDDEN, EXPERTS, TOP_K, LAYERS = 2048, 16, 4, 3


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 rows, with a scale for 128 columns."""
    tiles = x.float().unflatten(-1, (-1, 128))
    scales = tiles.abs().amax(dim=-1).clamp_min(1e-4) / 448
    return (tiles / scales[..., None]).flatten(-2).to(torch.float8_e4m3fn), scales


class Batch:
    """A micro-batch on its way through the layers. Expert e multiplies by 1 + e, so that the right output is known."""

    def __init__(self, buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self.buffer, self.x, self.topk_idx, self.topk_weights = buffer, x, topk_idx, topk_weights
        local = EXPERTS // buffer.group_size
        self.factors = 1.0 + torch.arange(local * buffer.rank, local * (buffer.rank + 1), device=x.device)

    def dispatch(self) -> None:
        buffer, rows = self.buffer, quantise(self.x)  # before the event that the calls below wait for
        per_rank, _, per_expert, is_token_in_rank, event = buffer.get_dispatch_layout(
            self.topk_idx,
            EXPERTS,
            previous_event=buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        self.recv, self.recv_idx, self.recv_weights, self.counts, self.handle, self.event = buffer.dispatch(
            rows,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            expert_alignment=128,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )

    def experts_and_combine(self) -> None:
        self.event.current_stream_wait()
        rows, scales = self.recv
        assert all(count % 128 == 0 for count in self.counts)
        values = (rows.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2)
        factors = self.factors[self.recv_idx.clamp(min=0)] * self.recv_weights  # weights of other ranks' experts are 0
        y = (values * factors.sum(dim=1, keepdim=True)).to(torch.bfloat16)
        self.out, _, self.event = self.buffer.combine(
            y, self.handle, previous_event=self.buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )

    def finish(self) -> float:
        """Wait for the sums. Returns how far they are off, and goes on with them."""
        self.event.current_stream_wait()
        factor = ((1.0 + self.topk_idx) * self.topk_weights).where(self.topk_idx >= 0, 0).sum(dim=1, keepdim=True)
        expected = factor * self.x.float()
        off = float((self.out.float() - expected).norm() / expected.norm().clamp_min(1e-6))
        self.x = self.out / factor.clamp_min(1.0).to(torch.bfloat16)
        return off


def main() -> None:
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    group = dist.group.WORLD
    Buffer.set_num_sms(20)
    configs = Buffer.get_dispatch_config(dist.get_world_size()), Buffer.get_combine_config(dist.get_world_size())
    size = max(config.get_nvl_buffer_size_hint(2 * HIDDEN, dist.get_world_size()) for config in configs)
    buffer = Buffer(group, num_nvl_bytes=size, explicitly_destroy=True)

    def batch(number: int, tokens: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * number + rank)
        x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
        weights, ids = torch.rand(tokens, EXPERTS, generator=generator).softmax(dim=1).topk(TOP_K)
        ids[::5, 1:] = -1
        return Batch(buffer, x.to(device), ids.to(device), weights.to(device))

    worst = 0.0
    with torch.inference_mode():
        for number in range(2):
            first, second = batch(2 * number, 40 + 9 * rank), batch(2 * number + 1, 64 - 11 * rank)
            first.dispatch()
            for _ in range(LAYERS):
                second.dispatch()
                first.experts_and_combine()
                worst = max(worst, first.finish())
                first.dispatch()
                second.experts_and_combine()
                worst = max(worst, second.finish())
            first.experts_and_combine()
            worst = max(worst, first.finish())
    assert worst < 0.05, worst
    print(f"rank {rank} on {device}: {LAYERS} layers of two micro-batches, off by {worst:.1%} (FP8)", flush=True)
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
