"""From the names in a request to one base and resolved adapters.

Owns what is known of every adapter, for how long, and the rules of who may be combined with whom. Finding
things out is `serve_app.catalog.examination`; remembering them is `serve_app.catalog.lookups`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.catalog.bases import BaseFactsReader
from serve_app.catalog.card import Card
from serve_app.catalog.examination import Examiner, Finding
from serve_app.catalog.folder import FolderRepositories
from serve_app.catalog.hub import HubRepositories
from serve_app.catalog.lookups import SharedLookups
from serve_app.catalog.repository import EMBEDDED, FOLDER, HUB, Repositories
from serve_app.config import AppConfig, BaseModelConfig, nearest
from serve_app.core import AdapterRef, AdapterSpec, AdapterUse
from serve_app.errors import (
    BaseMismatch,
    LoraplexError,
    MalformedRequest,
    ModelNotFound,
    NotAnAdapter,
    OutOfBounds,
)

# A folder is cheap to look at again, and people edit it in place.
LOCAL_TTL_S = 2.0
LISTED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a request means: one served base, and its adapters in their fixed order of application."""

    base: BaseModelConfig
    adapters: tuple[AdapterUse, ...]


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    revision: str | None
    filename: str | None


class Catalog:
    """Resolves model ids; shared by all requests of one process.

    What is known stays known while the Hub is away; each id is looked up once, however many ask.
    """

    def __init__(self, config: AppConfig, repositories: Sequence[Repositories], *, clock: Callable[[], float]) -> None:
        self._config = config
        self._local_ttl_s = min(LOCAL_TTL_S, config.adapters.resolution_ttl_s)
        self._places = [place for place in repositories if place.origin != EMBEDDED or config.adapters.embedded]
        failure_ttl_s = config.adapters.failure_ttl_s
        self._cards: SharedLookups[str, Card | None] = SharedLookups(
            self._look_up_card,
            ttl_s_of=lambda _: config.adapters.resolution_ttl_s,
            failure_ttl_s=failure_ttl_s,
            clock=clock,
        )
        self._findings: SharedLookups[_Key, Finding] = SharedLookups(
            self._look_up, ttl_s_of=self._ttl_s, failure_ttl_s=failure_ttl_s, clock=clock
        )
        self._examiner = Examiner(config.bases, self._places, BaseFactsReader(repositories, clock), self._cards.get)

    def served(self) -> tuple[BaseModelConfig, ...]:
        """Return every configured base."""
        return self._config.bases

    async def resolve(self, model: str | None, adapters: tuple[AdapterRef, ...]) -> Resolution:
        """Return the base and adapters that a request names.

        `model` is a base, an adapter (which then serves on its own base, with the further `adapters`), or
        None: then the adapters' own base serves, or the default one where there are none.

        Raises:
            MalformedRequest: an adapter is named twice, the adapters are for different bases, or several bring words.
            OutOfBounds: more adapters than any base takes.
            BaseMismatch: an adapter is for another base than the one that is named.
            LoraplexError: whatever `adapter` raises.
        """
        named = self._config.base(model) if model is not None else None
        refs = (AdapterRef(model), *adapters) if model is not None and named is None else adapters
        self._check(refs)
        # Each look-up is shared and goes on by itself; the first fault in the request's order is reported.
        outcomes = await asyncio.gather(*(self._finding(ref) for ref in refs), return_exceptions=True)
        findings: list[Finding] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            findings.append(outcome)
        base = named or self._common_base(findings)
        specs = [self._spec(finding, base) for finding in findings]
        _check_words(specs)
        uses = [AdapterUse(spec, ref.scale) for spec, ref in zip(specs, refs, strict=True)]
        return Resolution(base, tuple(sorted(uses, key=lambda use: use.spec.key)))

    async def adapter(self, ref: AdapterRef, *, named_base: BaseModelConfig | None = None) -> AdapterSpec:
        """Return the file, the revision and the base of one adapter.

        Raises:
            ModelNotFound, AccessDenied, HubUnavailable: it cannot be read.
            RefusedAdapter: it is there but cannot be served; the subclass says why.
            BaseMismatch: it is for another base than `named_base`.
        """
        finding = await self._finding(ref)
        return self._spec(finding, named_base or self._common_base([finding]))

    async def known_adapters(self) -> tuple[AdapterSpec, ...]:
        """Return every adapter that can be listed or was resolved, sorted by id, each on its preferred
        base."""
        turn = asyncio.Semaphore(LISTED_AT_ONCE)

        async def look(model: str) -> None:
            async with turn:
                try:
                    await self._finding(AdapterRef(model))
                except LoraplexError:
                    return  # what cannot be served is not listed

        ids = {model for place in self._places for model in await place.ids()}
        await asyncio.gather(*(look(model) for model in ids if self._config.base(model) is None))
        specs: dict[str, AdapterSpec] = {}
        for finding in self._findings.values():
            base = self._config.base(next(iter(finding.placement.bases), ""))
            if base is not None:
                with contextlib.suppress(LoraplexError):
                    specs.setdefault(finding.id, finding.spec_for(base))
        return tuple(specs[model] for model in sorted(specs))

    def _check(self, refs: tuple[AdapterRef, ...]) -> None:
        most = max(base.limits.max_adapters for base in self._config.bases)
        if len(refs) > most:
            raise OutOfBounds("loras", f"{len(refs)} adapters", f"at most {most}")
        named: set[tuple[str, str | None, str | None]] = set()
        for ref in refs:
            key = (ref.id.casefold(), ref.revision, ref.filename)
            if key in named:
                raise MalformedRequest(f"adapter {ref.id} is named twice; name it once, with the scale it should have")
            named.add(key)

    async def _finding(self, ref: AdapterRef) -> Finding:
        if self._config.base(ref.id) is not None:
            raise NotAnAdapter(ref.id, "it is a base model")
        return await self._findings.get(_Key(ref.id, ref.revision, ref.filename))

    async def _look_up(self, key: _Key) -> Finding:
        try:
            return await self._examiner.examine(key.id, key.revision, key.filename)
        except ModelNotFound as error:
            hint = nearest(key.id, [name for base in self._config.bases for name in base.names])
            raise ModelNotFound(error.model, error.detail + hint) from None

    async def _look_up_card(self, model: str) -> Card | None:
        found = await self._examiner.find(model, None)
        return found[1].card if found is not None else None

    def _ttl_s(self, finding: Finding) -> float:
        return self._config.adapters.resolution_ttl_s if finding.origin == HUB else self._local_ttl_s

    def _spec(self, finding: Finding, base: BaseModelConfig) -> AdapterSpec:
        finding.require_served(self._served_ids())
        if base.id not in finding.placement.bases:
            raise BaseMismatch(finding.id, finding.placement.made_for, base.id)
        return finding.spec_for(base)

    def _common_base(self, findings: Sequence[Finding]) -> BaseModelConfig:
        """Return the base that serves all the adapters of a request that names none."""
        if not findings:
            return self._config.default
        for finding in findings:
            finding.require_served(self._served_ids())
        certain = [finding for finding in findings if not finding.placement.is_ambiguous]
        leading = certain[0] if certain else findings[0]
        common = [
            base
            for base_id in leading.placement.bases
            if all(base_id in finding.placement.bases for finding in findings)
            and (base := self._config.base(base_id)) is not None
        ]
        if not common:
            raise _cannot_combine(leading, findings)
        if not certain and len(common) > 1:
            raise leading.ambiguity()
        return common[0]

    def _served_ids(self) -> list[str]:
        return [base.id for base in self._config.bases]


