"""One request through the service: resolve, settle, dispatch.

Owns what the ingress does that needs no Ray; `serve_app.deployments.ingress.dispatcher` is the way to a replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from serve_app.catalog.catalog import Catalog, Resolution
from serve_app.catalog.replica_report import ModelInfo
from serve_app.config import BaseModelConfig
from serve_app.core import (
    Accepted,
    AdapterRef,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    PromptSyntax,
    UnresolvedRequest,
)
from serve_app.deployments.ingress.adapter_defaults import resolve_with_adapters
from serve_app.deployments.ingress.canaries import Canaries
from serve_app.deployments.registry.registry import ServiceRegistry
from serve_app.errors import LoraplexError
from serve_app.observability.tracing import request_span, span
from serve_app.prompt_syntax import with_prompt_adapters

log = logging.getLogger(__name__)

# A stream begins no later than this after everything was checked that can be checked here. Until then the replica may
# still refuse, which reaches the caller as a status and not as an event.
FIRST_EVENT_S = 0.05
# Called with the name of the caller's key, None without one.
OnDrawn = Callable[["str | None", GenerationRequest, GenerationResult], None]


class Dispatch(Protocol):
    """The way to the replicas."""

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        """Return the result of one request."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yield the events of one request."""
        ...


@dataclass(slots=True)
class _Case:
    """The facts of a request for the log line on its failure; never its prompt."""

    unresolved: UnresolvedRequest
    resolution: Resolution | None = None

    @property
    def base(self) -> str:
        if self.resolution is not None:
            return self.resolution.base.id
        return f"not known yet, asked for {self.unresolved.model or 'the default'}"

    @property
    def adapters(self) -> list[str]:
        if self.resolution is not None:
            return [use.spec.id for use in self.resolution.adapters]
        return [ref.id for ref in self.unresolved.adapters]


