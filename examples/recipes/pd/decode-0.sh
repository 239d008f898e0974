#!/usr/bin/env bash
# decode-0: run on 192.0.2.11, GPUs 0 to 7.
set -euo pipefail
export SGLANG_HOST_IP=192.0.2.11
exec python3 -m sglang.launch_server \
    --model-path amd/Llama-3.3-70B-Instruct-FP8-KV \
    --host 192.0.2.11 \
    --port 30100 \
    --disaggregation-mode decode \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-ib-device mlx5_0,mlx5_1 \
    --tp-size 8
