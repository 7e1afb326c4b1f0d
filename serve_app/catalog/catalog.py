"""From the names in a request to one base and resolved adapters.

Owns what is known of every adapter, for how long, and for whom. Finding things out is
`reading.inspector`, remembering them `resolving.lookups`, and who may be combined with whom
`resolving.compatibility`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from serve_app.catalog.reading.bases import BaseArchitectureReader
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.inspector import AdapterInfo, AdapterInspector
from serve_app.catalog.reading.repository import EMBEDDED, FOLDER, HUB, AdapterSource, is_valid_id
from serve_app.catalog.replica_report import KnownAdapter
from serve_app.catalog.resolving.access import CallerAccess
from serve_app.catalog.resolving.aliases import told_as
from serve_app.catalog.resolving.compatibility import check_distinct, check_named, check_words, common_base, spec_on
from serve_app.catalog.resolving.lookups import SingleFlightCache
from serve_app.catalog.sources.folder import FolderSource
from serve_app.catalog.sources.hub import HubSource
from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.core import AdapterRef, AdapterSpec, HubToken, ScaledAdapter
from serve_app.errors import AccessDenied, HubUnavailable, LoraplexError, ModelNotFound
from serve_app.refusals import NotAnAdapter
from serve_app.settings import nearest

# A folder is cheap to look at again, and people edit it in place.
LOCAL_TTL_S = 2.0
LISTED_AT_ONCE = 8
# Comparing takes half a millisecond for ten names.
MAX_COMPARED = 300
# What clients of OpenAI's shape ask for where nobody tells them otherwise.
CLIENTS_OWN_MODELS = ("gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "dall-e-2", "dall-e-3")


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a request means: one served base, and its adapters in their fixed order of application.

    `is_private` says that an adapter could be read with the caller's own token alone.
    """

    base: BaseModelConfig
    adapters: tuple[ScaledAdapter, ...]
    is_private: bool = False


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    revision: str | None
    filename: str | None


@dataclass(frozen=True, slots=True)
class _ResolvedAdapter:
    finding: AdapterInfo
    is_private: bool = False


