"""Which web pages may use the service through a browser.

Owns two checks. A page of another origin may not draw or change anything unless its origin is configured: a browser
sends such a request without asking, and a service without keys cannot tell it from its owner's. A service on loopback
answers to names of this machine alone: a page whose own name was pointed at 127.0.0.1 would be of the same origin.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.http.auth import READING
from serve_app.api.http.error_responses import error_response
from serve_app.errors import LoraplexError

log = logging.getLogger(__name__)

# Values a browser sends with a request from its own address bar or from a page of this very origin.
_OWN_SITES = ("same-origin", "none")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class ForeignOrigin(LoraplexError):
    """A web page of another origin had its visitor's browser ask."""

    origin: str
    status = 403
    code = "foreign_origin"
    template = "pages of {origin} may not use this service; its operator can name them in ingress.cors_origins"


class UnknownHost(LoraplexError):
    """A service on loopback was asked by a name that is none of this machine's."""

    host: str
    status = 421
    code = "unknown_host"
    template = (
        "this service is bound to loopback and does not answer to the name '{host}'; ask 127.0.0.1 or localhost, or "
        "have its operator name it in ingress.hosts"
    )


class OriginCheck:
    """Refuses requests that a foreign page makes its visitor's browser send.

    Only browsers are refused: other clients send neither `Origin` nor `Sec-Fetch-Site`.
    """

    def __init__(self, app: ASGIApp, *, origins: Collection[str], hosts: Collection[str]) -> None:
        """Let in pages of these origins ("*" for all), and on loopback requests for these host names."""
        self._app = app
        self._origins = frozenset(origins)
        self._hosts = frozenset(host.lower() for host in hosts) | {urlsplit(one).hostname or "" for one in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or (refusal := self._refusal(scope)) is None:
            await self._app(scope, receive, send)
            return
        log.info("request %s: %s: %s", scope["state"]["request_id"], refusal.code, refusal)
        await error_response(scope, refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> LoraplexError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _is_on_loopback(scope) and not self._is_known(host):
            return UnknownHost(host[:100])
        if scope["method"] not in (*READING, "OPTIONS") and not self._is_own_page(headers, host):
            return ForeignOrigin(headers.get("origin", "another site")[:100])
        return None

    def _is_known(self, host: str) -> bool:
        name = _name_of(host)
        return (
            name == "" or name == "localhost" or name.endswith(".localhost") or _is_address(name) or name in self._hosts
        )

    def _is_own_page(self, headers: Headers, host: str) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is None and site is None:
            return True
        if "*" in self._origins or origin in self._origins or site in _OWN_SITES:
            return True
        if site is not None or origin is None:
            return False
        scheme = origin.partition("://")[0]
        return host != "" and _authority(origin) == _authority(f"{scheme}://{host}")


def _is_on_loopback(scope: Scope) -> bool:
    name = str((scope.get("server") or ("",))[0])
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    """Whether a host is given by its number: no name can be pointed there."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """Return a Host header without its port, and without the brackets of an address."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return host


def _authority(origin: str) -> str:
    """Return host and port of an origin, without the port that its scheme means anyway."""
    scheme, _, authority = origin.lower().partition("://")
    return authority.removesuffix(_DEFAULT_PORTS.get(scheme, ""))
