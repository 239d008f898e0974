#!/usr/bin/env bash
# decode-0: run on 127.0.0.1, GPU 1.
set -euo pipefail
export SGLANG_HOST_IP=127.0.0.1
exec python3 -m sglang.launch_server \
    --model-path meta-llama/Llama-3.1-8B-Instruct \
    --host 127.0.0.1 \
    --port 30100 \
    --disaggregation-mode decode \
    --disaggregation-transfer-backend mooncake_tcp \
    --tp-size 1 \
    --base-gpu-id 1