class Catalog:
    """Resolves model ids; shared by all requests of one process.

    What is known stays known while the Hub is away; each id is looked up once, however many ask.
    """

    def __init__(
        self,
        config: AppConfig,
        repositories: Sequence[AdapterSource],
        *,
        clock: Callable[[], float],
        resolve_alias: Callable[[AdapterRef], AdapterRef] = lambda ref: ref,
        on_access_check: Callable[[str], None] = lambda _: None,
        counting_unknown: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Know nothing yet.

        Args:
            config: The bases, and for how long answers are kept.
            repositories: Where adapters lie, in the order in which they are asked.
            clock: Monotonic seconds.
            resolve_alias: Replaces an alias by what it stands for; any other name is itself.
            on_access_check: Told how each check of a caller's access ended.
            counting_unknown: Entered around each look-up of a name that nothing is known of, on behalf of whoever asks.
        """
        self._counting_unknown = counting_unknown
        self._config = config
        self._resolve_alias = resolve_alias
        self._local_ttl_s = min(LOCAL_TTL_S, config.adapters.resolution_ttl_s)
        self._sources = [source for source in repositories if source.origin != EMBEDDED or config.adapters.embedded]
        failure_ttl_s = config.adapters.failure_ttl_s
        self._cards: SingleFlightCache[str, Card | None] = SingleFlightCache(
            self._look_up_card,
            ttl_s_of=lambda _: config.adapters.resolution_ttl_s,
            failure_ttl_s=failure_ttl_s,
            clock=clock,
        )
        self._findings: SingleFlightCache[_Key, AdapterInfo] = SingleFlightCache(
            self._look_up, ttl_s_of=self._ttl_s, failure_ttl_s=failure_ttl_s, clock=clock
        )
        facts = BaseArchitectureReader(repositories, clock)
        self._access: CallerAccess[_Key, AdapterInfo] | None = None
        hub = next((source for source in self._sources if isinstance(source, HubSource)), None)
        if config.adapters.hub.forward_tokens and hub is not None:
            self._sources = [hub.read_as(None) if source is hub else source for source in self._sources]

            async def examine_as(key: _Key, token: HubToken) -> AdapterInfo:
                examiner = AdapterInspector(config.bases, (hub.read_as(token),), facts, self._cards.get)
                return await examiner.examine(key.id, key.revision, key.filename)

            self._access = CallerAccess(
                examine_as,
                access_ttl_s=config.adapters.hub.access_ttl_s,
                failure_ttl_s=failure_ttl_s,
                clock=clock,
                on_check=on_access_check,
            )
        self._examiner = AdapterInspector(config.bases, self._sources, facts, self._cards.get)

    def served(self) -> tuple[BaseModelConfig, ...]:
        """Return every configured base."""
        return self._config.bases

    def default(self) -> BaseModelConfig:
        """Return the base that serves a request which names none."""
        return self._config.default

    async def resolve(
        self, model: str | None, adapters: tuple[AdapterRef, ...], *, token: HubToken | None = None
    ) -> Resolution:
        """Return the base and adapters that a request names.

        `model` is a base, an adapter (which then serves on its own base, with the further `adapters`), or
        None: then the adapters' own base serves, or the default one where there are none. `token` is the caller's own.

        Raises:
            MalformedRequest: an adapter is named twice, the adapters are for different bases, or several bring words.
            OutOfBounds: more adapters than any base takes.
            BaseMismatch: an adapter is for another base than the one that is named.
            LoraplexError: whatever `adapter` raises.
        """
        named = self._config.base(model) if model is not None else None
        asked = (AdapterRef(model), *adapters) if model is not None and named is None else adapters
        refs = tuple(ref if self._config.base(ref.id) is not None else self._resolve_alias(ref) for ref in asked)
        check_named(refs, self._config)
        # Each look-up is shared and goes on by itself; the first fault in the request's order is reported.
        outcomes = await asyncio.gather(
            *(self._found_as(named.id, ref, token) for ref, named in zip(refs, asked, strict=True)),
            return_exceptions=True,
        )
        findings: list[AdapterInfo] = []
        is_private = False
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            findings.append(outcome.finding)
            is_private = is_private or outcome.is_private
        check_distinct(asked, findings)
        base = named or common_base(findings, self._config)
        specs = [spec_on(finding, base, self._config) for finding in findings]
        check_words(specs)
        uses = [ScaledAdapter(spec, ref.scale) for spec, ref in zip(specs, refs, strict=True)]
        return Resolution(base, tuple(sorted(uses, key=lambda use: use.spec.key)), is_private)

    async def adapter(self, ref: AdapterRef, *, named_base: BaseModelConfig | None = None) -> AdapterSpec:
        """Return the file, the revision and the base of one adapter.

        Raises:
            ModelNotFound, AccessDenied, HubUnavailable: it cannot be read.
            RefusedAdapter: it is there but cannot be served; the subclass says why.
            BaseMismatch: it is for another base than `named_base`.
        """
        finding = await self._finding(ref)
        return spec_on(finding, named_base or common_base([finding], self._config), self._config)

    async def lookup_adapter(
        self, ref: AdapterRef, *, token: HubToken | None = None, is_listing: bool = False
    ) -> KnownAdapter:
        """Return one adapter on its own base, with what lists say of it; `token` is the caller's own. What is looked up
        for a list was not the caller's to choose, and is not counted.

        Raises:
            LoraplexError: whatever `adapter` raises.
        """
        finding = (await (self._seen if is_listing else self._found)(ref, token)).finding
        spec = spec_on(finding, common_base([finding], self._config), self._config)
        return KnownAdapter(spec, finding.header.max_rank)

    async def name_exists(self, name: str) -> bool:
        """Whether a name means an adapter or repository that anybody may know of."""
        try:
            await self._finding(AdapterRef(name))
        except (ModelNotFound, HubUnavailable):
            return False
        except LoraplexError:
            return True
        return True

    async def known_adapters(self) -> tuple[AdapterSpec, ...]:
        """Return every adapter that can be listed or was resolved, sorted by id, each on its preferred
        base."""
        return tuple(known.spec for known in await self.known())

    async def known(self) -> tuple[KnownAdapter, ...]:
        """Return `known_adapters`, with what else lists say of each."""
        turn = asyncio.Semaphore(LISTED_AT_ONCE)

        async def look(model: str) -> None:
            async with turn:
                try:
                    await self._finding(AdapterRef(model))
                except LoraplexError:
                    return  # what cannot be served is not listed

        ids = {model for source in self._sources for model in await source.ids()}
        await asyncio.gather(*(look(model) for model in ids if self._config.base(model) is None))
        found: dict[str, KnownAdapter] = {}
        for finding in self._findings.values():
            base = self._config.base(next(iter(finding.placement.bases), ""))
            if base is not None:
                with contextlib.suppress(LoraplexError):
                    found.setdefault(finding.id, KnownAdapter(finding.spec_for(base), finding.header.max_rank))
        return tuple(found[model] for model in sorted(found))

    async def visible(self, models: Collection[str], token: HubToken | None) -> frozenset[str]:
        """Return those adapters that a caller may know of; `token` is its own."""
        if self._access is None:
            return frozenset(models)
        turn = asyncio.Semaphore(LISTED_AT_ONCE)

        async def is_visible(model: str) -> bool:
            async with turn:
                try:
                    await self._seen(AdapterRef(model), token)
                except (ModelNotFound, AccessDenied, HubUnavailable):
                    return False
                except LoraplexError:
                    return True  # it was seen, and refused for what it is
            return True

        names = list(models)
        seen = await asyncio.gather(*(is_visible(model) for model in names))
        return frozenset(model for model, is_so in zip(names, seen, strict=True) if is_so)

    async def _found_as(self, name: str, ref: AdapterRef, token: HubToken | None) -> _ResolvedAdapter:
        with told_as(name, ref.id):
            return await self._found(ref, token)

    async def _found(self, ref: AdapterRef, token: HubToken | None) -> _ResolvedAdapter:
        """Return an adapter that a caller named; a name that nothing is known of is counted."""
        if self._findings.knows(_Key(ref.id, ref.revision, ref.filename)) or not is_valid_id(ref.id):
            return await self._seen(ref, token)
        with self._counting_unknown():
            return await self._seen(ref, token)

    async def _seen(self, ref: AdapterRef, token: HubToken | None) -> _ResolvedAdapter:
        """Return an adapter as anybody sees it, else as the caller does."""
        try:
            return _ResolvedAdapter(await self._finding(ref))
        except (ModelNotFound, AccessDenied) as error:
            if self._access is None:
                raise
            refusal = error
        try:
            if token is None:
                raise refusal
            return _ResolvedAdapter(
                await self._access.get(_Key(ref.id, ref.revision, ref.filename), token), is_private=True
            )
        except AccessDenied as error:
            # Here it is not the service's own token that counts.
            raise AccessDenied(error.model, "the Hub token sent with the request") from None

    async def _finding(self, ref: AdapterRef) -> AdapterInfo:
        if self._config.base(ref.id) is not None:
            raise NotAnAdapter(ref.id, "it is a base model")
        return await self._findings.get(_Key(ref.id, ref.revision, ref.filename))

    async def _look_up(self, key: _Key) -> AdapterInfo:
        try:
            return await self._examiner.examine(key.id, key.revision, key.filename)
        except ModelNotFound as error:
            raise ModelNotFound(error.model, error.detail + await self._hint(key.id)) from None

    async def _hint(self, name: str) -> str:
        """Return what may have been meant: the nearest base or adapter that everybody may know of."""
        if name in CLIENTS_OWN_MODELS:
            return f"; a client that always asks for it needs 'aliases: [{name}]' at a base of the configuration"
        bases = [name for base in self._config.bases for name in base.names]
        listed = [model for source in self._sources for model in await source.ids()]
        known = [*bases, *listed, *(finding.id for finding in self._findings.values())]
        return nearest(name, known[:MAX_COMPARED])

    async def _look_up_card(self, model: str) -> Card | None:
        found = await self._examiner.find(model, None)
        return found[1].card if found is not None else None

    def _ttl_s(self, finding: AdapterInfo) -> float:
        return self._config.adapters.resolution_ttl_s if finding.origin == HUB else self._local_ttl_s


def build_sources(
    config: AppConfig, environment: Environment, *, embedded_root: Path | None
) -> tuple[AdapterSource, ...]:
    """Return the sources that a configuration names, in the order in which they are asked.

    The embedded source is there for the embedded bases even where its adapters are not served.
    """
    settings = config.adapters
    sources: list[AdapterSource] = []
    if embedded_root is not None:
        sources.append(FolderSource((embedded_root,), origin=EMBEDDED))
    if settings.folders:
        sources.append(FolderSource(settings.folders, origin=FOLDER))
    if settings.hub.enabled:
        endpoint = settings.hub.endpoint or environment.hub_endpoint
        token, cache_dir = environment.token, environment.cache_dir
        sources.append(HubSource(settings.hub, token=token, cache_dir=cache_dir, endpoint=endpoint))
    return tuple(sources)
