"""bench/sglang_server.py against a stand-in for SGLang: it must check, measure and end whatever a server does."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import sglang_caches
import sglang_model
import torch
from sglang_compare import compare

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A server of this name in a folder that comes first on PYTHONPATH. It loads plug-ins' entry points only as far as their
# log lines, answers with numbers that depend on the prompt, and has a child, as SGLang has.
_SERVER = """
import gzip, http.server, json, math, os, subprocess, sys, time
flags = sys.argv[1:]
port = int(flags[flags.index("--port") + 1])
how = os.environ.get("STAND_IN", "")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
if "moe-a2a-oracle" in os.environ["SGLANG_PLUGINS"]:
    print("moe-a2a: the oracle dispatcher is in place")
elif "mooncake" in flags and os.environ["MOE_A2A_SGLANG"] != "0" and how != "swallowed":
    print("moe-a2a 0.1.0 serves --moe-a2a-backend mooncake in SGLang 0.5.17")
if how == "dies":
    sys.exit("CUDA error: out of everything")
if how == "sleeps":
    time.sleep(600)

def launch(number, name, ts, dur):
    return [
        {"cat": "kernel", "name": name, "ts": 2000.0 + ts, "dur": dur, "args": {"correlation": number}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": ts, "dur": 7, "args": {"correlation": number}},
    ]

trace = [
    {"ph": "M", "name": "process_name"},
    {"cat": "user_annotation", "name": "step", "ts": 0, "dur": 1e6},
    {"cat": "cuda_runtime", "name": "cudaEventSynchronize", "ts": 1500.0, "dur": 0.5, "args": {}},
    *launch(1, "void _fwd_kernel<float, 3>(float*)", 1000.0, 1000),
    *launch(2, "Memcpy DtoH", 1600.0, 500),
    *launch(3, "void _fwd_kernel<float, 4>(float*)", 3000.0, 1000),
]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "profile" in self.path:
            return self.profile(body)
        ids, tokens = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        self.send_response(200); self.end_headers()
        if how == "hangs" and len(ids) > 1000:
            time.sleep(600)
        if body.get("stream"):
            for number in range(1, tokens + 1):
                time.sleep(0.001)
                event = json.dumps({"meta_info": {"completion_tokens": number}})
                self.wfile.write(f"data: {event}\\n\\n".encode())
            self.wfile.write(b"data: [DONE]\\n\\n")
            return
        if ids and isinstance(ids[0], list):
            self.wfile.write(json.dumps([{} for _ in ids]).encode())
            return
        wrong = 1.0 if how == "wrong" and "moe-a2a-oracle" not in os.environ["SGLANG_PLUGINS"] else 0.0
        lps = [[None, ids[0], None]] + [[-1.0 / t - wrong, t, None] for t in ids[1:]]
        shift = 1 if how == "other" and "decode" in flags else 0
        out = [[-0.5, (sum(ids) + n + shift) % 97, None] for n in range(tokens)]
        top = [[[-0.5, 1, None], [-0.9, 2, None]] for _ in range(tokens)]
        meta = {"completion_tokens": tokens, "input_token_logprobs": lps}
        meta |= {"output_token_logprobs": out, "output_top_logprobs": top}
        self.wfile.write(json.dumps({"output_ids": [one[1] for one in out], "meta_info": meta}).encode())

    def profile(self, body):
        global folder
        folder = body.get("output_dir") or folder
        if self.path == "/stop_profile":
            for rank in range(2):
                with gzip.open(f"{folder}/1-TP-{rank}.trace.json.gz", "wt") as file:
                    file.write(json.dumps({"traceEvents": trace}))
        self.send_response(200); self.end_headers()
        self.wfile.write(b"no JSON")

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
Server(("127.0.0.1", port), Handler).serve_forever()
"""

# A router that passes requests on to the server that decodes.
_ROUTER = """
import http.server, sys, urllib.request
flags = sys.argv[1:]
decode = flags[flags.index("--decode") + 1]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with urllib.request.urlopen(urllib.request.Request(decode + self.path, body)) as reply:
            self.send_response(200); self.end_headers()
            for line in reply:
                self.wfile.write(line)

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
Server(("127.0.0.1", int(flags[flags.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sglang_model.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def stand_in(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "model-3").symlink_to(model)
    (tmp_path / "site" / "sglang").mkdir(parents=True)
    (tmp_path / "site" / "sglang" / "__init__.py").touch()
    (tmp_path / "site" / "sglang" / "launch_server.py").write_text(_SERVER)
    (tmp_path / "site" / "sglang_router").mkdir()
    (tmp_path / "site" / "sglang_router" / "__init__.py").touch()
    (tmp_path / "site" / "sglang_router" / "launch_router.py").write_text(_ROUTER)
    return tmp_path


def runs(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def bench(folder: Path, *flags: str, how: str = "", budget: int = 100) -> tuple[int, dict[str, Any]]:
    """Run the program; returns its exit code and results.json."""
    port = 20000 + os.getpid() % 5000
    command = [sys.executable, str(BENCH / "sglang_server.py"), "--out", str(folder / "out"), "--port", str(port)]
    command += ["--state", str(folder / "state"), "--site", str(folder / "site"), "--budget", str(budget)]
    command += ["--requests", "4", "--tokens", "6", "--prompts", "3", "--prompt-tokens", "40", "--rounds", "2", *flags]
    environment = {**os.environ, "STAND_IN": how}
    code = subprocess.run(command, env=environment, timeout=budget + 20, capture_output=True, text=True).returncode
    results = json.loads((folder / "out" / "results.json").read_text())
    for log in (folder / "state").glob("*.log"):
        (pid,) = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("child ")]
        assert not runs(pid), "a process of the server is left"
    return code, results


def test_variants_are_run_compared_and_measured(stand_in: Path) -> None:
    code, got = bench(stand_in, "--variants", "moe-a2a,oracle,upstream,none")
    assert code == 0, got["measured"]
    assert set(got["measured"]) == {"moe-a2a", "oracle", "upstream", "none"}
    assert got["comparisons"]["oracle/crowd_again"]["agrees"]
    for variant in ("moe-a2a", "upstream", "none"):
        for part in ("answers", "crowd"):
            assert got["comparisons"][f"{variant}/{part}"]["agrees"]
    ours = got["measured"]["moe-a2a"]
    assert ours["decode"]["tokens"] == {"median": 24, "least": 24, "most": 24, "rounds": 2}
    assert ours["prefill"]["tokens"]["median"] == 120 and ours["one"]["tokens"]["median"] == 6
    assert 0 < ours["stream"]["tpot_p50_ms"]["least"] <= ours["stream"]["tpot_p99_ms"]["most"] < 1e4
    assert got["ratios"]["decode: moe-a2a / upstream"] > 0
    with tarfile.open(stand_in / "out" / "logs.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["moe-a2a.log", "none.log", "oracle.log", "upstream.log"]


def test_parts_are_chosen_and_a_prefill_is_profiled(stand_in: Path) -> None:
    code, got = bench(stand_in, "--variants", "moe-a2a", "--parts", "prefill", "--profile")
    ours = got["measured"]["moe-a2a"]
    assert code == 0 and "decode" not in ours and ours["prefill"]["tokens"]["median"] == 120
    kernels = {"_fwd_kernel": {"ms": 2.0, "count": 2}, "Memcpy DtoH": {"ms": 0.5, "count": 1}}
    layer = [
        {"call": "_fwd_kernel", "host_us": 0.0, "took_us": 7, "gpu_us": 1000},
        {"call": "cudaEventSynchronize", "host_us": 500.0, "took_us": 0.5, "gpu_us": 0.0},
        {"call": "Memcpy DtoH", "host_us": 600.0, "took_us": 7, "gpu_us": 500},
        {"call": "_fwd_kernel", "host_us": 2000.0, "took_us": 7, "gpu_us": 1000},
    ]
    one = {"span_ms": 3.0, "busy_ms": 2.1, "kernels": kernels, "layer": layer}
    assert ours["prefill_profile"] == {"rank 0": one, "rank 1": one}


def test_experts_beyond_those_drawn_are_turned_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_model, "_DRAWN", 1)
    config = json.loads(sglang_model.CONFIG.read_text()) | {"num_hidden_layers": 2, "n_routed_experts": 2}
    tensors = sglang_model.weights(config)

    def values(expert: int) -> torch.Tensor:
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        scales = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return tensors[name].float() * scales

    assert torch.equal(values(1), values(0).roll(128, 0)) and not torch.equal(values(1), values(0))


def test_wrong_logits_are_found_and_exact_servers_are_only_compared(stand_in: Path) -> None:
    code, got = bench(stand_in, "--variants", "oracle-exact,moe-a2a-exact", how="wrong")
    assert code == 0 and "decode" not in got["measured"]["moe-a2a-exact"]
    comparison = got["comparisons"]["moe-a2a-exact/answers"]
    assert not comparison["agrees"] and comparison["forced"]["max"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "how, text",
    [
        ("dies", "ended with 1\n.*out of everything"),
        ("sleeps", "not ready after"),
        ("hangs", "timed out"),
        ("swallowed", "the log does not say that moe-a2a is what ran"),
    ],
)
def test_a_server_that_fails_is_ended_and_its_log_told(stand_in: Path, how: str, text: str) -> None:
    flags = ["--variants", "moe-a2a", "--start-limit", "6", "--stage-limit", "5"]
    code, got = bench(stand_in, *flags, how=how)
    assert code == 1
    assert re.search(text, got["measured"]["moe-a2a"]["failed"], re.DOTALL)


def test_the_budget_ends_everything(stand_in: Path) -> None:
    begin = time.monotonic()
    _, got = bench(stand_in, "--variants", "moe-a2a", how="hangs", budget=30)
    assert time.monotonic() - begin < 45
    assert "failed" in got["measured"]["moe-a2a"]


@pytest.mark.parametrize("how", ["", "other"])
def test_prefill_and_decode_apart_are_compared_and_measured(stand_in: Path, how: str) -> None:
    command = [sys.executable, str(BENCH / "sglang_pd.py"), "--out", str(stand_in / "out"), "--budget", "100"]
    command += ["--port", str(15000 + os.getpid() % 5000), "--state", str(stand_in / "state")]
    command += ["--site", str(stand_in / "site"), "--requests", "4", "--tokens", "6", "--rounds", "1"]
    environment = {**os.environ, "STAND_IN": how}
    ended = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    got = json.loads((stand_in / "out" / "results.json").read_text())
    assert ended.returncode == (1 if how else 0) and "failed" not in got, got
    assert got["greedy"]["prompts"] == 6 and len(got["greedy"]["parted"]) == (6 if how else 0)
    assert got["measured"]["requests_of_each_way"] == 2 * 4 * 2 * 2
    assert got["measured"]["apart, prompts of 512, streamed"]["tokens"]["median"] == 24


def answer(forced: list[float], output: list[int], top: list[list[float]]) -> dict[str, Any]:
    return {"input": forced, "output": output, "top": top}


def test_answers_may_part_where_the_best_two_are_close() -> None:
    top = [[-0.1, -3.0], [-0.7, -0.75], [-0.1, -3.0]]
    one = answer([-1.0, -2.0], [5, 6, 7], top)
    assert compare([one], [one], 0.1)["forced"]["exact"] == 2
    close = compare([one], [answer([-1.0, -2.05], [5, 8, 9], top)], 0.1)
    assert close["agrees"] and close["parted"] == 1 and close["largest_gap"] == pytest.approx(0.05)
    assert not compare([one], [answer([-1.0, -2.0], [4, 6, 7], top)], 0.1)["agrees"]
    assert not compare([one], [answer([-1.0, -2.2], [5, 6, 7], top)], 0.1)["agrees"]
    assert not compare([one], [answer([-1.0, math.nan], [5, 6, 7], top)], 0.1)["agrees"]


def test_caches_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_caches, "PART_BYTES", 1000)
    home, other, out = tmp_path / "home", tmp_path / "other", tmp_path / "out"
    (home / ".cache" / "deep_gemm").mkdir(parents=True)
    out.mkdir()
    content = os.urandom(12345)
    (home / ".cache" / "deep_gemm" / "kernel").write_bytes(content)
    assert len(sglang_caches.save(out, home)) > 11
    sglang_caches.restore(out, other)
    assert (other / ".cache" / "deep_gemm" / "kernel").read_bytes() == content
