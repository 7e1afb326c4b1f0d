"""One request through the service: resolve, settle, dispatch.

Owns what the ingress does that needs no Ray; `serve_app.deployments.ingress` gives it the way to a replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Protocol

from serve_app.catalog.catalog import Catalog
from serve_app.core import Accepted, GenerationDraft, GenerationEvent, GenerationRequest, GenerationResult, ModelInfo
from serve_app.deployments.registry import ServiceRegistry
from serve_app.deployments.settle import settle
from serve_app.errors import LoraplexError

log = logging.getLogger(__name__)

# A stream begins no later than this after everything was checked that can be checked here. Until then the replica may
# still refuse, which reaches the caller as a status and not as an event.
FIRST_EVENT_S = 0.05


class Dispatch(Protocol):
    """The way to the replicas."""

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        """Return the result of one request."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yield the events of one request."""
        ...


class ServiceGateway:
    """What the HTTP layer talks to; every draw of a seed happens here, so that a retry gives the same image."""

    def __init__(
        self,
        catalog: Catalog,
        dispatch: Dispatch,
        *,
        registry: ServiceRegistry,
        draw_seed: Callable[[], int],
        can_serve: Callable[[], Awaitable[bool]],
        on_refusal: Callable[[str], None],
    ) -> None:
        self._catalog = catalog
        self._dispatch = dispatch
        self._registry = registry
        self._draw_seed = draw_seed
        self._can_serve = can_serve
        self._on_refusal = on_refusal

    async def generate(self, draft: GenerationDraft, *, request_id: str) -> GenerationResult:
        """Return the images of a draft.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        with self._refusals_noted(draft, request_id):
            return await self._dispatch(await self._settled(draft, request_id))

    async def stream(self, draft: GenerationDraft, *, request_id: str) -> AsyncGenerator[GenerationEvent]:
        """Yield what becomes of a draft: `Accepted` within `FIRST_EVENT_S` of its being settled, the result at the end.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        with self._refusals_noted(draft, request_id):
            request = await self._settled(draft, request_id)
            accepted = Accepted(request.base_id, request.seed, request.width, request.height, request.planned_steps)
            async with aclosing(self._dispatch.stream(request)) as events:
                first = asyncio.ensure_future(anext(events))
                try:
                    await asyncio.wait({first}, timeout=FIRST_EVENT_S)
                    if first.done():
                        first.result()
                    yield accepted
                    yield await first
                finally:
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)
                async for event in events:
                    yield event

    async def _settled(self, draft: GenerationDraft, request_id: str) -> GenerationRequest:
        resolution = await self._catalog.resolve(draft.model, draft.adapters, token=draft.hub_token)
        seed = self._draw_seed()
        request = settle(draft, resolution.base, resolution.adapters, request_id=request_id, seed=seed)
        # A caller's token goes no further than it is needed.
        return replace(request, hub_token=draft.hub_token) if resolution.is_private else request

    @contextmanager
    def _refusals_noted(self, draft: GenerationDraft, request_id: str) -> Iterator[None]:
        try:
            yield
        except LoraplexError as error:
            log.info("request %s for %s: %s (%s)", request_id, draft.model or "the default base", error, error.code)
            self._on_refusal(error.code)
            raise

    @property
    def registry(self) -> ServiceRegistry:
        """What is known of adapters, replicas and bases."""
        return self._registry

    async def is_ready(self) -> bool:
        """Whether any base can serve now."""
        return await self._can_serve()

    async def models(self) -> tuple[ModelInfo, ...]:
        """Return the bases that are served, the adapters known so far, and the aliases."""
        bases = [
            ModelInfo(id=base.id, base_id=None, owned_by=_owner(base.id), created=0) for base in self._catalog.served()
        ]
        adapters = [
            ModelInfo(id=spec.id, base_id=spec.base_id, owned_by=_owner(spec.id), created=0)
            for spec in await self._catalog.known_adapters()
        ]
        aliases = [
            ModelInfo(id=alias.name, base_id=known.spec.base_id, owned_by=_owner(known.spec.id), created=0)
            for alias, known in await self._registry.aliased()
        ]
        return (*bases, *adapters, *aliases)


def _owner(model: str) -> str:
    return model.split("/", 1)[0]
