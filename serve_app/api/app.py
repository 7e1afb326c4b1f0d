"""The HTTP face: every route family over one gateway.

Owns assembling it. Takes anything with the gateway's interface, so that tests need no cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serve_app.api import document
from serve_app.api.document import build_document
from serve_app.api.http import error_responses
from serve_app.api.http.auth import Access, Authentication
from serve_app.api.http.boundary import RequestIdMiddleware, new_uuid
from serve_app.api.http.gateway import Gateway, Services
from serve_app.api.http.origins import OriginCheck
from serve_app.api.huggingface import routes as inference
from serve_app.api.openai import models
from serve_app.api.openai import routes as images
from serve_app.api.pages import pages, status
from serve_app.api.pictures.decoder import PictureDecoder
from serve_app.api.registry import pictures as adapter_pictures
from serve_app.api.registry import routes as registry
from serve_app.api.registry import usage
from serve_app.config import IngressSettings, SharedSettings


class LoraplexAPI(FastAPI):
    """FastAPI, with an OpenAPI document that also knows the bodies which the routes read themselves."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, built once."""
        if self.openapi_schema is None:
            self.openapi_schema = build_document(self.routes)
        return self.openapi_schema


def create_app(
    gateway: Gateway,
    settings: IngressSettings,
    *,
    request_timeout_s: float = SharedSettings().request_timeout_s,
    access: Access | None = None,
    clock: Callable[[], float] = time.monotonic,
    new_request_id: Callable[[], str] = new_uuid,
    now: Callable[[], float] = time.time,
    echo_request_id: bool = True,
    decoder: PictureDecoder | None = None,
) -> FastAPI:
    """Return the ASGI application over a gateway; without `access`, any caller may do everything.

    `decoder` is that of an application before this one, of the same limits.
    `echo_request_id` is for the server in front: Ray Serve's proxy adds `x-request-id` to every reply itself.
    """
    app = LoraplexAPI(docs_url=None, redoc_url=None, redirect_slashes=False)
    error_responses.install(app)
    app.add_middleware(Authentication, access=access or Access(), clock=clock)
    app.add_middleware(OriginCheck, origins=settings.cors_origins, hosts=settings.hosts)
    app.add_middleware(RequestIdMiddleware, new_request_id=new_request_id, echo_request_id=echo_request_id)
    if settings.cors_origins:
        # Added last, so outermost: a page must be able to read our own failures too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    decoder = decoder or PictureDecoder(max_pixels=settings.max_image_pixels, limit_s=settings.decode_timeout_s)
    app.state.services = Services(gateway, settings, request_timeout_s, decoder, now)
    for routed in (status, inference, images, models, registry, adapter_pictures, usage, document, pages):
        # Not `include_router`: that hides the routes, and access is decided by them.
        app.router.routes.extend(routed.router.routes)
    return app
