"""The interface of the service behind the HTTP layer, and how a route gets it.

Owns the interface alone; `serve_app.deployments` implements it, tests give it a fake.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends
from starlette.requests import Request

from serve_app.api.pictures.decoder import PictureDecoder
from serve_app.catalog.pictures import Shrink
from serve_app.catalog.replica_report import (
    BaseState,
    DayUsage,
    LoraReport,
    ModelInfo,
    Preloaded,
    Removal,
    ReplicaReport,
)
from serve_app.catalog.resolving.aliases import Alias
from serve_app.config import BaseModelConfig, IngressSettings
from serve_app.core import GenerationEvent, GenerationResult, HubToken, UnresolvedRequest
from serve_app.settings import Canary


class Registry(Protocol):
    """Reads adapters, aliases, replicas and bases, and changes the first two.

    `token` is the caller's own for the Hub; an adapter that only it may read is shown to its owner alone.
    """

    def bases(self) -> tuple[BaseModelConfig, ...]:
        """Return the bases that are served."""
        ...

    def default_base(self) -> BaseModelConfig:
        """Return the base that serves a request which names none."""
        ...

    def canaries(self) -> Mapping[str, Canary]:
        """Return the canaries, by the bases some of whose requests they draw."""
        ...

    async def states(self) -> Mapping[str, BaseState]:
        """Return what each base does, by id; answered in milliseconds."""
        ...

    async def usage(self, since: str) -> tuple[DayUsage, ...]:
        """Return what was drawn from a day (UTC, "2026-11-30") on, by day, key and base.

        Raises:
            LoraplexError: it cannot be read now.
        """
        ...

    async def loras(self, *, token: HubToken | None) -> tuple[LoraReport, ...]:
        """Return the adapters known so far and the aliases, sorted by id; a replica that hangs delays it by no more
        than a second."""
        ...

    async def lora(self, name: str, *, token: HubToken | None) -> LoraReport:
        """Return one adapter or alias.

        Raises:
            LoraplexError: the name cannot be resolved.
        """
        ...

    async def picture(self, name: str, shrink: Shrink, *, token: HubToken | None) -> bytes | None:
        """Return the picture of an adapter or alias, made small by `shrink`; None where none comes with it and none was
        drawn.

        Raises:
            NoPicture: the picture that comes with it cannot be shown.
            LoraplexError: the name cannot be resolved.
        """
        ...

    async def keep_picture(self, name: str, picture: bytes, *, token: HubToken | None) -> None:
        """Keep a picture that was drawn with an adapter; raises as `picture` does."""
        ...

    async def replicas(self, *, token: HubToken | None) -> tuple[ReplicaReport, ...]:
        """Return the replicas of every base, each with those of its adapters that the caller may know of; one that
        hangs is there without its details."""
        ...

    async def add_alias(self, alias: Alias, *, may_replace: bool, preload: int, token: HubToken | None) -> LoraReport:
        """Keep an alias whose target can be served, and have so many replicas fetch it.

        Raises:
            NameTaken: the name means something else.
            LoraplexError: the target cannot be resolved.
        """
        ...

    async def remove(self, name: str, *, token: HubToken | None) -> Removal:
        """Remove an alias, and have every replica forget the adapter once it is not in use.

        Raises:
            LoraplexError: the name cannot be resolved.
        """
        ...

    async def preload(self, name: str, replicas: int, *, token: HubToken | None) -> Preloaded:
        """Have so many replicas hold an adapter in memory.

        Raises:
            LoraplexError: it cannot be resolved or fetched.
        """
        ...


class Gateway(Protocol):
    """The service behind the HTTP layer; a call that is cancelled, or closed early, must free all that it held."""

    async def generate(self, unresolved: UnresolvedRequest, *, request_id: str) -> GenerationResult:
        """Return the images of a request.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        ...

    def stream(self, unresolved: UnresolvedRequest, *, request_id: str) -> AsyncGenerator[GenerationEvent]:
        """Yield what becomes of a request: first `Accepted`, soon after all that can be checked early has been, last
        the result.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        ...

    @property
    def registry(self) -> Registry:
        """Information on adapters, replicas and bases."""
        ...

    async def is_ready(self) -> bool:
        """Whether the bases that must run do; answered in milliseconds."""
        ...

    async def models(self) -> tuple[ModelInfo, ...]:
        """Return the bases that are served and the adapters known so far."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The dependencies of every route; `now` is in seconds since 1970.

    `drawing_picture` is held while the picture of an adapter is drawn, one at a time.
    """

    gateway: Gateway
    settings: IngressSettings
    request_timeout_s: float
    decoder: PictureDecoder
    now: Callable[[], float]
    drawing_picture: asyncio.Lock = field(default_factory=asyncio.Lock)


def _services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(_services_of)]
"""A route's parameter of this type is given the services of its application."""
