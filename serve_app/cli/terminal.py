"""Output and errors of all commands.

Owns the two consoles, the JSON form and the exit code of a failure: 0 done, 1 refused or failed, 2 wrong usage (which
typer itself reports). Must stay light: each command line imports it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.text import Text

from serve_app.errors import LoraplexError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

FAILED = 1


class CommandFailed(Exception):
    """The command failed: one sentence for the reader, and a stable code for scripts."""

    def __init__(self, message: str, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def reporting(*, as_json: bool) -> Iterator[None]:
    """Turn a failure into one line, or one JSON document, and exit code 1."""
    try:
        yield
    except (CommandFailed, LoraplexError) as failure:
        if as_json:
            print_json({"error": {"code": failure.code, "message": str(failure)}})
        else:
            print_error(str(failure))
        raise typer.Exit(FAILED) from None


def print_json(value: Any) -> None:
    """Print one JSON document on standard output; paths become text."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_text))


def print_error(message: str) -> None:
    """Print a failure as one line on standard error."""
    err.print(Text.assemble(("error: ", "bold red"), plain(message)), soft_wrap=True)


def print_line(*parts: str | tuple[str, str]) -> None:
    """Print one line; a part is text, or text with a style. Markup in it is not interpreted."""
    cleaned = (plain(part) if isinstance(part, str) else (plain(part[0]), part[1]) for part in parts)
    out.print(Text.assemble(*cleaned), soft_wrap=True)


def print_fields(fields: list[tuple[str, str]]) -> None:
    """Print names and values in two columns, without empty values."""
    shown = [(name, value) for name, value in fields if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print_line("  ", (f"{name:<{width}}", "dim"), f"  {value}")


def plain(text: str) -> str:
    """Return one printable line, without control characters from a service or a file."""
    line = " ".join(text.splitlines())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def bytes_text(size_bytes: int) -> str:
    """Return a size with its unit."""
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _text(value: object) -> str | list[object]:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


DEFAULT_URL = "http://127.0.0.1:8000"


def checked_url(value: str) -> str:
    """Return an address without a trailing slash; typer reports an invalid one."""
    try:
        parts = urlsplit(value)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise typer.BadParameter(f"'{value}' is no address; one looks like {DEFAULT_URL}")
    if "@" in parts.netloc:
        raise typer.BadParameter("an address holds no user or password; a key goes into --key or LORAPLEX_KEY")
    return value.rstrip("/")


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Url = Annotated[
    str, typer.Option("--url", envvar="LORAPLEX_URL", callback=checked_url, help="Where the service answers.")
]
Key = Annotated[str | None, typer.Option("--key", envvar="LORAPLEX_KEY", help="A key for the service, if it asks.")]
ServeFile = Annotated[Path, typer.Argument(metavar="FILE", help="A Serve config file.", exists=True, dir_okay=False)]
OptionalServeFile = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="A Serve config file; default: the demo bases.", exists=True, dir_okay=False),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", exists=True, dir_okay=False,
        help="The Serve file whose bases, sources and cache count; default: serve_config.yaml here, else the embedded "
        "models and the Hub.",
    ),
]  # fmt: skip
