"""The page that goes with a rendered recipe: what runs where, what moves, what to expect."""

from __future__ import annotations

from collections.abc import Sequence

from moe_a2a.recipes.memory import Share
from moe_a2a.recipes.plan import Plan, Server
from moe_a2a.recipes.servers import ALL_ADDRESSES, Settings

_TRANSFERS = {
    "mooncake": "The KV cache goes over RDMA, through the Mooncake Transfer Engine. Without RDMA devices use "
    "`--transfer mooncake_tcp`.",
    "mooncake_tcp": "The KV cache goes over TCP, through the Mooncake Transfer Engine: right for trying things and for "
    "machines without RDMA devices, and several times slower than RDMA.",
    "nixl": "The KV cache goes through NIXL, which must be installed beside SGLang.",
}


class Page:
    """Markdown in the order in which it is added, after a table of processes."""

    def __init__(self, settings: Settings, processes: Sequence[Server] = ()) -> None:
        self._settings, self.processes = settings, tuple(processes)
        self._paragraphs: list[str] = []
        self._sizes: list[str] = []

    def title(self, what: str) -> str:
        """A heading."""
        return f"{self._settings.model.path} on SGLang {self._settings.release.version}: {what}"

    def what(self, text: str) -> None:
        """A paragraph."""
        self._paragraphs.append(text)

    def fits(self, what: str, share: Share) -> None:
        """What weights take of a GPU."""
        self._sizes.append(f"{what} take {share.text} of each GPU")

    def transfer(self) -> None:
        """How the KV cache travels, and over which devices."""
        devices = self._settings.ib_devices
        chosen = f" Its devices are `{devices}`." if devices is not None else ""
        self.what(_TRANSFERS[self._settings.transfer] + chosen)

    def text(self) -> str:
        rows = ["| process | host | GPUs | port |", "|---|---|---|---|"]
        for server in self.processes:
            place = server.place
            gpus = f"{place.first} to {place.last}" if place.gpus > 1 else str(place.first) if place.gpus else ""
            rows.append(f"| {server.name} | {server.host} | {gpus} | {server.port if server.node == 0 else ''} |")
        sizes = [f"By arithmetic, {'; '.join(self._sizes)}."] if self._sizes else []
        anywhere = any(ALL_ADDRESSES in server.command for server in self.processes)
        trust = (
            f"Servers listen on the addresses above{', the router on all of its host,' if anywhere else ''} and "
            "authenticate nobody, the Transfer Engine included: the network must be trusted."
        )
        return "\n\n".join(["\n".join(rows), *self._paragraphs, *sizes, trust]) + "\n"


def readme(plan: Plan, how: str, starts: Sequence[str], *more: str) -> str:
    """README.md of a rendered plan: its text, `more` paragraphs, and the commands that start and check it."""
    paragraphs = [
        f"# {plan.title}",
        *(f"**{line}**" for line in plan.warnings),
        plan.text.rstrip(),
        *more,
        f"Start, in any order, {how}:",
        "\n".join(f"    {command}" for command in starts),
        "Then, from anywhere that reaches the hosts:",
        "    ./check.sh",
        "It ends with 0 once every server is healthy and a request has gone the whole way.",
    ]
    return "\n\n".join(paragraphs) + "\n"
