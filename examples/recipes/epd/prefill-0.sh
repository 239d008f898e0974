#!/usr/bin/env bash
# prefill-0: run on 192.0.2.10, GPU 2.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.10
exec python3 -m sglang.launch_server \
    --model-path Qwen/Qwen2.5-VL-7B-Instruct \
    --host 192.0.2.10 \
    --port 30000 \
    --disaggregation-mode prefill \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-bootstrap-port 8998 \
    --encoder-bootstrap-port 8900 \
    --tp-size 1 \
    --base-gpu-id 2 \
    --language-only \
    --encoder-urls http://192.0.2.10:30200 http://192.0.2.10:30210 \
    --encoder-transfer-backend zmq_to_scheduler
