"""The pages that people open in a browser, and the files those load.

Owns their headers: a page may run and load only what this service itself sends, and no other page may frame it. Must
not know what the pages show.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.auth import OpenRoute

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# `blob:` is for pictures that the page itself has decoded from a reply.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
SECURITY_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent, with the tag by which a browser asks whether it has changed."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, content: bytes, suffix: str) -> Asset:
        """Return bytes as an asset of the type that a file's suffix means."""
        return cls(content, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def read_assets() -> dict[str, Asset]:
    """Return the files that pages load, by name."""
    paths = (path for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES and path.suffix != ".html")
    return {path.name: Asset.of(path.read_bytes(), path.suffix) for path in paths}


def read_page(name: str, **parts: str) -> Asset:
    """Return a page of the static folder; each `<!-- name -->` in it is replaced by the part of that name."""
    html = (STATIC / name).read_text("utf-8")
    for part, content in parts.items():
        html = html.replace(f"<!-- {part} -->", content)
    return Asset.of(html.encode(), ".html")


def asset_response(request: Request, asset: Asset) -> Response:
    """Return an asset, or 304 without a body to a browser that holds these very bytes."""
    # Asked for again each time, as a page and its scripts must be of one version; the tag keeps that cheap.
    headers = {**SECURITY_HEADERS, "cache-control": "no-cache", "etag": asset.etag}
    known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
    if asset.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers={**headers, "content-type": asset.media_type})


router = APIRouter(route_class=OpenRoute, include_in_schema=False)
_assets = read_assets()


@router.get("/static/{name}")
@router.head("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """Return a file that a page loads."""
    if name not in _assets:
        raise HTTPException(404)
    return asset_response(request, _assets[name])
