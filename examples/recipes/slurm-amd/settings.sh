#!/usr/bin/env bash
# shellcheck disable=SC2034 # read by the other scripts
# Written by moe-a2a recipe slurm: SGLang 0.5.20, mi300x.
SGLANG=0.5.20
MODELS=(Llama-3.1-405B-Instruct-FP8-KV Llama-3.3-70B-Instruct-FP8-KV Mixtral-8x7B-Instruct-v0.1 DeepSeek-V3)
DEFAULT_MODEL=Llama-3.1-405B-Instruct-FP8-KV
PREFILL_PORT=30000 DECODE_PORT=30100 BOOTSTRAP_PORT=8998
ROUTER_PORT=8000
DEVICES=(--device /dev/kfd --device /dev/dri --group-add video --cap-add SYS_PTRACE --device /dev/infiniband --cap-add IPC_LOCK)
REQUIRES=()
HUB=huggingface
PROOF='{"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}'

set_model() {
    case $1 in
    Llama-3.1-405B-Instruct-FP8-KV) MODEL_PATH=amd/Llama-3.1-405B-Instruct-FP8-KV ;;
    Llama-3.3-70B-Instruct-FP8-KV) MODEL_PATH=amd/Llama-3.3-70B-Instruct-FP8-KV ;;
    Mixtral-8x7B-Instruct-v0.1) MODEL_PATH=mistralai/Mixtral-8x7B-Instruct-v0.1 ;;
    DeepSeek-V3) MODEL_PATH=deepseek-ai/DeepSeek-V3 ;;
    *) return 1 ;;
    esac
}

prefill_command() {
    case $MODEL_NAME in
    Llama-3.1-405B-Instruct-FP8-KV)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --host "${ADDRESS}"
            --port 30000
            --disaggregation-mode prefill
            --disaggregation-transfer-backend mooncake
            --disaggregation-bootstrap-port 8998
            --tp-size 8)
        ;;
    Llama-3.3-70B-Instruct-FP8-KV)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --host "${ADDRESS}"
            --port 30000
            --disaggregation-mode prefill
            --disaggregation-transfer-backend mooncake
            --disaggregation-bootstrap-port 8998
            --tp-size 4)
        ;;
    Mixtral-8x7B-Instruct-v0.1)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --host "${ADDRESS}"
            --port 30000
            --disaggregation-mode prefill
            --disaggregation-transfer-backend mooncake
            --disaggregation-bootstrap-port 8998
            --tp-size 2)
        ;;
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
            --tp-size 8)
        ;;
    esac
}

decode_command() {
    case $MODEL_NAME in
    Llama-3.1-405B-Instruct-FP8-KV)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --host "${ADDRESS}"
            --port 30100
            --disaggregation-mode decode
            --disaggregation-transfer-backend mooncake
            --tp-size 8)
        ;;
    Llama-3.3-70B-Instruct-FP8-KV)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --host "${ADDRESS}"
            --port 30100
            --disaggregation-mode decode
            --disaggregation-transfer-backend mooncake
            --tp-size 4)
        ;;
    Mixtral-8x7B-Instruct-v0.1)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --host "${ADDRESS}"
            --port 30100
            --disaggregation-mode decode
            --disaggregation-transfer-backend mooncake
            --tp-size 2)
        ;;
    DeepSeek-V3)
        ENVIRONMENT=(--env SGLANG_HOST_IP="${ADDRESS}")
        COMMAND=(python3 -m sglang.launch_server
            --model-path "${MODEL_PATH}"
            --trust-remote-code
            --host "${ADDRESS}"
            --port 30100
            --disaggregation-mode decode
            --disaggregation-transfer-backend mooncake
            --tp-size 8)
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