def _check_words(specs: Sequence[AdapterSpec]) -> None:
    teaching = [spec.id for spec in specs if spec.embeddings is not None]
    if len(teaching) > 1:
        raise MalformedRequest(
            f"adapters {' and '.join(teaching)} each bring words of their own, all called <s0>, <s1>, ...; "
            "name only one of them in a request"
        )


def _cannot_combine(leading: Finding, findings: Sequence[Finding]) -> MalformedRequest:
    mine = leading.placement
    other = next(f for f in findings if not set(mine.bases) & set(f.placement.bases) or f is findings[-1])
    return MalformedRequest(
        f"adapter {leading.id} is for {mine.made_for}, but adapter {other.id} is for "
        f"{other.placement.made_for}: they cannot be combined"
    )


def build_repositories(
    config: AppConfig,
    *,
    token: str | None,
    embedded_root: Path | None,
    cache_dir: Path,
    endpoint: str | None = None,
) -> tuple[Repositories, ...]:
    """Return the places that a configuration names, in the order in which they are asked.

    `endpoint` is the Hub's, where the environment names one and the configuration does not. The embedded
    place is there for the embedded bases even where its adapters are not served.
    """
    sources = config.adapters
    places: list[Repositories] = []
    if embedded_root is not None:
        places.append(FolderRepositories((embedded_root,), origin=EMBEDDED))
    if sources.folders:
        places.append(FolderRepositories(sources.folders, origin=FOLDER))
    if sources.hub.enabled:
        hub_endpoint = sources.hub.endpoint or endpoint
        places.append(HubRepositories(sources.hub, token=token, cache_dir=cache_dir, endpoint=hub_endpoint))
    return tuple(places)
