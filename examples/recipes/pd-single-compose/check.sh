#!/usr/bin/env bash
# Waits for all servers, at most as many seconds as its argument says, then asks.
set -euo pipefail
deadline=$((SECONDS + ${1:-3600}))

wait_for() { # what it shows, URL
    until curl --noproxy '*' --silent --fail --max-time 10 --output /dev/null "$2"; do
        if ((SECONDS >= deadline)); then
            echo "still not so: $1 ($2)" >&2
            exit 1
        fi
        sleep 2
    done
    echo "$1"
}

ask() { # what it shows, URL, JSON
    local kind='Content-Type: application/json'
    if ! curl --noproxy '*' --silent --show-error --fail --max-time 600 --header "$kind" --data "$3" "$2"; then
        echo "not so: $1 ($2)" >&2
        exit 1
    fi
    echo
    echo "$1"
}

wait_for 'prefill-0 is healthy' http://127.0.0.1:30000/health
wait_for 'decode-0 is healthy' http://127.0.0.1:30100/health
wait_for 'decode-1 is healthy' http://127.0.0.1:30110/health
wait_for 'the router is healthy' http://127.0.0.1:8000/health
ask 'a request goes the whole way' http://127.0.0.1:8000/generate '{"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}'
