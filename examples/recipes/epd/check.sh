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

wait_for 'encode-0 is healthy' http://192.0.2.10:30200/health
wait_for 'encode-1 is healthy' http://192.0.2.10:30210/health
wait_for 'prefill-0 is healthy' http://192.0.2.10:30000/health
wait_for 'decode-0 is healthy' http://192.0.2.11:30100/health
wait_for 'the router is healthy' http://192.0.2.10:8000/health
ask 'a request goes the whole way' http://192.0.2.10:8000/v1/chat/completions '{"model": "Qwen/Qwen2.5-VL-7B-Instruct", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAT0lEQVR42u3PQQkAAAgEsIty/VMYzQi+hcEKLNO+FgEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQGBywLQIADxkgTHrwAAAABJRU5ErkJggg=="}}, {"type": "text", "text": "Which colour is this?"}]}], "max_tokens": 16, "temperature": 0}'
