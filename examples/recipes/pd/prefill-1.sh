#!/usr/bin/env bash
# prefill-1: run on 192.0.2.10, GPUs 4 to 7.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.10
exec python3 -m sglang.launch_server \
    --model-path amd/Llama-3.3-70B-Instruct-FP8-KV \
    --host 192.0.2.10 \
    --port 30010 \
    --disaggregation-mode prefill \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-ib-device mlx5_0,mlx5_1 \
    --disaggregation-bootstrap-port 8999 \
    --tp-size 4 \
    --base-gpu-id 4
