#!/usr/bin/env bash
# prefill-0: run on 192.0.2.10, GPUs 0 to 7.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.10
exec python3 -m sglang.launch_server \
    --model-path deepseek-ai/DeepSeek-V3 \
    --trust-remote-code \
    --host 192.0.2.10 \
    --port 30000 \
    --disaggregation-mode prefill \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-bootstrap-port 8998 \
    --tp-size 8 \
    --attn-dp-size 8 \
    --moe-a2a-backend mooncake \
    --deepep-mode normal \
    --moe-dense-tp-size 1 \
    --enable-dp-lm-head \
    --chunked-prefill-size 8192 \
    --max-running-requests 1024
