"""`loraplex key`: keys for the service.

Owns making one. A key is shown once, and kept nowhere.
"""

from __future__ import annotations

import secrets
from typing import Annotated

import typer

from serve_app.cli.terminal import AsJson, CommandFailed, print_fields, print_json, print_line, reporting

PREFIX = "lpx_"
KEY_BYTES = 32

app = typer.Typer(no_args_is_help=True, help="Keys for the service.")


@app.callback()
def key() -> None:
    """Make keys for the service."""


@app.command(no_args_is_help=True)
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is; logs name it, never the key.")],
    is_admin: Annotated[bool, typer.Option("--admin", help="May change the registry too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it once with the line for `auth.keys`."""
    from serve_app.config import ApiKey, digest_of

    with reporting(as_json=as_json):
        made = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        try:
            entry = ApiKey(name=name, sha256=digest_of(made), admin=is_admin)
        except ValueError:
            raise CommandFailed(
                f"'{name}' cannot be a key's name; it may hold up to 64 letters, digits, '.', '_', '-' and '@'"
            ) from None
        if as_json:
            print_json({"name": entry.name, "key": made, "sha256": entry.sha256, "admin": entry.admin})
            return
        admin = ", admin: true" if entry.admin else ""
        print_fields([("key", made), ("for auth.keys", f"- {{name: {entry.name}, sha256: {entry.sha256}{admin}}}")])
        print_line(("keep the key now: only its digest goes into the configuration", "dim"))
