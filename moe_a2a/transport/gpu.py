"""Which GPU a rank has, and what lies between two of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_a2a.hosts import machine_id

#: `nvidia-smi topo -m`'s words for what lies between two GPUs.
_LINKS = {
    "SYS": "PCIe and the link between CPU sockets (SYS)",
    "NODE": "PCIe and the link between PCIe host bridges of one socket (NODE)",
    "PHB": "a PCIe host bridge (PHB)",
    "PXB": "several PCIe bridges (PXB)",
    "PIX": "one PCIe bridge (PIX)",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as any process of any machine can name it. uuid: without "GPU-"; bus: its PCI address; machine: boot id."""

    name: str
    uuid: str
    bus: str
    machine: str

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """The GPU behind a CUDA device of this process."""
        found: Any = torch.cuda.get_device_properties(device)  # torch's types leave out the PCI numbers
        bus = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        return cls(found.name, str(found.uuid), bus, machine_id())

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Gpu:
        return cls(**{field: str(value[field]) for field in ("name", "uuid", "bus", "machine")})

    def ordinal(self) -> int | None:
        """Its CUDA device number in this process; None if this process does not see it (CUDA_VISIBLE_DEVICES)."""
        for index in range(torch.cuda.device_count()):
            if str(torch.cuda.get_device_properties(index).uuid) == self.uuid:
                return index
        return None

    def __str__(self) -> str:
        return f"{self.name} at {self.bus}"


def describe_link(own: Gpu, peer: Gpu, run: Callable[..., str] | None = None) -> str:
    """What nvidia-smi says lies between two GPUs, as part of a sentence. run: replaces the call of nvidia-smi."""
    if own.machine != peer.machine:
        return "they are in different machines, which only an NVLink fabric with fabric handles joins"
    run = run or _nvidia_smi
    try:
        numbers = _numbers(run("--query-gpu=index,uuid", "--format=csv,noheader"))
        word = _topology(run("topo", "-m"))[numbers[own.uuid]][numbers[peer.uuid]]
    except (OSError, subprocess.SubprocessError, LookupError, ValueError):
        return "what lies between them is not known (`nvidia-smi topo -m` says nothing)"
    if word.startswith("NV"):
        return f"they are joined by NVLink ({word})"
    return f"no NVLink joins them, only {_LINKS.get(word, word)}"


def _nvidia_smi(*arguments: str) -> str:
    done = subprocess.run(("nvidia-smi", *arguments), capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def _numbers(listing: str) -> dict[str, int]:
    """UUID -> nvidia-smi's own number, from lines of "0, GPU-xxxx"."""
    rows = (line.split(",") for line in listing.splitlines() if line.strip())
    return {uuid.strip().removeprefix("GPU-"): int(number) for number, uuid in rows}


def _topology(table: str) -> dict[int, list[str]]:
    """The GPU columns of `nvidia-smi topo -m`: number -> the words towards GPU 0, 1, ... It may hold terminal codes."""
    rows = [line.replace("\x1b[4m", "").replace("\x1b[0m", "").split() for line in table.splitlines()]
    gpus = [row for row in rows if len(row) > 1 and row[0].startswith("GPU") and not row[1].startswith("GPU")]
    return {int(row[0].removeprefix("GPU")): row[1 : 1 + len(gpus)] for row in gpus}
