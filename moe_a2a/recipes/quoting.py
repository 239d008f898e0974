"""Words for a shell. Every word of every script goes through here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping


def word(text: str, variables: Mapping[str, str] | None = None) -> str:
    """A shell word that expands to `text`.

    variables: parts of `text` that stand for a value known only when the script runs, and the shell variable (a name,
        or such as "PREFILL_IPS[0]") that has it then: {"prefill-0.invalid": "PREFILL_IPS[0]"} makes
        'http://'"${PREFILL_IPS[0]}"':30000' of "http://prefill-0.invalid:30000". A place holder must be a name that no
        user can give; recipes for hosts that are not known yet use names that end in .invalid (RFC 6761).
    """
    if not variables:
        return shlex.quote(text)
    held = "|".join(re.escape(name) for name in sorted(variables, key=len, reverse=True))
    parts = re.split(f"({held})", text)
    quoted = [f'"${{{variables[part]}}}"' if part in variables else shlex.quote(part) for part in parts if part]
    return "".join(quoted) or "''"


def line(words: Iterable[str], variables: Mapping[str, str] | None = None) -> str:
    """A command on one line."""
    return " ".join(word(text, variables) for text in words)


def lines(words: Iterable[str], variables: Mapping[str, str] | None = None, indent: str = "    ") -> str:
    """A command with one flag and its values a line."""
    rows: list[list[str]] = [[]]
    for text in words:
        # A value may begin with a dash only if it is a number: SGLang's flags take no others.
        if text.startswith("--"):
            rows.append([])
        rows[-1].append(word(text, variables))
    return f" \\\n{indent}".join(" ".join(row) for row in rows if row)
