"""`loraplex models`: what a running service has.

Owns the list, and the completion of model names in a shell, which asks the same service.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict

import typer

from serve_app.cli.service import ServedModel, ServiceClient
from serve_app.cli.terminal import (
    DEFAULT_URL,
    AsJson,
    CommandFailed,
    Key,
    Url,
    plural,
    print_json,
    print_line,
    reporting,
)

TIMEOUT_S = 60.0
COMPLETION_TIMEOUT_S = 2.0


def models(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """List the bases of a running service and the adapters it knows so far."""
    with reporting(as_json=as_json):
        with ServiceClient(url, key, timeout_s=TIMEOUT_S) as service:
            found = service.models()
        if as_json:
            print_json({"url": url, "models": [asdict(model) for model in found]})
            return
        _show(found)
        bases = [model for model in found if model.base_id is None]
        adapters = plural(len(found) - len(bases), "adapter")
        print_line((f"{plural(len(bases), 'base')} and {adapters} at {url}", "dim"))


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Return the service's models with a prefix; none if it is unavailable, since a shell cannot show an error."""
    url, key = context.params.get("url") or DEFAULT_URL, context.params.get("key")
    with contextlib.suppress(CommandFailed), ServiceClient(url, key, timeout_s=COMPLETION_TIMEOUT_S) as service:
        return [model.id for model in service.models() if model.id.startswith(incomplete)]
    return []


def _show(found: Sequence[ServedModel]) -> None:
    for base in found:
        if base.base_id is None:
            print_line((base.id, "bold"))
            for adapter in found:
                if adapter.base_id == base.id:
                    print_line(f"  {adapter.id}")
