"""A plan as shell scripts: one a process, and one that checks the whole."""

from __future__ import annotations

from moe_a2a.recipes import quoting, text
from moe_a2a.recipes.plan import Check, Plan, Server

_HEAD = "#!/usr/bin/env bash\n"

_CHECK = """\
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

"""


def render_shell(plan: Plan) -> dict[str, str]:
    """File name -> text: NAME.sh for every process, check.sh, README.md. Scripts begin with #!."""
    files = {f"{server.name}.sh": script(server) for server in plan.processes}
    files["check.sh"] = check_script(plan.checks)
    starts = [f"./{server.name}.sh    # on {server.host}" for server in plan.processes]
    files["README.md"] = text.readme(plan, "each in a terminal of its own or under your supervisor", starts)
    return files


def script(server: Server) -> str:
    """What starts one process in the foreground; whoever starts it ends it with SIGTERM."""
    place = server.place
    gpus = (
        "" if not place.gpus else f", GPU {place.first}" if place.gpus == 1 else f", GPUs {place.first} to {place.last}"
    )
    exports = "".join(f"export {name}={quoting.word(value)}\n" for name, value in sorted(server.env.items()))
    # The router does not raise it by itself, and has three sockets a request (docs/troubleshooting.md).
    files = "ulimit -Sn hard\n" if server.role == "router" else ""
    return (
        f"{_HEAD}# {server.name}: run on {server.host}{gpus}.\nset -euo pipefail\n{exports}{files}exec "
        f"{quoting.lines(server.command)}\n"
    )


def check_script(checks: tuple[Check, ...]) -> str:
    """Waits for what is to become true, then makes the requests that prove the rest."""
    calls = ""
    for check in checks:
        words = (
            ["wait_for", check.name, check.url] if check.body is None else ["ask", check.name, check.url, check.body]
        )
        calls += quoting.line(words) + "\n"
    return f"{_HEAD}# Waits for all servers, at most as many seconds as its argument says, then asks.\n{_CHECK}{calls}"
