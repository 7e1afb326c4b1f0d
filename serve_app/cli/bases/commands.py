"""`loraplex bases`: what the bases of a running service do; one more, one less.

Owns what the commands print. Must stay light, as `serve_app.cli.main` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from serve_app.cli.service import ServiceClient
from serve_app.cli.terminal import (
    DEFAULT_URL,
    AsJson,
    CommandFailed,
    Key,
    Url,
    checked_url,
    print_json,
    print_line,
    reporting,
)

if TYPE_CHECKING:
    from serve_app.cli.bases.changes import Change

TIMEOUT_S = 60.0
DASHBOARD = "http://localhost:8265"

Address = Annotated[
    str,
    typer.Option(envvar="RAY_DASHBOARD_ADDRESS", callback=checked_url, help="The dashboard of the Ray cluster."),
]
Application = Annotated[
    str | None, typer.Option(help="The Serve application of the ingress, where a cluster has several.")
]
Written = Annotated[
    Path | None,
    typer.Option("--write", metavar="FILE", help="Write the Serve file that is deployed; none is replaced."),
]

bases = typer.Typer(no_args_is_help=True, help="What the bases of a running service do; one more, one less.")


@bases.command()
def status(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Say of each base that it runs, starts, waits for room or is stopped, or has failed and why."""
    with reporting(as_json=as_json):
        with ServiceClient(url, key, timeout_s=TIMEOUT_S) as service:
            found = service.bases()
        if as_json:
            print_json({"url": url, "bases": [asdict(base) for base in found]})
            return
        for base in found:
            expected = f"{base.expected_s:.0f} s to go" if base.expected_s and base.state == "starting" else ""
            drawn = f"{base.share:.2%} of the requests for {base.canary_of}" if base.share else ""
            more = [part for part in (base.reason or expected, drawn) if part]
            print_line((base.id, "bold"), f": {', '.join([base.state, *more])}")


@bases.command(no_args_is_help=True)
def add(
    base: Annotated[
        Path, typer.Argument(metavar="FILE", help="One base in YAML, as under `bases`.", exists=True, dir_okay=False)
    ],
    address: Address = DASHBOARD,
    application: Application = None,
    write: Written = None,
    as_json: AsJson = False,
) -> None:
    """Add a base to a service that runs on a cluster; nothing else starts again."""
    with reporting(as_json=as_json):
        from serve_app.cli.bases.changes import read_base, with_base

        entry = read_base(base)
        _carry_out(
            lambda details: with_base(details, entry, application), address, write, what="added", as_json=as_json
        )


@bases.command(no_args_is_help=True)
def remove(
    base_id: Annotated[str, typer.Argument(metavar="ID", help="The base.")],
    address: Address = DASHBOARD,
    application: Application = None,
    write: Written = None,
    as_json: AsJson = False,
) -> None:
    """Remove a base from a service that runs on a cluster; its replicas finish what they have."""
    with reporting(as_json=as_json):
        from serve_app.cli.bases.changes import without_base

        _carry_out(
            lambda details: without_base(details, base_id, application), address, write, what="removed", as_json=as_json
        )


def _carry_out(
    change_of: Callable[[dict[str, Any]], Change], address: str, write: Path | None, *, what: str, as_json: bool
) -> None:
    from serve_app.cli.bases.cluster import Cluster

    cluster = Cluster(address)
    change = change_of(cluster.details())
    with _written(change, write):
        cluster.deploy(change.serve_file)
    if as_json:
        print_json({what: change.base_id, "application": change.application, "bases": change.bases, "written": write})
        return
    print_line((change.base_id, "bold"), f": {what}; {change.application} serves {', '.join(change.bases)}")
    print_line("  Serve carries it out now; `loraplex bases status` follows it")
    kept = f"{write} has the whole of it" if write else "make the same change in your Serve file"
    print_line(f"  {kept}: the next `serve deploy` of a file without it takes it back")


@contextmanager
def _written(change: Change, path: Path | None) -> Iterator[None]:
    """Write the Serve file of a change; it is gone again where the block fails."""
    if path is None:
        yield
        return
    try:
        # What is deployed may hold secrets of its environment.
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        raise CommandFailed(f"{path} exists already; name another file", "file_exists") from None
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written: {error.strerror}", "not_written") from None
    try:
        try:
            path.write_text(yaml.safe_dump(change.serve_file, sort_keys=False, allow_unicode=True), encoding="utf-8")
        except OSError as error:
            raise CommandFailed(f"{path} cannot be written: {error.strerror}", "not_written") from None
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
