"""From a resolved adapter to a local file: all that a replica needs of the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve_app.catalog.reading.repository import Repositories
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound


class AdapterFiles:
    """The files of adapters that some catalog resolved, perhaps on another node."""

    def __init__(self, repositories: Sequence[Repositories]) -> None:
        self._places = {place.origin: place for place in repositories}

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

    def arriving_bytes(self, spec: AdapterSpec) -> int:
        """Return how much has arrived of an adapter's file that is being fetched."""
        place = self._places.get(spec.origin)
        return 0 if place is None else place.arriving_bytes(spec)

    def release(self, spec: AdapterSpec) -> None:
        """Let go of the adapter's files: from now on they may be removed to make room."""
        place = self._places.get(spec.origin)
        if place is not None:
            place.release(spec)

    def make_room(self, needed_bytes: int) -> int:
        """Remove files that can be fetched again, until so many bytes are free; return how many became so. Blocks."""
        return sum(place.make_room(needed_bytes) for place in self._places.values())

    async def _path(self, spec: AdapterSpec, filename: str) -> Path:
        place = self._places.get(spec.origin)
        if place is None:
            raise ModelNotFound(spec.id, "the place it was found in is not configured for this replica")
        return await place.download(spec, filename)
