#!/usr/bin/env bash
# prefill-0: run on 192.0.2.10, GPUs 0 to 7.
set -euo pipefail
export MOE_A2A_SGLANG=0
export SGLANG_HOST_IP=192.0.2.10
export SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=256
exec python3 -m sglang.launch_server \
    --model-path deepseek-ai/DeepSeek-R1 \
    --trust-remote-code \
    --host 192.0.2.10 \
    --port 30000 \
    --disaggregation-mode prefill \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-bootstrap-port 8998 \
    --tp-size 16 \
    --dist-init-addr 192.0.2.10:20000 \
    --nnodes 2 \
    --node-rank 0 \
    --dp-size 16 \
    --enable-dp-attention \
    --moe-a2a-backend mooncake \
    --deepep-mode low_latency \
    --moe-dense-tp-size 1 \
    --enable-dp-lm-head \
    --chunked-prefill-size 4096 \
    --max-running-requests 2048 \
    --elastic-ep-backend none
