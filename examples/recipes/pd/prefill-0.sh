#!/usr/bin/env bash
# prefill-0: run on 192.0.2.10, GPUs 0 to 3.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.10
exec python3 -m sglang.launch_server \
    --model-path amd/Llama-3.3-70B-Instruct-FP8-KV \
    --host 192.0.2.10 \
    --port 30000 \
    --disaggregation-mode prefill \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-ib-device mlx5_0,mlx5_1 \
    --disaggregation-bootstrap-port 8998 \
    --tp-size 4
