"""Inspection of one adapter as the service does it, down to each layer, without a service.

Owns the order of the looks and what they came to; how it is shown is `serve_app.cli.inspect`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.header import HeaderFacts, describe
from serve_app.catalog.reading.inspector import AdapterInfo
from serve_app.catalog.reading.repository import AdapterSource, RepositoryListing, is_valid_name
from serve_app.catalog.reading.selection import candidates
from serve_app.catalog.sources.folder import LOCAL, LocalFile
from serve_app.cli.sources import Sources
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterRef, AdapterSpec
from serve_app.errors import LoraplexError, ModelNotFound

if TYPE_CHECKING:
    from serve_app.engine.adapters.safetensors_file import FilePart


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
    defaults: AdapterDefaults = NO_DEFAULTS
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
    found = await inspector.find(ref.id, ref.revision) if is_valid_name(ref.id) else None
    if found is None:
        raise ModelNotFound(ref.id)
    return await _inspect(sources, *found, ref.filename, base, header_only=header_only)


async def inspect_file(sources: Sources, path: Path, base: BaseModelConfig | None, *, header_only: bool) -> Inspection:
    """Inspect a local file with what lies beside it; `base` None checks every base, or those that the card names."""
    source = LocalFile(path)
    seen = await _inspect(sources, source, await source.listing(), source.name, base, header_only=header_only)
    accepting = tuple(verdict.base_id for verdict in seen.verdicts if verdict.refusal is None)
    return replace(seen, sha256=_sha256(path), bases=accepting if seen.verdicts else seen.bases)


async def _inspect(
    sources: Sources,
    source: AdapterSource,
    listing: RepositoryListing,
    filename: str | None,
    base: BaseModelConfig | None,
    *,
    header_only: bool,
) -> Inspection:
    card = listing.card
    seen = Inspection(listing.id, listing.origin, listing.location, card, card.defaults, revision=listing.revision)
    try:
        finding = await sources.inspector().inspect_listing(source, listing, filename)
    except LoraplexError as refusal:
        return (await _with_header(seen, source, listing, filename)).refused(refusal)
    seen = replace(
        seen,
        defaults=finding.defaults, file=", ".join(finding.files), revision=finding.revision,
        size_bytes=finding.size_bytes, header=finding.header, bases=finding.base_match.bases,
    )  # fmt: skip
    try:
        asked = _asked(sources, finding, listing, base)
        spec = finding.spec_for(asked[0])
        if header_only:
            return seen
        from serve_app.engine.adapters.safetensors_file import parts_of

        parts = parts_of(spec.files, [await source.download(spec, name) for name in spec.files])
        beside = None if spec.embeddings is None else await source.download(spec, spec.embeddings)
    except LoraplexError as refusal:
        return seen.refused(refusal)
    verdicts = [await _verdict(sources, parts, spec, known, beside) for known in asked]
    sha256 = _sha256(parts[0].path) if len(parts) == 1 else None
    return replace(seen, sha256=sha256, verdicts=tuple(verdicts))


def _asked(
    sources: Sources, finding: AdapterInfo, listing: RepositoryListing, base: BaseModelConfig | None
) -> tuple[BaseModelConfig, ...]:
    """Return the bases that an adapter is held against; every one for a file whose card names none."""
    served = [known.id for known in sources.config.bases]
    if base is not None and listing.origin != LOCAL:
        finding.require_fit(base, served)
    if base is not None:
        return (base,)
    if listing.origin == LOCAL and not listing.card.claims:
        return sources.config.bases
    finding.require_served(served)
    return tuple(sources.base(name) for name in finding.base_match.bases)


async def _with_header(
    seen: Inspection, source: AdapterSource, listing: RepositoryListing, filename: str | None
) -> Inspection:
    """Add the facts of the header of the only candidate file, for an adapter that is refused anyway."""
    try:
        found = [files for rank in candidates(listing, filename, {}) for files in rank]
        if len(found) != 1:
            return seen
        listed = listing.file(found[0][0])
        seen = replace(seen, file=found[0][0], size_bytes=listed.size_bytes if listed else None)
        return replace(seen, header=describe(await source.header(listing, found[0][0])))
    except LoraplexError:
        return seen


async def _verdict(
    sources: Sources, parts: Sequence[FilePart], spec: AdapterSpec, base: BaseModelConfig, beside: Path | None
) -> Verdict:
    from serve_app.engine.adapters.parser import parse_adapter
    from serve_app.engine.base.structure import structure_of

    try:
        async with sources.base_configurations(base) as folder:
            manifest = structure_of(folder, base.id)
        if base.quantization is not None:
            manifest = replace(manifest, fuses=False)
        coverage = parse_adapter(parts, spec.id, manifest, base.adapter_limits, beside, spec.settings).coverage
    except LoraplexError as refusal:
        return Verdict(base.id, code=refusal.code, refusal=str(refusal))
    return Verdict(base.id, coverage.layers_matched, coverage.layers_in_file, coverage.ranks, coverage.unmatched)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
