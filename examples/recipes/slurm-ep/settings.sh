#!/usr/bin/env bash
# shellcheck disable=SC2034 # read by the other scripts
# Written by moe-a2a recipe slurm: SGLang 0.5.23, h200.
SGLANG=0.5.23
MODELS=(DeepSeek-V3 DeepSeek-R1)
DEFAULT_MODEL=DeepSeek-V3
PREFILL_PORT=30000 DECODE_PORT=30100 BOOTSTRAP_PORT=8998
ROUTER_PORT=8000
DEVICES=(--gpus all --device /dev/infiniband --cap-add IPC_LOCK)
REQUIRES=(moe_a2a)
HUB=huggingface
PROOF='{"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}'

set_model() {
    case $1 in
    DeepSeek-V3) MODEL_PATH=deepseek-ai/DeepSeek-V3 ;;
    DeepSeek-R1) MODEL_PATH=deepseek-ai/DeepSeek-R1 ;;
    *) return 1 ;;
    esac
}

prefill_command() {
    case $MODEL_NAME in
    DeepSeek-V3)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --trust-remote-code
            --host "${ADDRESS}"
            --port 30000
            --disaggregation-mode prefill
            --disaggregation-transfer-backend mooncake
            --disaggregation-bootstrap-port 8998
            --tp-size 8
            --attn-dp-size 8
            --moe-a2a-backend mooncake
            --deepep-mode normal
            --moe-dense-tp-size 1
            --enable-dp-lm-head
            --chunked-prefill-size 8192
            --max-running-requests 1024)
        ;;
    DeepSeek-R1)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --trust-remote-code
            --host "${ADDRESS}"
            --port 30000
            --disaggregation-mode prefill
            --disaggregation-transfer-backend mooncake
            --disaggregation-bootstrap-port 8998
            --tp-size 8
            --attn-dp-size 8
            --moe-a2a-backend mooncake
            --deepep-mode normal
            --moe-dense-tp-size 1
            --enable-dp-lm-head
            --chunked-prefill-size 8192
            --max-running-requests 1024)
        ;;
    esac
}

decode_command() {
    case $MODEL_NAME in
    DeepSeek-V3)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --trust-remote-code
            --host "${ADDRESS}"
            --port 30100
            --disaggregation-mode decode
            --disaggregation-transfer-backend mooncake
            --tp-size 8
            --attn-dp-size 8
            --moe-a2a-backend mooncake
            --deepep-mode low_latency
            --moe-dense-tp-size 1
            --enable-dp-lm-head
            --chunked-prefill-size 1024
            --max-running-requests 1024
            --cuda-graph-max-bs-decode 128)
        ;;
    DeepSeek-R1)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --trust-remote-code
            --host "${ADDRESS}"
            --port 30100
            --disaggregation-mode decode
            --disaggregation-transfer-backend mooncake
            --tp-size 8
            --attn-dp-size 8
            --moe-a2a-backend mooncake
            --deepep-mode low_latency
            --moe-dense-tp-size 1
            --enable-dp-lm-head
            --chunked-prefill-size 1024
            --max-running-requests 1024
            --cuda-graph-max-bs-decode 128)
        ;;
    esac
}

router_command() {
        ENVIRONMENT=()
        COMMAND=(python3 -m sglang_router.launch_router
            --pd-disaggregation
            --host "${ADDRESS}"
            --port 8000
            --prefill-policy cache_aware
            --decode-policy round_robin
            --worker-startup-timeout-secs 3600
            --request-timeout-secs 21600)
}
