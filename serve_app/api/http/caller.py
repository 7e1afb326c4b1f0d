"""The caller: the key that a request came with, and the caller's own token for the Hub.

Owns what routes may know of the caller. Must not know how keys are checked; `auth` does that, before
any route.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from serve_app.core import HubToken, UnresolvedRequest
from serve_app.errors import MalformedRequest

HUB_TOKEN_HEADER = "x-hf-token"
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9_]{1,250}")


class ImageQuota(Protocol):
    """The images that a key may still draw."""

    async def spend_images(self, count: int) -> None:
        """Take images off what the key may draw now.

        Raises:
            KeyLimitReached: it may not draw so many yet.
            OutOfBounds: it may never draw so many at once.
        """
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request; `key` is the name of its key, None if none are configured or none is needed.

    `is_known` is False where keys are configured and it brought none.
    """

    key: str | None = None
    allowance: ImageQuota | None = None
    hub_token: HubToken | None = None
    is_known: bool = True


NOBODY = Caller()
# The key and the address, if any, against which the running request's work is counted.
asked_by: ContextVar[tuple[str, ...]] = ContextVar("asked_by", default=())


def accounts_of(scope: Scope, key: str | None) -> tuple[str, ...]:
    """Return whom a request's work is counted against; addresses of one IPv6 network (/64) are one."""
    host = str((scope.get("client") or ("",))[0])
    address = ":".join(host.split(":")[:4]) if ":" in host else host
    return tuple(name for name in (f"key {key}" if key else "", f"address {address}" if address else "") if name)


def caller_of(request: Request) -> Caller:
    """Return who sent a request."""
    state: Any = request.scope.get("state", {})
    caller: Caller = state.get("caller", NOBODY)
    return caller


def hub_token_of(request: Request) -> HubToken | None:
    """Return the caller's token for the Hub, where such tokens are taken at all."""
    return caller_of(request).hub_token


async def charge_quota(request: Request, unresolved: UnresolvedRequest) -> UnresolvedRequest:
    """Charge a request's images to its caller's quota, and return it with what the caller may see.

    Raises:
        KeyLimitReached, OutOfBounds: the key has no images left.
    """
    caller = caller_of(request)
    if caller.allowance is not None:
        await caller.allowance.spend_images(unresolved.num_images)
    return unresolved if caller is NOBODY else replace(unresolved, hub_token=caller.hub_token, key=caller.key)


def read_hub_token(headers: Headers, *, is_key_in_authorization: bool) -> HubToken | None:
    """Return the token of a request's headers: `x-hf-token`, or `authorization` where that holds no key of ours.

    Raises:
        MalformedRequest: the header holds something else.
    """
    given = headers.get(HUB_TOKEN_HEADER)
    if given is not None:
        if not _HUB_TOKEN.fullmatch(given.strip()):
            raise MalformedRequest(f"the header '{HUB_TOKEN_HEADER}' must hold one token of the Hub, such as 'hf_...'")
        return HubToken(given.strip())
    scheme, _, value = headers.get("authorization", "").partition(" ")
    # Clients of OpenAI's shape always send something there.
    if is_key_in_authorization or scheme.lower() != "bearer" or not _HUB_TOKEN.fullmatch(value.strip()):
        return None
    return HubToken(value.strip())
