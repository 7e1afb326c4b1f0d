"""One adapter looked at from all sides: repository, file, header, bases.

Owns the order of the questions (is it there, which file, is it an adapter, which bases) and nothing that is
kept: `serve_app.catalog.catalog` remembers the findings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.catalog.reading.base_match import BaseMatch, match_bases
from serve_app.catalog.reading.bases import BaseArchitectureReader, BaseNames
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.choosing import choose, settings_of
from serve_app.catalog.reading.header import HeaderFacts
from serve_app.catalog.reading.picture_file import picture_of
from serve_app.catalog.reading.repository import (
    HUB,
    AdapterSource,
    RepositoryFile,
    RepositoryListing,
    content_digest,
    is_valid_id,
    is_valid_name,
)
from serve_app.catalog.reading.selection import Candidate, embeddings_beside
from serve_app.config import AppConfig, BaseModelConfig
from serve_app.core import AdapterSpec
from serve_app.errors import AccessDenied, BaseMismatch, ModelNotFound, TooLarge
from serve_app.families.few_step import few_step_defaults
from serve_app.refusals import BaseNotServed, MalformedFile, NotAnAdapter, RankTooHigh

MAX_CHAIN = 3
MAX_PARENTS = 3
# A word is a few kilobytes; a file of this size is something else.
MAX_EMBEDDINGS_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """The facts of one adapter file that hold for any base."""

    id: str
    origin: str
    location: str
    revision: str
    files: Candidate
    size_bytes: int
    defaults: AdapterDefaults
    header: HeaderFacts
    base_match: BaseMatch
    embeddings: str | None = None
    settings: str | None = None
    digest: str | None = None
    picture: RepositoryFile | None = None
    example_prompt: str | None = None

    @property
    def content(self) -> str:
        """A key of the bytes of these files: the same for all names, revisions and sources of them."""
        digest = self.digest if self.origin == HUB else self.revision  # a folder's revision is such a digest
        return digest or f"{self.location}@{self.revision}/{'+'.join(self.files)}"

    def spec_for(self, base: BaseModelConfig) -> AdapterSpec:
        """Return the spec of this file on one of its bases.

        Raises:
            RankTooHigh, TooLarge, MalformedFile: the file is over a limit of that base.
        """
        limits = base.adapter_limits
        if self.size_bytes > limits.max_file:
            raise TooLarge(
                f"adapter {self.id}, of {self.size_bytes} bytes,", f"{limits.max_file.human_readable()} for {base.id}"
            )
        if self.header.max_rank > limits.max_rank:
            raise RankTooHigh(
                self.id,
                f"its rank is {self.header.max_rank}, but at most {limits.max_rank} is served on {base.id}",
            )
        if self.header.tensors > limits.max_tensors:
            raise MalformedFile(self.id, f"it has {self.header.tensors} tensors; at most {limits.max_tensors} are read")
        return AdapterSpec(
            id=self.id,
            base_id=base.id,
            revision=self.revision,
            filename=self.files[0],
            more_files=self.files[1:],
            origin=self.origin,
            location=self.location,
            size_bytes=self.size_bytes,
            defaults=self.defaults,
            embeddings=self.embeddings,
            settings=self.settings,
        )

    def fits(self, base_id: str) -> bool:
        """Whether a base that a request names may serve it."""
        return base_id in (*self.base_match.bases, *self.base_match.by_name)

    def require_served(self, served: Sequence[str]) -> None:
        """Refuse an adapter none of whose bases is served; `served` are all base ids, for the message.

        Raises:
            BaseNotServed: with the base that it was made for, and what would make it work.
        """
        if self.base_match.bases:
            return
        made_for, by_name = self.base_match.made_for, self.base_match.by_name
        known = f"served are {', '.join(served)}"
        reason = f"it was made for {made_for}, which is not served; {known}"
        if by_name:
            reason = (
                f"its card names {made_for}, which is not served; {known}. If it is a fine-tune of "
                f"{' or '.join(by_name)}, which its layers fit, name that base in the request, or have '{made_for}' "
                "made an alias of it"
            )
        raise BaseNotServed(self.id, reason)

    def require_fit(self, base: BaseModelConfig, served: Sequence[str]) -> None:
        """Refuse a base that a request names and that the adapter is not for.

        Raises:
            BaseNotServed: none of its bases is served, and it does not fit this one.
            BaseMismatch: it is for another one that is served.
        """
        if self.fits(base.id):
            return
        self.require_served(served)
        raise BaseMismatch(self.id, self.base_match.made_for, base.id)

    def ambiguity(self) -> BaseNotServed:
        """Return the refusal for a request that leaves open which of several bases is meant."""
        fitting, rivals = ", ".join(self.base_match.bases), " and ".join(self.base_match.rivals)
        also = f", and those of {rivals} as well, which are not served" if rivals else ""
        which = "the one that it was made for" if rivals else "one of them"
        return BaseNotServed(
            self.id, f"its card names no base, and its layers fit {fitting}{also}: name {which} in the request"
        )


class AdapterInspector:
    """Examines adapters in their sources; the first source that has an id wins."""

    def __init__(
        self,
        config: AppConfig,
        sources: Sequence[AdapterSource],
        facts: BaseArchitectureReader,
        card_of: Callable[[str], Awaitable[Card | None]],
    ) -> None:
        self._config = config
        self._names = BaseNames(config.bases)
        self._sources = sources
        self._facts = facts
        self._card_of = card_of

    async def find(self, model: str, revision: str | None) -> tuple[AdapterSource, RepositoryListing] | None:
        """Return the repository of an id and the place that has it, or None."""
        for source in self._sources:
            listing = await source.find(model, revision)
            if listing is not None:
                return source, listing
        return None

    async def inspect(self, model: str, revision: str | None, filename: str | None) -> AdapterInfo:
        """Return what an id means.

        Raises:
            ModelNotFound, AccessDenied, HubUnavailable: it cannot be read.
            RefusedAdapter: it is there but no adapter that can be served; the subclass says why.
        """
        found = await self.find(model, revision) if is_valid_name(model) else None
        if found is None:
            raise ModelNotFound(model)
        return await self.inspect_listing(*found, filename)

    async def inspect_listing(
        self, source: AdapterSource, listing: RepositoryListing, filename: str | None
    ) -> AdapterInfo:
        """Return what a repository that was found means; raises as `inspect` does."""
        files, facts = await choose(source, listing, filename)
        if not facts.components:
            reason = (
                f"the layers in '{files[0]}' (such as {facts.stem[:100]}) are not those of an image model that is known"
            )
            raise NotAnAdapter(listing.id, f"{reason}, or their names are in a spelling that is not read")
        listed = [file for file in map(listing.file, files) if file is not None]
        digests = [file.digest for file in listed if file.digest is not None]
        embeddings = _embeddings(listing, files[0])
        return AdapterInfo(
            id=listing.id,
            origin=listing.origin,
            location=listing.location,
            revision=await source.resolve_revision(listing, *files, *filter(None, (embeddings,))),
            files=files,
            size_bytes=sum(file.size_bytes or 0 for file in listed),
            defaults=listing.card.defaults.over(few_step_defaults(listing.id, files[0])),
            header=facts,
            base_match=await self._place(listing.id, listing.card, facts),
            embeddings=embeddings,
            digest=content_digest(digests) if len(digests) == len(files) else None,
            settings=await settings_of(source, listing, files),
            picture=picture_of(listing, files[0]),
            example_prompt=listing.card.example_prompt,
        )

    async def _place(self, model: str, card: Card, header: HeaderFacts) -> BaseMatch:
        claimed = await self._served_bases(card) or self._served(card.base_hints)
        # A canary of the same structure would leave it open which base is meant.
        bases = self._config.bases if claimed else self._config.originals
        facts = [await self._facts.facts(base) for base in bases]
        return match_bases(model, card.claims, claimed, header, facts)

    async def _served_bases(self, card: Card) -> tuple[str, ...]:
        """Return the served bases that a card means, by name or through the cards of fine-tunes it names."""
        claims = card.claims
        # The bound ends circles too; each card is looked up once.
        for _ in range(MAX_CHAIN):
            served = self._served(claims)
            parents = [name for name in claims if is_valid_id(name)][:MAX_PARENTS]
            if served or not parents:
                return served
            cards = [await self._parent(name) for name in parents]
            claims = tuple(name for parent in cards if parent is not None for name in parent.claims)
        return self._served(claims)

    def _served(self, claims: Sequence[str]) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(base_id for name in claims for base_id in self._names.served_as(name)))
        # A canary may be another revision of the very repository that a card names.
        return tuple(base_id for base_id in found if self._config.original_of(base_id) is None) or found

    async def _parent(self, model: str) -> Card | None:
        try:
            return await self._card_of(model)
        except (ModelNotFound, AccessDenied):
            return None


def _embeddings(listing: RepositoryListing, adapter: str) -> str | None:
    name = embeddings_beside(listing, adapter)
    listed = listing.file(name) if name is not None else None
    if listed is not None and (listed.size_bytes or 0) > MAX_EMBEDDINGS_BYTES:
        limit = f"{MAX_EMBEDDINGS_BYTES // 1024**2} MiB"
        raise TooLarge(f"'{name}', with the words of adapter {listing.id},", limit)
    return name
