#!/usr/bin/env bash
# What one node of the job does: pd_sglang_bench_serving.sh ROLE RANK FOLDER, started by run_xPyD_models.slurm.
#
# prefill, decode: one server in a container. proxy: etcd, then the router, then the sweep, each in a container.
set -uo pipefail

role=$1 rank=$2 job=$3
: "${SLURM_JOB_ID:?}" "${MODEL_NAME:?}" "${DOCKER_IMAGE_NAME:?}" "${xP:?}" "${yD:?}"
exec >"$job/pd_sglang_bench_serving.sh_NODE$rank.log" 2>&1

log() {
    echo "$(date '+%F %T') $*"
}

fail() {
    log "failed: $*"
    echo "$*" >"$job/failed_NODE$rank"
    exit 1
}

# shellcheck source=settings.sh
source "$job/settings.sh"

# --- This node and the others -----------------------------------------------------------------------------------------

prefills=() decodes=()
while read -r number kind _ address; do
    [[ $number == "$rank" ]] && ADDRESS=$address
    [[ $kind == prefill ]] && prefills+=("$address")
    [[ $kind == decode ]] && decodes+=("$address")
done <"$job/nodes"
log "$role NODE$rank on $(hostname), $ADDRESS; open files: $(ulimit -Sn) of at most $(ulimit -Hn), containers get 1048576"

set_model "$MODEL_NAME" || fail "MODEL_NAME=$MODEL_NAME is not one of ${MODELS[*]}"
[[ -z ${MODEL_DIR:-} ]] || MODEL_PATH=$MODEL_DIR/$MODEL_NAME
if [[ $HUB == modelscope ]]; then
    cache=${MODELSCOPE_CACHE:-$HOME/.cache/modelscope}
    model_access=(--env SGLANG_USE_MODELSCOPE=true) # the benchmark needs the tokenizer
else
    cache=${HF_HOME:-$HOME/.cache/huggingface}
    model_access=(--env HF_TOKEN)
fi
if [[ $MODEL_PATH == *:* || $cache == *:* ]]; then
    fail "a folder with a colon cannot be given to a container: $MODEL_PATH, $cache"
