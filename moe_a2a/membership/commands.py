"""`moe-a2a store` and `moe-a2a members`."""

from __future__ import annotations

import json

import click

from moe_a2a.errors import MoeA2AError
from moe_a2a.membership.view import View


@click.command()
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="ADDRESS:PORT; port 0 is a free one.")
@click.option(
    "--idle", type=click.FloatRange(0), default=10.0, show_default=True, help="End so many seconds after the last user."
)
@click.option("--detach", is_flag=True, help="Go to the background once it listens.")
def store(listen: str, idle: float, detach: bool) -> None:
    """Serve the membership store (a TCPStore), and print its address.

    It keeps its views in memory, asks nobody for a password, and ends when its last user is gone (--idle 0: never).
    """
    from moe_a2a.membership.store_process import is_loopback, serve, split_listen

    try:
        if not is_loopback(split_listen(listen)[0]):
            click.echo(f"{listen} is not loopback: whoever reaches this port can change the group", err=True)
        serve(listen, idle, detach)
    except MoeA2AError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.option("--store", "url", required=True, help="tcp://HOST:PORT, etcd://HOST:PORT or etcds://HOST:PORT.")
@click.option("--group", default="default", show_default=True, help="The group's name.")
@click.option("--json", "as_json", is_flag=True, help="Print the view as JSON instead of a table.")
@click.option("--follow", is_flag=True, help="Print every new view until interrupted.")
def members(url: str, group: str, as_json: bool, follow: bool) -> None:
    """Print a group's view: who is in it, who failed and why.

    The exit code is 1 if the store does not answer or holds no view of the group.
    """
    from moe_a2a.membership.store import open_store

    try:
        client = open_store(url, group)
        view = client.get()
        if view is None:
            raise click.ClickException(f"{url} holds no view of group {group!r}")
        _show(view, as_json)
        while follow:
            newer = client.watch(view.epoch, 60.0)
            if newer is not None:
                view = newer
                _show(view, as_json)
    except MoeA2AError as error:
        raise click.ClickException(str(error)) from error


def _show(view: View, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from moe_a2a.membership.wire import encode_view

    if as_json:
        click.echo(json.dumps(json.loads(encode_view(view))))
        return
    table = Table("rank", "state", "host", "watcher", "incarnation", "first steps", "note")
    for rank, slot in enumerate(view.slots):
        if slot.endpoint is None:
            table.add_row(str(rank), slot.state.value)
            continue
        steps = ", ".join(f"{name} {step}" for name, step in zip(view.channels, slot.first, strict=False))
        if slot.last:
            steps += " until " + ", ".join(str(step) for step in slot.last)
        end = slot.endpoint
        table.add_row(str(rank), slot.state.value, end.host, end.address, f"{end.incarnation:016x}", steps, slot.note)
    console = Console()
    console.print(f"epoch {view.epoch}: {len(view.ranks)} of {view.max_ranks} slots take part")
    console.print(table)
