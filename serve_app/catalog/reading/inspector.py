"""One adapter looked at from all sides: repository, file, header, bases.

Owns the order of the questions (is it there, which file, is it an adapter, which bases) and nothing that is
kept: `serve_app.catalog.catalog` remembers the findings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from serve_app.catalog.reading.base_match import BaseMatch, match_bases
from serve_app.catalog.reading.bases import BaseArchitectureReader, BaseNames
from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.header import HeaderFacts, SafetensorsHeader, describe
from serve_app.catalog.reading.repository import HUB, AdapterSource, RepositoryListing, is_valid_id
from serve_app.catalog.reading.selection import candidates, embeddings_beside
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterSpec
from serve_app.errors import AccessDenied, BaseMismatch, ModelNotFound, TooLarge
from serve_app.refusals import AmbiguousFile, BaseNotServed, MalformedFile, NotAnAdapter, RankTooHigh

MAX_HEADERS_READ = 8
# As much of a SHA-256 as a folder's revision has.
DIGEST_CHARACTERS = 40
# Up to here, looking at all of them takes less time than the way to a thread and back.
FEW_TENSORS = 2000
MAX_CHAIN = 3
MAX_PARENTS = 3
# A word is a few kilobytes; a file of this size is something else.
MAX_EMBEDDINGS_BYTES = 16 * 1024 * 1024
# How peft scales an adapter that it saved; the file's own tensors do not say.
SETTINGS = "adapter_config.json"
MAX_SETTINGS_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known of one adapter file, whichever base a request names."""

    id: str
    origin: str
    location: str
    revision: str
    filename: str
    size_bytes: int
    instance_prompt: str | None
    header: HeaderFacts
    placement: BaseMatch
    embeddings: str | None = None
    settings: str | None = None
    digest: str | None = None

    @property
    def content(self) -> str:
        """What tells the bytes of this file from others': the same for all names, revisions and sources of one file."""
        digest = self.digest if self.origin == HUB else self.revision  # a folder's revision is such a digest
        return digest[:DIGEST_CHARACTERS] if digest else f"{self.location}@{self.revision}/{self.filename}"

    def spec_for(self, base: BaseModelConfig) -> AdapterSpec:
        """Return the spec of this file on one of its bases.

        Raises:
            RankTooHigh, TooLarge, MalformedFile: the file is over a limit of that base.
        """
        limits = base.adapter_limits
        if self.size_bytes > limits.max_file:
            raise TooLarge(f"the file of adapter {self.id}", f"{limits.max_file.human_readable()} for {base.id}")
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
            filename=self.filename,
            origin=self.origin,
            location=self.location,
            size_bytes=self.size_bytes,
            instance_prompt=self.instance_prompt,
            embeddings=self.embeddings,
            settings=self.settings,
        )

    def require_served(self, served: Sequence[str]) -> None:
        """Refuse an adapter none of whose bases is served; `served` are all base ids, for the message.

        Raises:
            BaseNotServed: with the base that it was made for, and what would make it work.
        """
        if self.placement.bases:
            return
        made_for, by_name = self.placement.made_for, self.placement.by_name
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
        if base.id in (*self.placement.bases, *self.placement.by_name):
            return
        self.require_served(served)
        raise BaseMismatch(self.id, self.placement.made_for, base.id)

    def ambiguity(self) -> BaseNotServed:
        """Return the refusal for a request that leaves open which of several bases is meant."""
        fitting = ", ".join(self.placement.bases)
        return BaseNotServed(self.id, f"its card names no base, and its layers fit {fitting}: name one of them")


