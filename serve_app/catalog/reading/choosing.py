"""Which files of a repository are its adapter, by their headers, and what lies beside them.

Files that make one adapter together are read as one. Must not know which bases are served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.header import HeaderFacts, MalformedHeader, SafetensorsHeader, describe, joined
from serve_app.catalog.reading.repository import AdapterSource, RepositoryListing
from serve_app.catalog.reading.selection import Candidate, candidates, indexes_of, read_index
from serve_app.errors import TooLarge
from serve_app.families.spellings import text_folder
from serve_app.refusals import AmbiguousFile, MalformedFile, NotAnAdapter, RefusedAdapter, UnsupportedMethod

MAX_HEADERS_READ = 8
# Up to here, looking at all of them takes less time than the way to a thread and back.
FEW_TENSORS = 2000
# How peft scales an adapter that it saved; the file's own tensors do not say.
SETTINGS = "adapter_config.json"
MAX_SETTINGS_BYTES = 64 * 1024
MAX_INDEX_BYTES = 1024 * 1024


async def choose(
    source: AdapterSource, listing: RepositoryListing, filename: str | None
) -> tuple[Candidate, HeaderFacts]:
    """Return the files of a repository that are its adapter, and what their headers say."""
    indexes: dict[str, dict[str, str]] = {}
    for name in indexes_of(listing):
        listed = listing.file(name)
        if name != filename and listed is not None and (listed.size_bytes or 0) >= MAX_INDEX_BYTES:
            continue  # that of a whole model; shards have numbers, too
        content = await _small(source, listing, name, MAX_INDEX_BYTES)
        indexes[name] = read_index(listing.id, name, content or b"{}")
    seen: dict[str, str | None] = {}
    for found in candidates(listing, filename, indexes):
        if len(found) > MAX_HEADERS_READ:
            raise AmbiguousFile(listing.id, _choice([files[0] for files in found]))
        headers = {files: await _header(source, listing, files, indexes) for files in found}
        described = {files: await _described(header) for files, header in headers.items()}
        adapters = [(files, facts) for files, facts in described.items() if facts.has_pairs]
        if len(adapters) > 1:
            raise AmbiguousFile(listing.id, _choice([files[0] for files, _ in adapters]))
        if adapters:
            return adapters[0]
        seen |= {files[0]: facts.unserved_method for files, facts in described.items()}
    raise _no_pairs(listing.id, seen)


async def settings_of(source: AdapterSource, listing: RepositoryListing, files: Candidate) -> str | None:
    """Return the text of peft's settings beside an adapter's files, where there are any.

    Those of several folders are one table, in the form in which diffusers joins them: `unet.r`.
    """
    folders = {file.rpartition("/")[0] for file in files}
    names = {folder: f"{folder}/{SETTINGS}".lstrip("/") for folder in sorted(folders)}
    texts = {
        folder.rpartition("/")[2]: text.decode("utf-8", errors="replace")
        for folder, name in names.items()
        if (text := await _small(source, listing, name, MAX_SETTINGS_BYTES)) is not None
    }
    if len(folders) == 1 and not text_folder(files[0]):
        return next(iter(texts.values()), None)
    return join_settings(listing.id, texts) if texts else None


async def _header(
    source: AdapterSource, listing: RepositoryListing, files: Candidate, indexes: Mapping[str, dict[str, str]]
) -> SafetensorsHeader:
    """Return the header of files as that of one."""
    headers = {file: await source.header(listing, file) for file in files}
    for index in indexes.values():
        for key, file in index.items():
            if file in headers and key not in headers[file].tensors:
                raise MalformedFile(listing.id, f"its index puts tensor {key[:100]} into '{file}', which lacks it")
    try:
        return joined([(text_folder(file), header) for file, header in headers.items()])
    except MalformedHeader as error:
        raise MalformedFile(listing.id, str(error)) from None


async def _small(source: AdapterSource, listing: RepositoryListing, name: str, limit_bytes: int) -> bytes | None:
    if listing.file(name) is None:
        return None
    content = await source.read_small(listing.location, listing.revision, name)
    if content is not None and len(content) >= limit_bytes:
        raise TooLarge(f"'{name}' of adapter {listing.id}", f"{limit_bytes} bytes")
    return content


def join_settings(model: str, texts: Mapping[str, str]) -> str:
    """Return the settings of several folders as one table.

    Raises:
        MalformedFile: one of them is no table.
    """
    joined_table: dict[str, Any] = {}
    for folder, text in texts.items():
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            table = None
        if not isinstance(table, dict):
            raise MalformedFile(model, f"'{folder}/{SETTINGS}' is not a JSON table")
        joined_table |= {f"{folder}.{key}": value for key, value in table.items()}
    return json.dumps(joined_table)


async def _described(header: SafetensorsHeader) -> HeaderFacts:
    if len(header.tensors) <= FEW_TENSORS:
        return describe(header)
    return await run_blocking(lambda: describe(header))


def _no_pairs(model: str, methods: Mapping[str, str | None]) -> RefusedAdapter:
    for name, method in methods.items():
        if method is not None:
            return UnsupportedMethod(model, f"'{name}' uses {method}, which is not served")
    names = tuple(methods)
    what = f"'{names[0]}' has no" if len(names) == 1 else f"none of {', '.join(names)} has"
    return NotAnAdapter(
        model, f"{what} layers of an adapter: no pair of low-rank factors, in any spelling that is read"
    )


def _choice(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"several files could be meant; name one of them as 'filename': {shown}"
