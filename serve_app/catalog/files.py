"""From a resolved adapter to a local file; the part of the catalog that a replica needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve_app.catalog.reading.repository import AdapterSource
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound


class AdapterFiles:
    """The files of adapters that a catalog has resolved, possibly on another node."""

    def __init__(self, sources: Sequence[AdapterSource]) -> None:
        self._sources = {source.origin: source for source in sources}

    async def path(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        """Return a local file with exactly the bytes of the spec: its first, or another of its files.

        Raises:
            ModelNotFound, AccessDenied, MalformedFile: it does not exist, is not allowed, or has other bytes now.
            HubUnavailable: it could not be downloaded now.
        """
        source = self._sources.get(spec.origin)
        if source is None:
            raise ModelNotFound(spec.id, "its source is not configured for this replica")
        return await source.download(spec, filename or spec.filename)

    def downloaded_bytes(self, spec: AdapterSpec) -> int:
        """Return how many bytes of an adapter's file have arrived."""
        source = self._sources.get(spec.origin)
        return 0 if source is None else source.downloaded_bytes(spec)

    def release(self, spec: AdapterSpec) -> None:
        """Allow the removal of the adapter's files."""
        source = self._sources.get(spec.origin)
        if source is not None:
            source.release(spec)

    def free_space(self, needed_bytes: int) -> int:
        """Remove unused copies until so many bytes are free; return how many bytes became free. Blocks."""
        freed = 0
        for source in self._sources.values():
            freed += source.free_space(needed_bytes - freed) if freed < needed_bytes else 0
        return freed
