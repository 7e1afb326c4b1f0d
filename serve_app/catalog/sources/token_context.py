"""The context variable with a caller's own Hub token.

Tasks that are started for a request inherit it, so that layers between the request and its download need not pass it. A
running download is shared with other callers; the ingress has checked before who may request it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from serve_app.core import HubToken

_token: ContextVar[HubToken | None] = ContextVar("forwarded_hub_token", default=None)


@contextmanager
def use_hub_token(token: HubToken | None) -> Iterator[None]:
    """Use this Hub token until the end of the block; None is the service's own."""
    before = _token.set(token)
    try:
        yield
    finally:
        _token.reset(before)


def current_hub_token() -> HubToken | None:
    """Return the caller's token, or None."""
    return _token.get()
