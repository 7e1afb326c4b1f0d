"""The options that several commands share.

Owns their names, their environment variables (which typer reads) and what may stand in them. Must stay light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

DEFAULT_URL = "http://127.0.0.1:8000"


def checked_url(value: str) -> str:
    """Return an address without a slash at its end; typer reports one that is none."""
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
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", exists=True, dir_okay=False,
        help="The Serve file whose bases, sources and cache count; default: serve_config.yaml here, else the embedded "
        "models and the Hub.",
    ),
]  # fmt: skip
