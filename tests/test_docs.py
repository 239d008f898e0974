"""The documentation: its snippets run, its links lead somewhere, and it names the options and keys that exist.

A snippet is run if its fence says so: "```python run ranks=4". The snippets of a page run one after the other, as one
program.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from ranks import Ctx, run_ranks

from moe_a2a import Config, Options
from moe_a2a.bench.command import bench
from moe_a2a.cli import main
from moe_a2a.recipes.commands import recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("**/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def program(page: Path) -> tuple[str, int]:
    """The runnable snippets of a page, on the lines that they have there ("" if there are none), and their ranks."""
    text = page.read_text()
    lines: list[str] = []
    ranks = 4
    for fence in FENCE.finditer(text):
        language, *words = fence["info"].split() or [""]
        if language == "python" and "run" in words:
            ranks = next((int(word.removeprefix("ranks=")) for word in words if word.startswith("ranks=")), ranks)
            lines += [""] * (text.count("\n", 0, fence.start("code")) - len(lines))
            lines += fence["code"].splitlines()
    return "\n".join(lines), ranks


def run_program(ctx: Ctx, source: str, page: str) -> None:
    """Run a program as torchrun would have started it."""
    os.environ.update(
        RANK=str(ctx.rank),
        LOCAL_RANK=str(ctx.rank),
        WORLD_SIZE=str(ctx.world),
        MASTER_ADDR=ctx.store.host,
        MASTER_PORT=str(ctx.store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )
    exec(compile(source, page, "exec"), {"__name__": "__main__"})


@pytest.mark.alone
@pytest.mark.parametrize("page", [page for page in PAGES if program(page)[0]], ids=name)
def test_snippets_run(page: Path) -> None:
    source, ranks = program(page)
    run_ranks(run_program, ranks, source, name(page), timeout=60)


def test_pages_to_copy_from_have_snippets_that_run() -> None:
    assert program(ROOT / "README.md")[0]
    assert program(ROOT / "docs" / "api.md")[0].count("a2a.dispatch(") > 10


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from the text."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)} links to {link}; headings: {sorted(anchors(target))}"


def commands(page: Path) -> list[str]:
    """What a page calls `moe-a2a ...` with, in code spans and blocks, with continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    return re.findall(r"moe-a2a ((?:bench|doctor|members|recipe|store)\b[^\n`|]*)", text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_documented_commands_and_options_exist(page: Path) -> None:
    for text in commands(page):
        words = text.split("#")[0].split()
        command = main.get_command(click.Context(main), words[0])
        assert command is not None
        if isinstance(command, click.Group) and len(words) > 1:
            command = command.get_command(click.Context(command), words[1])
            assert command is not None, f"{name(page)}: moe-a2a {text}"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
        assert given <= known, f"{name(page)}: moe-a2a {text}"


def table_rows(page: Path) -> set[str]:
    """The code spans in the first column of a page's tables."""
    cells = re.findall(r"^\| ([^|]*) \|", prose(page), re.MULTILINE)
    return {span for cell in cells for span in re.findall(r"`([^`]+)`", cell)}


def test_every_bench_option_is_documented() -> None:
    documented = {row for row in table_rows(ROOT / "docs" / "bench.md") if row.startswith("--")}
    assert documented == {parameter.opts[0] for parameter in bench.params}


def test_every_recipe_and_its_options_are_documented() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    documented = table_rows(ROOT / "docs" / "recipes.md")
    for called, command in recipe.commands.items():
        assert f"moe-a2a recipe {called}" in pages
        if called in ("pd-single", "pd", "ep", "epd"):
            assert {parameter.opts[0] for parameter in command.params} <= documented, called


def test_every_key_of_the_bench_json_is_documented(tmp_path: Path) -> None:
    sizes = ["--ranks=2", "--hosts=2", "--hidden=128", "--experts=4", "--top-k=2", "--tokens=4", "--iterations=1"]
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "moe_a2a.cli", "bench", *sizes, "--json", str(file)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    (case,) = content["cases"]
    documented = table_rows(ROOT / "docs" / "bench.md")
    keys = {*content, *case, *(f"baselines.{baseline}" for baseline in case["baselines"])}
    assert keys - {"cases", "baselines"} <= documented
    text = (ROOT / "docs" / "bench.md").read_text()
    for key in (*content["machine"], *content["versions"]):
        assert f"`{key}`" in text


def test_every_field_of_config_and_options_is_documented() -> None:
    documented = table_rows(ROOT / "docs" / "api.md")
    for kind in (Config, Options):
        assert set(inspect.signature(kind).parameters) <= documented