class AdapterInspector:
    """Examines adapters in the places where they may lie, the first place that has an id wins."""

    def __init__(
        self,
        bases: Sequence[BaseModelConfig],
        places: Sequence[AdapterSource],
        facts: BaseArchitectureReader,
        card_of: Callable[[str], Awaitable[Card | None]],
    ) -> None:
        self._bases = bases
        self._names = BaseNames(bases)
        self._sources = places
        self._facts = facts
        self._card_of = card_of

    async def find(self, model: str, revision: str | None) -> tuple[AdapterSource, RepositoryListing] | None:
        """Return the repository of an id and the place that has it, or None."""
        for source in self._sources:
            listing = await source.find(model, revision)
            if listing is not None:
                return source, listing
        return None

    async def examine(self, model: str, revision: str | None, filename: str | None) -> AdapterInfo:
        """Return what an id means.

        Raises:
            ModelNotFound, AccessDenied, HubUnavailable: it cannot be read.
            RefusedAdapter: it is there but no adapter that can be served; the subclass says why.
        """
        found = await self.find(model, revision) if is_valid_id(model) else None
        if found is None:
            raise ModelNotFound(model)
        source, listing = found
        chosen, facts = await self._choose(source, listing, filename)
        if not facts.components:
            reason = (
                f"the layers in '{chosen}' (such as {facts.stem[:100]}) are not those of an image model that is known"
            )
            raise NotAnAdapter(model, f"{reason}, or their names are in a spelling that is not read")
        listed = listing.file(chosen)
        embeddings = _embeddings(listing, chosen)
        return AdapterInfo(
            id=model,
            origin=listing.origin,
            location=listing.location,
            revision=await source.resolve_revision(listing, *filter(None, (chosen, embeddings))),
            filename=chosen,
            size_bytes=(listed.size_bytes if listed else None) or 0,
            instance_prompt=listing.card.instance_prompt,
            header=facts,
            placement=await self._place(model, listing.card, facts),
            embeddings=embeddings,
            digest=listed.digest if listed else None,
            settings=await self._settings(source, listing, chosen),
        )

    async def _settings(self, source: AdapterSource, listing: RepositoryListing, chosen: str) -> str | None:
        """Return the text of peft's settings beside an adapter's file, where there are any."""
        folder = chosen.rpartition("/")[0]
        name = f"{folder}/{SETTINGS}" if folder else SETTINGS
        if listing.file(name) is None:
            return None
        content = await source.read_small(listing.location, listing.revision, name)
        if content is None:
            return None
        if len(content) > MAX_SETTINGS_BYTES:
            raise TooLarge(f"'{name}', with the settings of adapter {listing.id},", f"{MAX_SETTINGS_BYTES} bytes")
        return content.decode("utf-8", errors="replace")

    async def _choose(
        self, source: AdapterSource, listing: RepositoryListing, filename: str | None
    ) -> tuple[str, HeaderFacts]:
        names = candidates(listing, filename)
        if len(names) > MAX_HEADERS_READ:
            raise AmbiguousFile(listing.id, _choice(names))
        adapters = [
            (name, facts) for name in names if (facts := await _described(await source.header(listing, name))).has_pairs
        ]
        if not adapters:
            what = f"'{names[0]}' has no" if len(names) == 1 else f"none of {', '.join(names)} has"
            raise NotAnAdapter(
                listing.id, f"{what} layers of an adapter: no pair of low-rank factors, in any spelling that is read"
            )
        if len(adapters) > 1:
            raise AmbiguousFile(listing.id, _choice([name for name, _ in adapters]))
        return adapters[0]

    async def _place(self, model: str, card: Card, header: HeaderFacts) -> BaseMatch:
        claimed = await self._served_bases(card)
        facts = [await self._facts.facts(base) for base in self._bases]
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
        return tuple(dict.fromkeys(base_id for name in claims for base_id in self._names.served_as(name)))

    async def _parent(self, model: str) -> Card | None:
        try:
            return await self._card_of(model)
        except (ModelNotFound, AccessDenied):
            return None


async def _described(header: SafetensorsHeader) -> HeaderFacts:
    if len(header.tensors) <= FEW_TENSORS:
        return describe(header)
    return await run_blocking(lambda: describe(header))


def _embeddings(listing: RepositoryListing, adapter: str) -> str | None:
    name = embeddings_beside(listing, adapter)
    listed = listing.file(name) if name is not None else None
    if listed is not None and (listed.size_bytes or 0) > MAX_EMBEDDINGS_BYTES:
        limit = f"{MAX_EMBEDDINGS_BYTES // 1024**2} MiB"
        raise TooLarge(f"'{name}', with the words of adapter {listing.id},", limit)
    return name


def _choice(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"several files could be meant; name one of them as 'filename': {shown}"
