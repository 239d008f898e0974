#!/usr/bin/env bash
# decode-0: run on 192.0.2.11, GPUs 0 to 7.
set -euo pipefail
export MOE_A2A_SGLANG=0
export SGLANG_HOST_IP=192.0.2.11
export SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=128
exec python3 -m sglang.launch_server \
    --model-path deepseek-ai/DeepSeek-V3 \
    --trust-remote-code \
    --host 192.0.2.11 \
    --port 30100 \
    --disaggregation-mode decode \
    --disaggregation-transfer-backend mooncake \
    --tp-size 8 \
    --dp-size 8 \
    --enable-dp-attention \
    --moe-a2a-backend mooncake \
    --deepep-mode low_latency \
    --moe-dense-tp-size 1 \
    --enable-dp-lm-head \
    --chunked-prefill-size 1024 \
    --max-running-requests 1024 \
    --cuda-graph-max-bs-decode 128 \
    --enable-eplb \
    --ep-num-redundant-experts 40 \
    --elastic-ep-backend mooncake
