"""Which listed file of a repository is an adapter's picture. Pure."""

from __future__ import annotations

from serve_app.catalog.reading.repository import RepositoryFile, RepositoryListing
from serve_app.catalog.reading.selection import SAFE_SUFFIX

# What A1111's and Civitai's tools write beside an adapter file.
PREVIEW_ENDINGS = (".preview.png", ".preview.jpg", ".preview.jpeg", ".preview.webp")


def picture_of(listing: RepositoryListing, adapter: str) -> RepositoryFile | None:
    """Return the picture that an adapter's card shows, else the preview beside the adapter's file, or None."""
    stem = adapter.removesuffix(SAFE_SUFFIX)
    names = (listing.card.picture, *(stem + ending for ending in PREVIEW_ENDINGS))
    return next((file for name in names if name and (file := listing.file(name)) is not None), None)
