"""What the programs that start SGLang servers have in common: options, what servers need, and the end of everything."""

from __future__ import annotations

import argparse
import tarfile
import threading
from pathlib import Path

import sglang_caches
from sglang_process import Server, make_site


def add_arguments(parser: argparse.ArgumentParser, *, state: str, start_limit: float, port: int, rounds: int) -> None:
    """Options of all of them; the values are defaults that differ."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path(state), help="for the model and logs")
    parser.add_argument("--site", help="a folder with SGLang, for PYTHONPATH")
    parser.add_argument("--layers", type=int, default=3, help="of the model; the first one has no experts")
    parser.add_argument("--wide", action="store_true", help="layers of DeepSeek-V3's sizes, with 32 experts")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument(
        "--start-limit", type=float, default=start_limit, help="seconds for a start, and for what compiles"
    )
    parser.add_argument("--stage-limit", type=float, default=60, help="seconds for one measurement")
    parser.add_argument("--caches", type=Path, help="a folder with the parts that --save-caches wrote")
    parser.add_argument("--port", type=int, default=port, help="of the first server or router; the others follow")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--tolerance", type=float, default=0.1, help="of log-probabilities")


def prepare(options: argparse.Namespace) -> tuple[Path, list[str]]:
    """(the model's folder, folders for PYTHONPATH). Servers end with the budget, and every request with them."""
    alarm = threading.Timer(options.budget - 10, Server.end_all)  # for what no limit of a stage ends
    alarm.daemon = True
    alarm.start()
    for folder in (options.state, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    model: Path = options.state / f"model-{options.layers}{'-wide' * options.wide}"
    if not (model / "model.safetensors").is_file():
        import sglang_model  # imports torch, and the processes that send requests import this file

        sglang_model.write(model, layers=options.layers, wide=options.wide)
    if options.caches:
        sglang_caches.restore(options.caches)
    return model, [str(make_site(options.state / "site")), *([options.site] if options.site else [])]


def pack_logs(options: argparse.Namespace) -> None:
    with tarfile.open(options.out / "logs.tar.gz", "w:gz") as tar:
        for log in sorted(options.state.glob("*.log")):
            tar.add(log, log.name)
