"""The pictures of adapters: those that come with their files, and those that the service drew.

Owns where the small copies of both are kept on this node's disk. Must not know how pictures are decoded or drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from serve_app.catalog.catalog import Catalog
from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.inspector import AdapterInfo
from serve_app.catalog.reading.repository import MAX_PICTURE_BYTES, AdapterSource, RepositoryFile
from serve_app.catalog.sources.metadata_cache import MetadataCache
from serve_app.core import AdapterRef, HubToken
from serve_app.errors import NoPicture

# About ten thousand of 256 pixels.
MAX_KEPT_BYTES = 128 * 1024**2
# From a file's name and bytes to the small copy.
Shrink = Callable[[str, bytes], Awaitable[bytes]]


class AdapterPictures:
    """Small copies of adapters' pictures; a caller gets those of the adapters that it may use."""

    def __init__(self, catalog: Catalog, folder: Path) -> None:
        self._catalog = catalog
        self._kept = MetadataCache(folder, max_bytes=MAX_KEPT_BYTES)

    async def find(self, ref: AdapterRef, shrink: Shrink, *, token: HubToken | None) -> bytes | None:
        """Return the picture that comes with an adapter, else the one that was drawn, or None.

        Raises:
            NoPicture: the picture that comes with it cannot be shown.
            LoraplexError: the adapter cannot be resolved, or its picture cannot be read now.
        """
        info, source = await self._catalog.located(ref, token=token)
        if info.picture is None:
            return await run_blocking(lambda: self._kept.get_header(*_drawn(info)))
        return await self._own(info, info.picture, source, shrink)

    async def keep(self, ref: AdapterRef, picture: bytes, *, token: HubToken | None) -> None:
        """Keep the picture that was drawn with an adapter."""
        info, _ = await self._catalog.located(ref, token=token)
        await run_blocking(lambda: self._kept.put_header(*_drawn(info), picture))

    async def _own(self, info: AdapterInfo, file: RepositoryFile, source: AdapterSource, shrink: Shrink) -> bytes:
        content, digest = None, file.digest
        if digest is None:  # a local file, which may change at any time
            content = await self._read(info, file, source)
            digest = hashlib.sha256(content).hexdigest()
        place = info.location, digest, file.name
        kept = await run_blocking(lambda: self._kept.get_header(*place))
        if kept is not None:
            return kept
        small = await shrink(file.name, content or await self._read(info, file, source))
        await run_blocking(lambda: self._kept.put_header(*place, small))
        return small

    async def _read(self, info: AdapterInfo, file: RepositoryFile, source: AdapterSource) -> bytes:
        limit = f"'{file.name}' has more than {MAX_PICTURE_BYTES // 1024**2} MiB"
        if (file.size_bytes or 0) > MAX_PICTURE_BYTES:
            raise NoPicture(info.id, limit)
        content = await source.read_picture(info.location, info.revision, file)
        if content is None:
            raise NoPicture(info.id, f"'{file.name}' is no longer there")
        if len(content) > MAX_PICTURE_BYTES:
            raise NoPicture(info.id, limit)
        return content


def _drawn(info: AdapterInfo) -> tuple[str, str, str]:
    return "drawn", hashlib.sha256(info.content.encode()).hexdigest(), "picture"
