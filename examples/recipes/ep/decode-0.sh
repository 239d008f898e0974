#!/usr/bin/env bash
# decode-0: run on 192.0.2.11, GPUs 0 to 7.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.11
exec python3 -m sglang.launch_server \
    --model-path deepseek-ai/DeepSeek-V3 \
    --trust-remote-code \
    --host 192.0.2.11 \
    --port 30100 \
    --disaggregation-mode decode \
    --disaggregation-transfer-backend mooncake \
    --tp-size 8 \
    --attn-dp-size 8 \
    --moe-a2a-backend mooncake \
    --deepep-mode low_latency \
    --moe-dense-tp-size 1 \
    --enable-dp-lm-head \
    --chunked-prefill-size 1024 \
    --max-running-requests 1024 \
    --cuda-graph-max-bs-decode 128
