"""A caller's own Hub token, lent to whatever is fetched for that caller.

Owns the way from the request to the download that it starts, which other layers need not know of: a context variable,
which tasks started for the request inherit. The token is nobody else's: a download that is under way is shared, but
who may ask for it was decided before, by the ingress.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from serve_app.core import HubToken

_lent: ContextVar[HubToken | None] = ContextVar("lent_hub_token", default=None)


@contextmanager
def use_hub_token(token: HubToken | None) -> Iterator[None]:
    """Read the Hub with this token until the end of the block; None is the service's own."""
    before = _lent.set(token)
    try:
        yield
    finally:
        _lent.reset(before)


def current_hub_token() -> HubToken | None:
    """Return the token that was lent, or None."""
    return _lent.get()
