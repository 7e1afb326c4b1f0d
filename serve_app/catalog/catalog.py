"""From the names in a request to one base and resolved adapters.

Owns which answers about adapters are cached, for how long and for whom. `reading.inspector` finds the answers,
`resolving.lookups` caches them, and `resolving.compatibility` decides which adapters go together.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.catalog.reading.bases import BaseArchitectureReader, BaseFamilies
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.inspector import AdapterInfo, AdapterInspector
from serve_app.catalog.reading.repository import EMBEDDED, FOLDER, HUB, AdapterSource, is_valid_name
from serve_app.catalog.replica_report import KnownAdapter
from serve_app.catalog.resolving.access import CallerAccess
from serve_app.catalog.resolving.aliases import told_as
from serve_app.catalog.resolving.background_index import BackgroundIndex
from serve_app.catalog.resolving.combined_defaults import combined_defaults, scale_for, with_defaults
from serve_app.catalog.resolving.compatibility import check_distinct, check_named, check_ti_tokens, common_base, spec_on
from serve_app.catalog.resolving.lookups import CachePolicy, SingleFlightCache
from serve_app.catalog.sources.file_digests import FileDigests
from serve_app.catalog.sources.flat_folder import FlatFolderSource, FlatRoot
from serve_app.catalog.sources.folder import FolderSource
from serve_app.catalog.sources.hub import HubSource
from serve_app.catalog.sources.object_stores import ObjectStoreSource
from serve_app.config import AppConfig, BaseModelConfig, Environment, SharedSettings
from serve_app.core import AdapterRef, AdapterSpec, HubToken, ScaledAdapter
from serve_app.errors import AccessDenied, BaseRemoved, HubUnavailable, LoraplexError, ModelNotFound, StoreAccessDenied
from serve_app.families.family import Family
from serve_app.refusals import NotAnAdapter
from serve_app.settings import Canary, nearest
from serve_app.source_settings import AdapterFolder

# Folders are cheap to read again, and people edit them in place.
LOCAL_TTL_S = 2.0
LISTED_AT_ONCE = 8
INDEX_WAIT_S = 0.5
# Comparing takes half a millisecond for ten names.
MAX_COMPARED = 300
# How the model names begin that OpenAI clients ask for by default.
CLIENTS_OWN_MODELS = ("gpt-image-", "dall-e-")


@dataclass(frozen=True, slots=True)
class Resolution:
    """A resolved request: one served base, and its adapters in their fixed order of application.

    `defaults` are those of the adapters together. `is_private` says that an adapter could only be read with the
    caller's own token.
    """

    base: BaseModelConfig
    adapters: tuple[ScaledAdapter, ...]
    defaults: AdapterDefaults = NO_DEFAULTS
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

    One look-up of an id serves all requests that wait for it. Known answers stay in use while the Hub is unavailable.
    """

    def __init__(
        self,
        config: AppConfig,
        sources: Sequence[AdapterSource],
        *,
        clock: Callable[[], float],
        resolve_alias: Callable[[AdapterRef], AdapterRef] = lambda ref: ref,
        on_access_check: Callable[[str], None] = lambda _: None,
        counting_unknown: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
        was_base: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Start with empty caches.

        Args:
            config: The bases, and how long answers are cached.
            sources: The sources of adapters, in the order in which they are asked.
            clock: Monotonic seconds.
            resolve_alias: Replaces an alias by its target and returns any other name unchanged.
            on_access_check: Called with the outcome of each check of a caller's access.
            counting_unknown: Entered around each look-up of an unknown id on behalf of a caller.
            was_base: Whether a name means a base that is served, or once did.
        """
        self._was_base = was_base
        self._counting_unknown = counting_unknown
        self._config = config
        self._resolve_alias = resolve_alias
        settings = config.adapters
        self._sources = [source for source in sources if source.origin != EMBEDDED or settings.embedded]
        self._cards: SingleFlightCache[str, Card | None] = SingleFlightCache(
            CachePolicy(lambda _: settings.resolution_ttl_s, settings.failure_ttl_s), clock=clock
        )
        self._infos: SingleFlightCache[_Key, AdapterInfo] = SingleFlightCache(
            CachePolicy(self._ttl_s, settings.failure_ttl_s), clock=clock
        )
        architectures = BaseArchitectureReader(sources, clock)
        self._access: CallerAccess[_Key, AdapterInfo] | None = None
        hub = next((source for source in self._sources if isinstance(source, HubSource)), None)
        if settings.hub.forward_tokens and hub is not None:
            self._sources = [hub.read_as(None) if source is hub else source for source in self._sources]

            async def inspect_as(key: _Key, token: HubToken) -> AdapterInfo:
                inspector = AdapterInspector(config, (hub.read_as(token),), architectures, self._card)
                return await inspector.inspect(key.id, key.revision, key.filename)

            self._access = CallerAccess(
                inspect_as,
                access_ttl_s=settings.hub.access_ttl_s,
                failure_ttl_s=settings.failure_ttl_s,
                clock=clock,
                on_check=on_access_check,
            )
        self._inspector = AdapterInspector(config, self._sources, architectures, self._card)
        self._families = BaseFamilies(architectures)
        self._index = BackgroundIndex(self._sources, self._refresh)

    def served(self) -> tuple[BaseModelConfig, ...]:
        """Return every configured base."""
        return self._config.bases

    def default(self) -> BaseModelConfig:
        """Return the base for requests that name none."""
        return self._config.default

    def canaries(self) -> Mapping[str, Canary]:
        """Return the canaries, by the bases some of whose requests they draw."""
        return self._config.canaries

    async def family(self, base: BaseModelConfig) -> Family | None:
        """Return the family of a base, None while its files are not read."""
        return await self._families.of(base)

    async def resolve(
        self, model: str | None, adapters: tuple[AdapterRef, ...], *, token: HubToken | None = None
    ) -> Resolution:
        """Return the base and adapters that a request names.

        `model` is a base, an adapter (used on its own base together with `adapters`), or None: then the base is that
        of the adapters, or the default one if there are none. `token` is the caller's own.

        Raises:
            MalformedRequest: an adapter is named twice, the adapters are for different bases, or several have tokens.
            OutOfBounds: more adapters than any base accepts.
            BaseMismatch: an adapter is for another base than the one that is named.
            LoraplexError: as for `lookup_adapter`.
        """
        named = self._config.base(model) if model is not None else None
        asked = (AdapterRef(model), *adapters) if model is not None and named is None else adapters
        refs = tuple(ref if self._config.base(ref.id) is not None else self._resolve_alias(ref) for ref in asked)
        check_named(refs, self._config)
        # Look-ups are shared and run to their end; the first error in the order of the request is raised.
        outcomes = await asyncio.gather(
            *(self._named(named.id, ref, token) for ref, named in zip(refs, asked, strict=True)),
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
        specs = [
            with_defaults(spec_on(finding, base, self._config), ref)
            for finding, ref in zip(findings, refs, strict=True)
        ]
        check_ti_tokens(specs)
        uses = [
            ScaledAdapter(spec, scale_for(spec, ref), named.id)
            for spec, ref, named in zip(specs, refs, asked, strict=True)
        ]
        return Resolution(
            base,
            tuple(sorted(uses, key=lambda use: use.spec.key)),
            combined_defaults([spec.defaults for spec in specs]),
            is_private,
        )

    async def adapter(self, ref: AdapterRef) -> AdapterSpec:
        """Return an adapter on its own base; raises as `lookup_adapter` does."""
        return (await self.lookup_adapter(ref)).spec

    async def lookup_adapter(
        self, ref: AdapterRef, *, token: HubToken | None = None, is_listing: bool = False
    ) -> KnownAdapter:
        """Return an adapter on its own base, with the facts that lists show; `token` is the caller's own.

        An unknown id is counted against the caller, unless it is looked up for a list.

        Raises:
            ModelNotFound, AccessDenied, HubUnavailable: it cannot be read.
            BaseRemoved: it is a base that was served.
            RefusedAdapter: it exists but cannot be served; the subclass says why.
        """
        info = (await (self._found(ref, token) if is_listing else self._counted(ref, token))).finding
        spec = spec_on(info, common_base([info], self._config), self._config)
        return _known(info, with_defaults(spec, ref))

    async def located(self, ref: AdapterRef, *, token: HubToken | None = None) -> tuple[AdapterInfo, AdapterSource]:
        """Return an adapter, and the source whose files of it the caller may read; raises as `lookup_adapter` does."""
        found = await self._counted(ref, token)
        source = next(source for source in self._sources if source.origin == found.finding.origin)
        if found.is_private and isinstance(source, HubSource):
            source = source.read_as(token)
        return found.finding, source

    async def name_exists(self, name: str) -> bool:
        """Whether a name belongs to an adapter or repository that is known to exist; may call the Hub."""
        return await self._exists(name, None, missing=(ModelNotFound, HubUnavailable))

    async def known(self, *, wait_s: float | None = INDEX_WAIT_S) -> tuple[KnownAdapter, ...]:
        """Return the adapters that can be listed or were resolved, sorted by id, each on its preferred base.

        Those of flat folders and object stores are looked up in the background: they appear as they become known, and
        this waits at most `wait_s` for them, or with None until all are.
        """
        listed = {model for source in self._sources for model in await source.ids()}
        # Fills the cache; adapters that are refused are not listed.
        await self._readable([model for model in listed if self._config.base(model) is None], None)
        await self._index.refresh(wait_s)
        found: dict[str, KnownAdapter] = {}
        for info in self._infos.values():
            if self._index.is_gone(info.origin, info.id):
                continue
            base = self._config.base(next(iter(info.base_match.bases), ""))
            if base is not None:
                with contextlib.suppress(LoraplexError):
                    found.setdefault(info.id, _known(info, info.spec_for(base)))
        return tuple(found[model] for model in sorted(found))

    async def visible(self, models: Collection[str], token: HubToken | None) -> frozenset[str]:
        """Return those of some adapters that a caller may know of; `token` is its own."""
        return frozenset(models) if self._access is None else await self._readable(models, token)

    async def _readable(self, models: Collection[str], token: HubToken | None) -> frozenset[str]:
        limit = asyncio.Semaphore(LISTED_AT_ONCE)

        async def look(model: str) -> bool:
            async with limit:
                return await self._exists(model, token, missing=(ModelNotFound, AccessDenied, HubUnavailable))

        names = list(models)
        seen = await asyncio.gather(*(look(model) for model in names))
        return frozenset(itertools.compress(names, seen))

    async def _exists(self, model: str, token: HubToken | None, *, missing: tuple[type[LoraplexError], ...]) -> bool:
        """Whether an adapter is found; one that is found but refused counts, except for the errors in `missing`."""
        try:
            await self._found(AdapterRef(model), token)
        except LoraplexError as error:
            return not isinstance(error, missing)
        return True

    async def _named(self, name: str, ref: AdapterRef, token: HubToken | None) -> _ResolvedAdapter:
        with told_as(name, ref.id):
            return await self._counted(ref, token)

    async def _counted(self, ref: AdapterRef, token: HubToken | None) -> _ResolvedAdapter:
        """Return an adapter that a caller named; an unknown id is counted."""
        if (
            self._infos.knows(_Key(ref.id, ref.revision, ref.filename))
            or self._was_base(ref.id)
            or not is_valid_name(ref.id)
        ):
            return await self._found(ref, token)
        async with self._counting_unknown():
            return await self._found(ref, token)

    async def _found(self, ref: AdapterRef, token: HubToken | None) -> _ResolvedAdapter:
        """Return an adapter as seen without a token, or else as the caller sees it."""
        if self._config.base(ref.id) is not None:
            raise NotAnAdapter(ref.id, "it is a base model")
        if self._was_base(ref.id):
            raise BaseRemoved(ref.id, served=", ".join(base.id for base in self._config.bases))
        key = _Key(ref.id, ref.revision, ref.filename)
        try:
            return _ResolvedAdapter(await self._infos.get(key, lambda: self._inspect(key)))
        except (ModelNotFound, AccessDenied) as error:
            if self._access is None or isinstance(error, StoreAccessDenied):
                raise
            refusal = error
        try:
            if token is None:
                raise refusal
            return _ResolvedAdapter(await self._access.get(key, token), is_private=True)
        except AccessDenied as error:
            # Here the caller's token counts, not the service's.
            raise AccessDenied(error.model, "the Hub token sent with the request") from None

    async def _refresh(self, model: str) -> None:
        key = _Key(model, None, None)
        await self._infos.refresh(key, lambda: self._inspect(key))

    async def _inspect(self, key: _Key) -> AdapterInfo:
        try:
            return await self._inspector.inspect(key.id, key.revision, key.filename)
        except ModelNotFound as error:
            raise ModelNotFound(error.model, error.detail + await self._hint(key.id)) from None

    async def _hint(self, name: str) -> str:
        """Return what may have been meant: the nearest base or adapter that is public."""
        if name.startswith(CLIENTS_OWN_MODELS):
            return f"; a client that always asks for it needs 'aliases: [{name}]' at a base of the configuration"
        bases = [name for base in self._config.bases for name in base.names]
        listed = [model for source in self._sources for model in await source.ids()]
        known = [*bases, *listed, *self._index.ids, *(info.id for info in self._infos.values())]
        return nearest(name, known[:MAX_COMPARED])

    async def _card(self, model: str) -> Card | None:
        return await self._cards.get(model, lambda: self._look_up_card(model))

    async def _look_up_card(self, model: str) -> Card | None:
        found = await self._inspector.find(model, None)
        return found[1].card if found is not None else None

    def _ttl_s(self, info: AdapterInfo) -> float:
        ttl_s = self._config.adapters.resolution_ttl_s
        return ttl_s if info.origin == HUB else min(LOCAL_TTL_S, ttl_s)


def _known(info: AdapterInfo, spec: AdapterSpec) -> KnownAdapter:
    return KnownAdapter(spec, info.header.max_rank, info.picture is not None, info.example_prompt)


def build_sources(
    config: SharedSettings, environment: Environment, *, embedded_root: Path | None
) -> tuple[AdapterSource, ...]:
    """Return the sources of a configuration, in the order in which they are asked.

    The embedded source is always there, because embedded bases need it even if its adapters are not served.
    """
    settings = config.adapters
    sources: list[AdapterSource] = []
    if embedded_root is not None:
        sources.append(FolderSource((embedded_root,), origin=EMBEDDED))
    if settings.folders:
        roots = tuple(folder.path for folder in settings.folders if folder.layout == "hub")
        sources.append(FolderSource(roots, origin=FOLDER))
        digests = FileDigests(environment.cache_dir / "digests.sqlite3")
        sources.append(FlatFolderSource([_flat_root(folder) for folder in settings.folders], digests=digests))
    if settings.stores:
        sources.append(ObjectStoreSource(settings, cache_dir=environment.cache_dir))
    if settings.hub.enabled:
        endpoint = settings.hub.endpoint or environment.hub_endpoint
        token, cache_dir = environment.token, environment.cache_dir
        sources.append(HubSource(settings.hub, token=token, cache_dir=cache_dir, endpoint=endpoint))
    return tuple(sources)


def _flat_root(folder: AdapterFolder) -> FlatRoot:
    # Below `<owner>/<name>/` lie the files of repositories.
    return FlatRoot(folder.path, max_folders=1 if folder.layout == "hub" else None)
