"""The Dockerfile of the Slurm recipe's image: SGLang, this package, the Transfer Engine, etcd, drivers of NICs."""

from __future__ import annotations

ROUTER = "sglang-router==0.3.2"

#: Ends with 1 if a package is not there. An import would need the driver, which a machine that builds images may lack.
_FIND = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"

#: SGLang's published images. Those for AMD are named after ROCm and the GPU too: look which ones a release has.
_BASE = "lmsysorg/sglang:v{version}"
_AMD_TAGS = {"mi355x": "-rocm700-mi35x"}
_AMD_TAG = "-rocm700-mi30x"

_HEAD = """\
# SGLang {version} for {maker} GPUs, with moe-a2a, the Transfer Engine, etcd and user-space drivers of RDMA devices.
#
#     pip wheel --no-deps --wheel-dir . PATH/TO/moe-a2a    # moe_a2a-*.whl beside this file
#     docker build --tag sglang-moe-a2a:v{version} .
#
# Checked by hadolint and not built: which base images a release has changes, so BASE_IMAGE can be given.
ARG BASE_IMAGE={base}
# hadolint ignore=DL3006
FROM ${{BASE_IMAGE}}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# libibverbs finds the providers of Mellanox, Broadcom, Intel and others in ibverbs-providers. It must be no older than
# the firmware asks for: put your vendor's packages here where the distribution's do not show your devices.
# etcd of Ubuntu 24.04 is 3.4, as membership stores of moe-a2a need; that of 22.04 is older and good for nothing here.
# hadolint ignore=DL3008
RUN apt-get update \\
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \\
        curl etcd-server ibverbs-providers ibverbs-utils libcurl4 libibverbs1 libnuma1 librdmacm1 rdma-core \\
    && rm -rf /var/lib/apt/lists/*

COPY moe_a2a-*.whl /wheels/
"""

# The image's torch stays; what else is missing comes from the index.
_NVIDIA = """\
RUN python3 -m pip freeze | grep --extended-regexp '^(torch|numpy|sglang)==' > /opt/constraints.txt \\
    && wheel="$(echo /wheels/moe_a2a-*.whl)" \\
    && python3 -m pip install --no-cache-dir --constraint /opt/constraints.txt \\
        "${{wheel}}[etcd]" "{router}" \\
    && python3 -c '{find}' mooncake moe_a2a sglang_router cuda.bindings \\
    && command -v etcd moe-a2a
"""

_AMD = """\
# No torch of ours, and no experts: only the tools of moe-a2a. Its EP needs NVIDIA GPUs. The Transfer Engine must be the
# base image's own, built for ROCm: the wheels of the index are for CUDA or for no GPU.
# hadolint ignore=DL3013
RUN wheel="$(echo /wheels/moe_a2a-*.whl)" \\
    && python3 -m pip install --no-cache-dir --no-deps "${{wheel}}" \\
    && python3 -m pip install --no-cache-dir "click>=8.1" "packaging>=23" "rich>=13.7" "{router}" \\
    && python3 -c '{find}' mooncake moe_a2a sglang_router \\
    && command -v etcd moe-a2a
"""


def dockerfile(release: str, maker: str, gpu: str) -> str:
    """maker: "nvidia" or "amd". gpu: --gpu."""
    base = _BASE.format(version=release) + (_AMD_TAGS.get(gpu.lower(), _AMD_TAG) if maker == "amd" else "")
    head = _HEAD.format(version=release, maker={"nvidia": "NVIDIA", "amd": "AMD"}[maker], base=base)
    body = {"nvidia": _NVIDIA, "amd": _AMD}[maker].format(router=ROUTER, find=_FIND)
    return head + body
