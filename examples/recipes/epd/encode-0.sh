#!/usr/bin/env bash
# encode-0: run on 192.0.2.10, GPU 0.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.10
exec python3 -m sglang.launch_server \
    --model-path Qwen/Qwen2.5-VL-7B-Instruct \
    --host 192.0.2.10 \
    --port 30200 \
    --tp-size 1 \
    --encoder-only \
    --encoder-transfer-backend zmq_to_scheduler
