#!/usr/bin/env bash
# router: run on 192.0.2.10.
set -euo pipefail
ulimit -Sn hard
exec python3 -m sglang_router.launch_router \
    --pd-disaggregation \
    --host 192.0.2.10 \
    --port 8000 \
    --prefill-policy cache_aware \
    --decode-policy round_robin \
    --worker-startup-timeout-secs 3600 \
    --request-timeout-secs 21600 \
    --prefill http://192.0.2.10:30000 8998 \
    --decode http://192.0.2.11:30100
