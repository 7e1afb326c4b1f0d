"""Inspection of one adapter as the service does it, down to each layer, without a service.

Owns the order of the looks and what they came to; how it is shown is `serve_app.cli.inspect`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serve_app.catalog.reading.card import Card, parse_card
from serve_app.catalog.reading.header import HeaderFacts, MalformedHeader, describe, read_header
from serve_app.catalog.reading.inspector import SETTINGS
from serve_app.catalog.reading.repository import AdapterSource, RepositoryListing, is_valid_id
from serve_app.catalog.reading.selection import SAFE_SUFFIX, candidates
from serve_app.cli.sources import Sources
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterRef
from serve_app.errors import LoraplexError, ModelNotFound
from serve_app.refusals import MalformedFile, NotAnAdapter, UnsafeFile

MAX_CARD_CHARACTERS = 256 * 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one base: the number of matching layers and the ranks, or the refusal."""

    base_id: str
    layers_matched: int = 0
    layers_in_file: int = 0
    ranks: tuple[int, int] = (0, 0)
    unmatched: tuple[str, ...] = ()
    code: str | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts about an adapter; unknown ones are None or empty.

    `refusal` is why no base at all can serve the adapter; `verdicts` has one entry for each base that was asked, none
    where the weights were not read.
    """

    id: str
    origin: str
    location: str
    card: Card
    file: str | None = None
    revision: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    header: HeaderFacts | None = None
    bases: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    code: str | None = None
    refusal: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether some base can serve it, as far as it was checked."""
        return self.refusal is None and (not self.verdicts or any(v.refusal is None for v in self.verdicts))

    def refused(self, error: LoraplexError) -> Inspection:
        """Return this with the reason why no base serves it."""
        return replace(self, code=error.code, refusal=str(error))


async def inspect_id(
    sources: Sources, ref: AdapterRef, base: BaseModelConfig | None, *, header_only: bool
) -> Inspection:
    """Inspect an adapter by its id; `base` None checks the bases that it was made for.

    Raises:
        ModelNotFound, AccessDenied, HubUnavailable: there is nothing to look at.
    """
    inspector = sources.inspector()
    found = await inspector.find(ref.id, ref.revision) if is_valid_id(ref.id) else None
    if found is None:
        raise ModelNotFound(ref.id)
    source, listing = found
    seen = Inspection(ref.id, listing.origin, listing.location, listing.card, revision=listing.revision)
    try:
        finding = await inspector.inspect(ref.id, ref.revision, ref.filename)
    except LoraplexError as refusal:
        return (await _with_header(seen, source, listing, ref.filename)).refused(refusal)
    seen = replace(
        seen,
        file=finding.filename, revision=finding.revision, size_bytes=finding.size_bytes, header=finding.header,
        bases=finding.base_match.bases,
    )  # fmt: skip
    try:
        served = [known.id for known in sources.config.bases]
        if base is None:
            finding.require_served(served)
        else:
            finding.require_fit(base, served)
        asked = (base,) if base is not None else tuple(sources.base(name) for name in finding.base_match.bases)
        spec = finding.spec_for(asked[0])
        if header_only:
            return seen
        path = await source.download(spec)
        ti_tokens = None if spec.embeddings is None else await source.download(spec, spec.embeddings)
    except LoraplexError as refusal:
        return seen.refused(refusal)
    return replace(
        seen, sha256=_sha256(path), verdicts=await _judge(sources, path, ref.id, asked, ti_tokens, finding.settings)
    )


async def inspect_file(sources: Sources, path: Path, base: BaseModelConfig | None, *, header_only: bool) -> Inspection:
    """Inspect a local file and the card beside it; `base` None checks every configured base."""
    seen = _outside_of(path)
    if seen.refusal is not None or header_only:
        return seen
    beside = path.parent / SETTINGS
    settings = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else None
    asked = (base,) if base is not None else sources.config.bases
    verdicts = await _judge(sources, path, path.name, asked, None, settings)
    return replace(
        seen, verdicts=verdicts, bases=tuple(verdict.base_id for verdict in verdicts if verdict.refusal is None)
    )


def _outside_of(path: Path) -> Inspection:
    """Return the facts of a file without reading its weights."""
    card_path = path.parent / "README.md"
    text = card_path.read_text(encoding="utf-8", errors="replace")[:MAX_CARD_CHARACTERS] if card_path.is_file() else ""
    seen = Inspection(
        str(path), "file", str(path.resolve()), parse_card(text),
        file=path.name, size_bytes=path.stat().st_size, sha256=_sha256(path),
    )  # fmt: skip
    if path.suffix != SAFE_SUFFIX:
        return seen.refused(UnsafeFile(path.name, "it is not a safetensors file, and no other kind is read"))
    try:
        facts = describe(read_header(path))
    except MalformedHeader as error:
        return seen.refused(MalformedFile(path.name, str(error)))
    seen = replace(seen, header=facts)
    if not facts.has_pairs:
        return seen.refused(
            NotAnAdapter(
                path.name, "it has no layers of an adapter: no pair of low-rank factors, in any spelling that is read"
            )
        )
    return seen


async def _with_header(
    seen: Inspection, source: AdapterSource, listing: RepositoryListing, filename: str | None
) -> Inspection:
    """Add the facts of the header of the only candidate file, for an adapter that is refused anyway."""
    try:
        names = candidates(listing, filename)
        if len(names) != 1:
            return seen
        listed = listing.file(names[0])
        seen = replace(seen, file=names[0], size_bytes=listed.size_bytes if listed else None)
        return replace(seen, header=describe(await source.header(listing, names[0])))
    except LoraplexError:
        return seen


async def _judge(
    sources: Sources,
    path: Path,
    name: str,
    bases: Sequence[BaseModelConfig],
    ti_tokens: Path | None,
    settings: str | None,
) -> tuple[Verdict, ...]:
    return tuple([await _verdict(sources, path, name, base, ti_tokens, settings) for base in bases])


async def _verdict(
    sources: Sources, path: Path, name: str, base: BaseModelConfig, ti_tokens: Path | None, settings: str | None
) -> Verdict:
    from serve_app.engine.adapters.parser import parse_adapter
    from serve_app.engine.base.manifest import structure_of

    try:
        async with sources.base_configurations(base) as folder:
            manifest = structure_of(folder, base.id)
        coverage = parse_adapter(path, name, manifest, base.adapter_limits, ti_tokens, settings).coverage
    except LoraplexError as refusal:
        return Verdict(base.id, code=refusal.code, refusal=str(refusal))
    return Verdict(base.id, coverage.layers_matched, coverage.layers_in_file, coverage.ranks, coverage.unmatched)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
