#!/usr/bin/env bash
# prefill-0: run on 127.0.0.1, GPU 0.
set -euo pipefail
export SGLANG_HOST_IP=127.0.0.1
exec python3 -m sglang.launch_server \
    --model-path meta-llama/Llama-3.1-8B-Instruct \
    --host 127.0.0.1 \
    --port 30000 \
    --disaggregation-mode prefill \
    --disaggregation-transfer-backend mooncake_tcp \
    --disaggregation-bootstrap-port 8998 \
    --tp-size 1