elif [[ $MODEL_PATH == /* ]]; then
    [[ -d $MODEL_PATH ]] || fail "no folder $MODEL_PATH on $(hostname): every node must have the model"
    model_access=(--volume "$MODEL_PATH:$MODEL_PATH:ro")
else
    mkdir -p "$cache" || fail "$cache, where models from $HUB are kept, cannot be made"
    model_access+=(--volume "$cache:/root/.cache/$HUB")
fi
for tool in docker curl; do
    command -v "$tool" >/dev/null || fail "no $tool on $(hostname)"
done

# --- Containers -------------------------------------------------------------------------------------------------------

declare -A started=() # name -> process of `docker run`

container_name() {
    echo "moe-a2a-$SLURM_JOB_ID-NODE$rank-$1"
}

# start NAME LOG FLAG... -- COMMAND...: with as many open files as a router needs at high concurrency, three a request.
start() {
    local name=$1 file=$2 flags=()
    shift 2
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    log "$name: $*"
    docker run --rm --name "$(container_name "$name")" --network host --ipc host --ulimit nofile=1048576:1048576 \
        --ulimit memlock=-1 "${flags[@]}" "$DOCKER_IMAGE_NAME" "$@" >"$job/$file" 2>&1 &
    started[$name]=$!
}

running() {
    kill -0 "${started[$1]}" 2>/dev/null
}

finish() {
    trap '' TERM INT
    local name left
    # Again and again: a container that is only being made cannot be stopped yet.
    while :; do
        left=()
        for name in "${!started[@]}"; do
            running "$name" && left+=("$(container_name "$name")")
        done
        ((${#left[@]} > 0)) || break
        log "stopping ${left[*]}"
        # All at once, and 20 s: Slurm kills what is there 30 s after it has said so.
        docker stop -t 20 "${left[@]}" >/dev/null 2>&1 || sleep 1
    done
    log "ended"
}

trap finish EXIT
trap 'log "told to end"; exit 0' TERM INT

# ended NAME LOG: fail with what a container that is gone said last.
ended() {
    local code
    wait "${started[$1]}"
    code=$?
    unset "started[$1]" # its number may be another process's soon
    fail "$1 ended with code $code; the end of $2: $(tail -n 3 "$job/$2" | tr '\n' ' ')"
}

# healthy NAME URL [CONTAINER LOG]: wait for a 200, as long as this node's container lives.
healthy() {
    until curl --noproxy "*" --silent --fail --max-time 10 --output /dev/null "$2"; do
        [[ -z ${3:-} ]] || running "$3" || ended "$3" "$4"
        ((SECONDS < ${START_SECONDS:-3600})) || fail "$1 is not healthy after $SECONDS s ($2)"
        sleep 1
    done
    log "$1 is healthy"
}

# --- Roles ------------------------------------------------------------------------------------------------------------

serve() { # prefill or decode
    local file=${role}_NODE$rank.log look='import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))'
    if ((${#REQUIRES[@]} > 0)); then
        start image "$file" -- python3 -c "$look" "${REQUIRES[@]}"
        wait "${started[image]}" || fail "$DOCKER_IMAGE_NAME is to have ${REQUIRES[*]}, and looking for it ended with code" \
            "$?: build it from this recipe's Dockerfile. $(tail -n 3 "$job/$file" | tr '\n' ' ')"
        unset "started[image]"
    fi
    "${role}_command"
    start "$role" "$file" "${DEVICES[@]}" "${model_access[@]}" "${ENVIRONMENT[@]}" -- "${COMMAND[@]}"
    ended "$role" "$file"
}

proxy() {
    start etcd "etcd_NODE$rank.log" -- etcd --name proxy --data-dir /tmp/etcd \
        --listen-client-urls "http://$ADDRESS:2379" --advertise-client-urls "http://$ADDRESS:2379" \
        --listen-peer-urls "http://$ADDRESS:2380" --initial-advertise-peer-urls "http://$ADDRESS:2380" \
        --initial-cluster "proxy=http://$ADDRESS:2380"
    healthy etcd "http://$ADDRESS:2379/health" etcd "etcd_NODE$rank.log"
    local address workers=()
    for address in "${prefills[@]}"; do
        healthy "prefill $address" "http://$address:$PREFILL_PORT/health"
        workers+=(--prefill "http://$address:$PREFILL_PORT" "$BOOTSTRAP_PORT")
    done
    for address in "${decodes[@]}"; do
        healthy "decode $address" "http://$address:$DECODE_PORT/health"
        workers+=(--decode "http://$address:$DECODE_PORT")
    done
    router_command
    start router "router_NODE$rank.log" -- "${COMMAND[@]}" "${workers[@]}"
    healthy router "http://$ADDRESS:$ROUTER_PORT/health" router "router_NODE$rank.log"
    log "a request goes the whole way:"
    curl --noproxy "*" --silent --show-error --fail --max-time 600 --header 'Content-Type: application/json' --data "$PROOF" \
        "http://$ADDRESS:$ROUTER_PORT/generate" &
    wait $! || fail "the router did not answer the first request, see pd_sglang_bench_serving.sh_NODE$rank.log"
    echo
    if [[ ${SKIP_BENCHMARK:-0} == 1 ]]; then
        log "SKIP_BENCHMARK=1: serving until the job ends"
        ended router "router_NODE$rank.log"
    fi
    sweep
}

sweep() {
    local model=${MODEL_NAME//[^A-Za-z0-9._-]/_} file lengths input output concurrency prompts seed=0 lost=()
    file=benchmark_${SLURM_JOB_ID}_xP${xP}_yD${yD}_${model}_CONCURRENCY.log
    for lengths in ${BENCHMARK_COMBINATIONS:-1024/1024 8192/1024}; do
        input=${lengths%/*} output=${lengths#*/}
        for concurrency in ${BENCHMARK_CONCURRENCY_LEVELS:-8 16 32 64 128 256 512}; do
            prompts=$((concurrency * 2 < 16 ? 16 : concurrency * 2))
            seed=$((seed + 1)) # other prompts in every run: none is in a prefix cache already
            log "benchmark: $input tokens in, $output out, $concurrency at a time, $prompts in all"
            start benchmark benchmark.part "${model_access[@]}" -- python3 -m sglang.benchmark.serving --backend sglang \
                --host "$ADDRESS" --port "$ROUTER_PORT" --model "$MODEL_PATH" --dataset-name random-ids \
                --random-input-len "$input" --random-output-len "$output" --random-range-ratio 1.0 \
                --num-prompts "$prompts" --max-concurrency "$concurrency" --seed "$seed" --output-file /tmp/benchmark.jsonl
            until ! running benchmark; do
                running router || ended router "router_NODE$rank.log"
                sleep 1
            done
            wait "${started[benchmark]}" || lost+=("$input/$output at $concurrency (code $?)")
            unset "started[benchmark]"
            cat "$job/benchmark.part" >>"$job/$file"
        done
    done
    rm -f "$job/benchmark.part"
    ((${#lost[@]} == 0)) || fail "runs of the benchmark without a result: ${lost[*]}; see $file"
    log "benchmark: done, $file"
}

case $role in
prefill | decode) serve ;;
proxy) proxy ;;
*) fail "no such role: $role" ;;
esac
