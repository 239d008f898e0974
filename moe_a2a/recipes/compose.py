"""A plan as docker compose files: one for each host, since compose starts containers on one host."""

from __future__ import annotations

import json

from moe_a2a.recipes import text
from moe_a2a.recipes.plan import Plan, Server
from moe_a2a.recipes.shell import check_script

#: Where images of SGLang look for models that have been downloaded, and where they are on the host.
_CACHE = "${HF_HOME:-~/.cache/huggingface}:/root/.cache/huggingface"
_MODELSCOPE_CACHE = "${MODELSCOPE_CACHE:-~/.cache/modelscope}:/root/.cache/modelscope"

#: Of a container: the router has three sockets a request, and does not raise a lower limit (docs/troubleshooting.md).
OPEN_FILES = 1048576


def render_compose(plan: Plan) -> dict[str, str]:
    """File name -> text: compose.yaml for one host, else compose-HOST.yaml for each; check.sh; README.md."""
    hosts = list(dict.fromkeys(server.host for server in plan.processes))
    names = {host: "compose.yaml" if len(hosts) == 1 else f"compose-{host.replace(':', '_')}.yaml" for host in hosts}
    files = {names[host]: _file(plan, host) for host in hosts}
    files["check.sh"] = check_script(plan.checks)
    starts = [f"docker compose --file {file} up --detach    # on {host}" for host, file in names.items()]
    needs = (
        "Containers use the host's network, and GPUs through the NVIDIA container toolkit. Their image is "
        f"`{plan.image}`; it must have SGLang, sglang-router and the Transfer Engine."
    )
    files["README.md"] = text.readme(plan, "each on its host", starts, needs)
    return files


def _file(plan: Plan, host: str) -> str:
    services = "".join(_service(plan, server) for server in plan.processes if server.host == host)
    return f"# {host}: docker compose --file THIS_FILE up --detach\nservices:\n{services}"


def scalar(value: str, literal: bool = True) -> str:
    """A quoted YAML scalar, which is what JSON makes of a string; compose's own variables are left alone if `literal`.

    A dollar sign begins a variable in compose files, and two are one that does not.
    """
    return json.dumps(value.replace("$", "$$") if literal else value, ensure_ascii=False)


def _service(plan: Plan, server: Server) -> str:
    lines = [f"  {server.name}:", f"    image: {scalar(plan.image)}"]
    # The host's network and memory: servers find each other by the host's addresses, and their ranks share memory.
    lines += ["    network_mode: host", "    ipc: host", "    init: true", '    restart: "no"']
    lines += ["    ulimits:", f"      nofile: {OPEN_FILES}"]
    if server.place.gpus:
        lines += ["      memlock: -1", "      stack: 67108864"]
        lines += ["    cap_add:", "      - IPC_LOCK"]
        if plan.rdma:
            lines += ["    devices:", "      - /dev/infiniband:/dev/infiniband"]
        lines += ["    volumes:", f"      - {scalar(_cache(server), literal=False)}"]
        lines += [f"      - {scalar(f'{folder}:{folder}:ro')}" for folder in plan.volumes]
        # All GPUs: the command says which ones, by the host's numbers.
        lines += ["    deploy:", "      resources:", "        reservations:", "          devices:"]
        lines += ["            - driver: nvidia", "              count: all", "              capabilities: [gpu]"]
    lines.append("    environment:")
    lines += [f"      {name}: {scalar(value)}" for name, value in sorted(server.env.items())]
    lines.append("      HF_TOKEN: ${HF_TOKEN:-}")
    lines.append("    entrypoint:")
    lines += [f"      - {scalar(word)}" for word in server.command]
    if server.node == 0:
        lines += ["    healthcheck:", "      test:"]
        lines += [
            f"        - {scalar(word)}"
            for word in ("CMD", "curl", "--noproxy", "*", "--fail", "--silent", f"{server.url}/health")
        ]
        lines += ["      interval: 15s", "      timeout: 10s", "      start_period: 60m"]
    return "\n".join(lines) + "\n"


def _cache(server: Server) -> str:
    return _MODELSCOPE_CACHE if "SGLANG_USE_MODELSCOPE" in server.env else _CACHE
