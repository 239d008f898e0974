#!/usr/bin/env bash
# decode-0: run on 192.0.2.11, GPU 0.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.11
exec python3 -m sglang.launch_server \
    --model-path Qwen/Qwen2.5-VL-7B-Instruct \
    --host 192.0.2.11 \
    --port 30100 \
    --disaggregation-mode decode \
    --disaggregation-transfer-backend mooncake \
    --tp-size 1
