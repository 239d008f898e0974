"""Starts ranks of this program on this machine, as torchrun would, and plays several hosts if asked to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from torch.distributed import TCPStore


def run_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run `moe-a2a ARGUMENTS` as `ranks` processes that find each other. Returns the first exit code that is not 0;
    ends all on failure."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    processes = []
    for rank in range(ranks):
        env = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is served here, not by rank 0
        }
        processes.append(subprocess.Popen([sys.executable, "-m", "moe_a2a.cli", *arguments], env=env))
    try:
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        del store


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            time.sleep(1.0)  # the others may still say what they saw
            rank, code = failed[0]
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            print(f"rank {rank} ended with {how}", file=sys.stderr)
            return code if code > 0 else 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