class ServiceGateway:
    """The gateway of the HTTP layer; every draw of a seed happens here, so that a retry gives the same image."""

    def __init__(
        self,
        catalog: Catalog,
        dispatch: Dispatch,
        *,
        registry: ServiceRegistry,
        draw_seed: Callable[[], int],
        is_ready: Callable[[], Awaitable[bool]],
        canaries: Canaries,
        on_refusal: Callable[[str], None],
        on_drawn: OnDrawn = lambda key, request, result: None,
        weight_of: Callable[[str | None], float] = lambda key: 1.0,
        prompt_syntax_of: Callable[[str | None], PromptSyntax | None] = lambda key: None,
    ) -> None:
        self._catalog = catalog
        self._dispatch = dispatch
        self._registry = registry
        self._draw_seed = draw_seed
        self._is_ready = is_ready
        self._canaries = canaries
        self._on_refusal = on_refusal
        self._on_drawn = on_drawn
        self._weight_of = weight_of
        self._prompt_syntax_of = prompt_syntax_of

    async def generate(self, unresolved: UnresolvedRequest, *, request_id: str) -> GenerationResult:
        """Return the images of a request.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        with self._refusals_noted(unresolved, request_id) as case:
            request = await self._settled(unresolved, request_id, case)
            result = await self._dispatch(request)
            self._on_drawn(unresolved.key, request, result)
            return result

    async def stream(self, unresolved: UnresolvedRequest, *, request_id: str) -> AsyncGenerator[GenerationEvent]:
        """Yield what becomes of a request: `Accepted` within `FIRST_EVENT_S` of its defaults, last the result.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        with self._refusals_noted(unresolved, request_id) as case:
            request = await self._settled(unresolved, request_id, case)
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
                    if isinstance(event, GenerationResult):
                        self._on_drawn(unresolved.key, request, event)
                    yield event

    async def _settled(self, unresolved: UnresolvedRequest, request_id: str, case: _Case) -> GenerationRequest:
        with span("resolve", request_span().context):
            unresolved, resolution = await self._resolved(unresolved)
        case.resolution = resolution
        seed = self._draw_seed()
        request = await self._with_defaults(unresolved, resolution, request_id, seed)
        canary = await self._canaries.instead_of(resolution.base, seed=request.seed, prompt=request.prompt)
        if canary is not None:
            try:
                drawn = await self._resolve(_naming(canary, unresolved, resolution))
                request = await self._with_defaults(unresolved, drawn, request_id, seed)
                case.resolution = resolution = drawn
            except LoraplexError as error:  # the caller asked for the base, which takes the request
                log.info("request %s is not drawn by the canary %s: %s", request_id, canary.id, error)
        # A caller's token goes no further than it is needed.
        token = unresolved.hub_token if resolution.is_private else None
        request = replace(request, share_weight=self._weight_of(unresolved.key), hub_token=token)
        request_span().describe(request)
        return request_span().carried_by(request)

    async def _with_defaults(
        self, unresolved: UnresolvedRequest, resolution: Resolution, request_id: str, seed: int
    ) -> GenerationRequest:
        family = await self._catalog.family(resolution.base)
        return resolve_with_adapters(unresolved, resolution, request_id=request_id, seed=seed, family=family)

    async def _resolved(self, unresolved: UnresolvedRequest) -> tuple[UnresolvedRequest, Resolution]:
        """Return the request with its syntax known and the adapters of its prompt among its own, and what they are."""
        syntax = unresolved.prompt_syntax or self._prompt_syntax_of(unresolved.key)
        draft = with_prompt_adapters(unresolved, syntax or "plain")
        resolution = await self._resolve(draft)
        if syntax is not None or resolution.base.prompt_syntax == "plain":
            return draft, resolution
        # The base decides the syntax, so the adapters in its prompt must not change the base.
        named = replace(unresolved, model=unresolved.model or resolution.base.id)
        draft = with_prompt_adapters(named, resolution.base.prompt_syntax)
        return draft, resolution if draft.adapters == unresolved.adapters else await self._resolve(draft)

    async def _resolve(self, draft: UnresolvedRequest) -> Resolution:
        return await self._catalog.resolve(draft.model, draft.adapters, token=draft.hub_token)

    @contextmanager
    def _refusals_noted(self, unresolved: UnresolvedRequest, request_id: str) -> Iterator[_Case]:
        case = _Case(unresolved)
        try:
            yield case
        except LoraplexError as error:
            log.info(
                "request %s with key %s failed: %s (%s); base %s, adapters %s",
                request_id, unresolved.key or "none", error, error.code, case.base, ", ".join(case.adapters) or "none",
            )  # fmt: skip
            self._on_refusal(error.code)
            request_span().refuse(error)
            raise

    @property
    def registry(self) -> ServiceRegistry:
        """Information on adapters, replicas and bases."""
        return self._registry

    async def is_ready(self) -> bool:
        """Whether the bases that must run do."""
        return await self._is_ready()

    async def models(self) -> tuple[ModelInfo, ...]:
        """Return the bases that are served, the adapters known so far, and the aliases."""
        bases = [
            ModelInfo(id=base.id, base_id=None, owned_by=_owner(base.id), created=0) for base in self._catalog.served()
        ]
        adapters = [
            ModelInfo(id=known.spec.id, base_id=known.spec.base_id, owned_by=_owner(known.spec.id), created=0)
            for known in await self._catalog.known()
        ]
        aliases = [
            ModelInfo(id=alias.name, base_id=known.spec.base_id, owned_by=_owner(known.spec.id), created=0)
            for alias, known in await self._registry.aliased()
        ]
        return (*bases, *adapters, *aliases)


def _naming(canary: BaseModelConfig, draft: UnresolvedRequest, resolution: Resolution) -> UnresolvedRequest:
    """Return a request with a canary in place of its base; the adapter that it may name instead stays."""
    if draft.model is None or draft.model in resolution.base.names:
        return replace(draft, model=canary.id)
    return replace(draft, model=canary.id, adapters=(AdapterRef(draft.model), *draft.adapters))


def _owner(model: str) -> str:
    return model.split("/", 1)[0]
