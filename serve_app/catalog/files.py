"""From a resolved adapter to a local file: all that a replica needs of the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve_app.catalog.reading.repository import AdapterSource
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound


class AdapterFiles:
    """The files of adapters that some catalog resolved, perhaps on another node."""

    def __init__(self, repositories: Sequence[AdapterSource]) -> None:
        self._sources = {source.origin: source for source in repositories}

    async def path(self, spec: AdapterSpec) -> Path:
        """Return a local file with exactly the bytes of the spec.

        Raises:
            ModelNotFound, AccessDenied, MalformedFile: it is not there, not allowed, or no longer those
            bytes. HubUnavailable: it could not be fetched now.
        """
        return await self._path(spec, spec.filename)

    async def embeddings(self, spec: AdapterSpec) -> Path | None:
        """Return the file with the adapter's own words, alike; None where it has none."""
        return None if spec.embeddings is None else await self._path(spec, spec.embeddings)

    def downloaded_bytes(self, spec: AdapterSpec) -> int:
        """Return how much has arrived of an adapter's file that is being fetched."""
        source = self._sources.get(spec.origin)
        return 0 if source is None else source.downloaded_bytes(spec)

    def release(self, spec: AdapterSpec) -> None:
        """Let go of the adapter's files: from now on they may be removed to make room."""
        source = self._sources.get(spec.origin)
        if source is not None:
            source.release(spec)

    def free_space(self, needed_bytes: int) -> int:
        """Remove files that can be fetched again, until so many bytes are free; return how many became so. Blocks."""
        return sum(source.free_space(needed_bytes) for source in self._sources.values())

    async def _path(self, spec: AdapterSpec, filename: str) -> Path:
        source = self._sources.get(spec.origin)
        if source is None:
            raise ModelNotFound(spec.id, "the place it was found in is not configured for this replica")
        return await source.download(spec, filename)
