"""Digests of large files that rarely change, worked out once and kept.

Owns the place where they are kept. A file is taken to be the same while its path, size, inode and times are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class FileDigests:
    """The sha256 of files, in hex; kept in a folder of small notes, one for each path, or not at all.

    Notes are a convenience: one that is damaged, or that cannot be written, costs another reading and nothing else.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def of(self, path: Path) -> str:
        """Return the digest of a file's bytes.

        Raises:
            OSError: it cannot be read.
        """
        if self._folder is None:
            return _digest(path)
        note = self._folder / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"
        seen = _identity(path)
        kept = _kept(note, seen)
        if kept is not None:
            return kept
        digest = _digest(path)
        if _identity(path) == seen:
            _keep(note, {**seen, "sha256": digest})
        return digest


def _identity(path: Path) -> dict[str, int]:
    facts = path.stat()
    return {"size": facts.st_size, "inode": facts.st_ino, "mtime_ns": facts.st_mtime_ns, "ctime_ns": facts.st_ctime_ns}


def _kept(note: Path, seen: dict[str, int]) -> str | None:
    try:
        kept = json.loads(note.read_text())
        digest = kept.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return digest if kept == seen and isinstance(digest, str) else None


def _keep(note: Path, content: dict[str, int | str]) -> None:
    partial = note.with_name(f".{note.name}.{os.getpid()}.partial")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content))
        partial.replace(note)
    except OSError as error:
        log.info("a digest could not be kept (%s); it is worked out anew at the next start", type(error).__name__)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
