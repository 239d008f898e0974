"""The command line, `moe-a2a`. A command's module is imported only when the command is used."""

from __future__ import annotations

import importlib

import click

# Command -> (module, function, the line in --help). These need torch, which `doctor` must be able to do without.
_LAZY = {
    "bench": ("moe_a2a.bench.command", "bench", "Check dispatch and combine, then time them against baselines."),
    "bench-report": (
        "moe_a2a.bench_report.command",
        "bench_report",
        "Tabulate logs of SGLang's serving benchmark at several concurrencies.",
    ),
    "chaos": (
        "moe_a2a.chaos.command",
        "chaos",
        "Lose ranks of an elastic group at random, and check every row and view.",
    ),
    "members": ("moe_a2a.membership.commands", "members", "Print a group's view: who is in it, who failed and why."),
    "recipe": ("moe_a2a.recipes.commands", "recipe", "Write launch scripts for SGLang: PD, EP, EPD, Slurm."),
    "store": ("moe_a2a.membership.commands", "store", "Serve the membership store, and print its address."),
}


class LazyGroup(click.Group):
    """A group that knows its lazy commands by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        module, function, _ = _LAZY[cmd_name]
        try:
            command = getattr(importlib.import_module(module), function)
        except ImportError as error:
            raise click.ClickException(f"{cmd_name} cannot be loaded: {error}\n`moe-a2a doctor` says why.") from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = None if name in _LAZY else self.get_command(ctx, name)
            rows.append((name, command.get_short_help_str(80) if command else _LAZY[name][2]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moe-a2a")
def main() -> None:
    """Expert-parallel all-to-all for mixture-of-experts models."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help='Print {"checks": [...], "ok": bool} instead of a table.')
def doctor(as_json: bool) -> None:
    """Say what this machine can do, what is missing, and what mends it.

    The exit code is 1 if something is missing that CPU ranks need.
    """
    from rich.console import Console

    from moe_a2a import doctor as report
    from moe_a2a.machine import Machine

    checks = report.examine(Machine())
    if as_json:
        click.echo(report.as_json(checks))
    else:
        report.show(checks, Console())
    if not report.ready(checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
