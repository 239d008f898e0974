"""What `moe-a2a doctor` asks of the machine that it runs on. Tests put a stand-in in its place."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended. code: exit code, negative for a signal; None if it could not start or took too long."""

    code: int | None
    output: str
    errors: str

    @property
    def reason(self) -> str:
        """One line that says why it failed."""
        if self.code is not None and self.code < 0:
            return f"the process died of signal {-self.code}"
        lines = self.errors.strip().splitlines()
        return lines[-1] if lines else f"exit code {self.code}"


class Machine:
    """The running machine. Nothing here imports torch or the engine into this process: a broken wheel may end it."""

    @property
    def environment(self) -> Mapping[str, str]:
        return os.environ

    def system(self) -> tuple[str, str]:
        """(operating system, processor), such as ("Linux", "x86_64")."""
        return platform.system(), platform.machine()

    def python_version(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    def cores(self) -> int:
        """Cores that this process may use."""
        return len(os.sched_getaffinity(0))

    def memory(self) -> int:
        """Physical memory in bytes."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def lockable_memory(self) -> int | None:
        """Bytes that this process may lock, which RDMA needs; None without a limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY else soft

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def entry_points(self, group: str) -> dict[str, str]:
        """Name -> distribution of the entry points of a group."""
        found = importlib.metadata.entry_points(group=group)
        return {point.name: point.dist.name if point.dist else "" for point in found}

    def loads(self, library: str) -> bool:
        """Whether the dynamic linker finds a library."""
        try:
            ctypes.CDLL(library)
        except OSError:
            return False
        return True

    def entries(self, folder: str) -> list[str]:
        """Names in a folder, sorted; empty if there is none."""
        path = Path(folder)
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def read(self, file: str) -> str:
        """A file's text, stripped; empty if it cannot be read."""
        try:
            return Path(file).read_text().strip()
        except OSError:
            return ""

    def can_share_memory(self) -> bool:
        """Whether memfd_create works."""
        try:
            os.close(os.memfd_create("moe-a2a-doctor"))
        except (AttributeError, OSError):
            return False
        return True

    def can_watch_processes(self) -> bool:
        """Whether pidfd_open works."""
        try:
            os.close(os.pidfd_open(os.getpid()))
        except (AttributeError, OSError):
            return False
        return True

    def run(self, *command: str, timeout_s: float = 120) -> Outcome:
        """Run a command in a process of its own."""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Outcome(None, "", str(error))
        return Outcome(done.returncode, done.stdout, done.stderr)

    def run_python(self, code: str) -> Outcome:
        """Run Python code in a process of its own, with this interpreter."""
        return self.run(sys.executable, "-c", code)
