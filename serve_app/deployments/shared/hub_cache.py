"""The Hub client's cache on this node: which files of bases lie there, which there are to be, and how one is added that
came another way.

Owns the layout of that folder as far as this needs it. A file appears there only with the digest that it is called by,
so that the Hub's client takes it for its own. Every call may block.

    <folder>/models--<owner>--<name>/blobs/<digest>
                                     snapshots/<commit>/<file>       a link to its blob
                                     refs/<revision>                 the commit
    <folder>/.locks/models--<owner>--<name>/<digest>.lock            held while a blob is made, by that client too
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, validate_repo_id

from serve_app.catalog.sources.download_cache import PartialDownload
from serve_app.deployments.shared.file_index import HubFile, HubSnapshot

DEFAULT_REVISION = "main"
TIMEOUT_S = 10.0
# Below 500, yet no answer about a repository: time-outs and limits.
_TRANSIENT = (408, 425, 429)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class HubCache:
    """The files of models in one cache folder of the Hub's client, and the Hub that they are of."""

    def __init__(self, folder: Path | None = None, *, endpoint: str | None = None, token: str | None = None) -> None:
        """Open nothing yet; what is None is as the Hub's client has it on this node."""
        self._root = folder or Path(constants.HF_HUB_CACHE)
        self._api = HfApi(endpoint, token)

    def listed(self, repository: str, revision: str) -> HubSnapshot | None:
        """Return what the Hub has at a revision now; None where it does not answer.

        Raises:
            RepositoryNotFoundError, RevisionNotFoundError: it is not there, or not for this token.
            HfHubHTTPError: the Hub refuses it in another way, as for a token that is not valid.
        """
        try:
            info = self._api.model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        except HfHubHTTPError as error:
            if error.response.status_code < 500 and error.response.status_code not in _TRANSIENT:
                raise
            return None
        except (OfflineModeIsEnabled, httpx2.TransportError):
            return None
        files = [
            HubFile(one.rfilename, str(one.lfs.sha256 if one.lfs else one.blob_id), one.size or 0)
            for one in info.siblings or ()
        ]
        return HubSnapshot(repository, revision, str(info.sha), tuple(files))

    def blob(self, repository: str, digest: str) -> Path:
        """Return where the bytes of a digest lie, if they do.

        Raises:
            ValueError: this names no repository or no digest, and might lead anywhere.
        """
        if _DIGEST.fullmatch(digest) is None:
            raise ValueError("a blob is called by its digest")
        return self._folder(repository) / "blobs" / digest

    def commit(self, repository: str, revision: str) -> str | None:
        """Return the commit that a revision was when the Hub was asked last."""
        if _COMMIT.fullmatch(revision):
            return revision
        ref = self._folder(repository) / "refs" / revision
        return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None

    def snapshot(self, repository: str, revision: str, node: str) -> HubSnapshot | None:
        """Return what lies here of a repository, to be offered to others; None where it is nothing."""
        commit = self.commit(repository, revision)
        if commit is None:
            return None
        folder = self._folder(repository) / "snapshots" / commit
        files = [
            HubFile(path.relative_to(folder).as_posix(), digest, path.stat().st_size)
            for path in folder.rglob("*")
            if path.is_symlink() and path.is_file() and _DIGEST.fullmatch(digest := path.readlink().name)
        ]
        return HubSnapshot(repository, revision, commit, tuple(files), node) if files else None

    def missing(self, repository: str, files: Iterable[HubFile]) -> list[HubFile]:
        """Return those files whose bytes are not here."""
        return [file for file in files if not self.blob(repository, file.digest).is_file()]

    def clear_drafts(self, repository: str) -> None:
        """Remove what was left by processes that ended while they wrote a file, the Hub's client among them."""
        for draft in self._folder(repository).glob("blobs/*.*.incomplete"):
            # Who writes it holds the lock of its digest, and would let this wait in vain.
            with suppress(OSError), WeakFileLock(self._lock(repository, draft.name.split(".")[0]), timeout=0.1):
                draft.unlink(missing_ok=True)

    def add(self, repository: str, file: HubFile, bring: Callable[[PartialDownload], bool]) -> None:
        """Have `bring` write a file that is not here, unless another process of this node does; it is here afterwards
        if `bring` returns true: the bytes are those of the digest.

        Raises:
            OSError: the disk failed.
        """
        blob, lock = self.blob(repository, file.digest), self._lock(repository, file.digest)
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.is_file():
                return
            # A name of its own, as the Hub's client has it: where a file system has no locks, two only bring it twice.
            draft_path = blob.with_name(f"{file.digest}.{uuid.uuid4().hex[:8]}.incomplete")
            draft = PartialDownload(draft_path, draft_path.open("w+b", buffering=0))
            try:
                if bring(draft):
                    draft_path.replace(blob)
            finally:
                draft.close()

    def link(self, snapshot: HubSnapshot) -> None:
        """Make files that are here those of a commit, and the commit its revision's, as the Hub's client would."""
        folder = self._folder(snapshot.repository)
        for file in snapshot.files:
            blob, link = self.blob(snapshot.repository, file.digest), folder / "snapshots" / snapshot.commit / file.name
            if blob.is_file() and not link.is_file():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                with suppress(FileExistsError):  # another replica of this node was quicker
                    link.symlink_to(os.path.relpath(blob, link.parent))
        if snapshot.revision != snapshot.commit:
            ref = folder / "refs" / snapshot.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            # Whole at once, for the Hub's client of another replica may read it now.
            draft = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
            draft.write_text(snapshot.commit, encoding="utf-8")
            draft.replace(ref)

    def _lock(self, repository: str, digest: str) -> Path:
        return self._root / ".locks" / self._folder(repository).name / f"{digest}.lock"

    def _folder(self, repository: str) -> Path:
        validate_repo_id(repository)
        return self._root / repo_folder_name(repo_id=repository, repo_type="model")
