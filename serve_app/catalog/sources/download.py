"""Download of one file from the Hub, with resumption and a check of its digest.

Owns the checks of the Hub's responses: sizes, digest and ranges. Blocks; each `run` sends one request. Must not know
when to retry, nor where files are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import httpx2
from huggingface_hub.utils import get_session, hf_raise_for_status

from serve_app.catalog.sources.download_cache import PartialDownload
from serve_app.catalog.sources.hub_errors import NonRetryableHubError
from serve_app.errors import HubUnavailable

_SHA256, _GIT_ID = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


class IncompleteDownload(HubUnavailable):
    """The file is not complete; the rest can be requested."""


class ChecksumMismatch(HubUnavailable):
    """The bytes are not the file that the Hub names."""


class SizeMismatch(NonRetryableHubError):
    """The Hub states different sizes of one file; a retry would not help."""


class Download:
    """Downloads one file into a draft."""

    def __init__(
        self,
        draft: PartialDownload,
        *,
        model: str,
        url: str,
        headers: Mapping[str, str],
        listed_bytes: int | None,
        limit_bytes: int,
        timeout_s: float,
        is_over: Callable[[], bool],
    ) -> None:
        """Send nothing yet.

        Args:
            draft: The file to write, with the bytes that are already there.
            model: The repository, for error messages.
            url: The file's address on the Hub, which may redirect.
            headers: The headers of each request, with the token.
            listed_bytes: The size in the Hub's list of files, if known.
            limit_bytes: The limit for a file of unknown size.
            timeout_s: How long the Hub may be silent.
            is_over: Whether the download should be abandoned.
        """
        self._draft = draft
        self._model = model
        self._url = url
        self._headers = {**headers, "accept-encoding": "identity"}
        self._listed_bytes = listed_bytes
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._is_over = is_over

    def run(self) -> None:
        """Download the missing bytes, and check the whole file.

        Raises:
            IncompleteDownload, ChecksumMismatch, SizeMismatch: it is incomplete or not the file the Hub names.
            OSError: the disk failed.
            TimeoutError: the download is abandoned.
            Exception: raised by the Hub's client.
        """
        have = self._draft.size_bytes
        headers = self._headers | ({"range": f"bytes={have}-"} if have else {})
        with get_session().stream("GET", self._url, headers=headers, timeout=self._timeout_s) as response:
            if have and response.status_code == 416:
                self._draft.restart()
                raise IncompleteDownload(self._model, "the Hub broke off")
            hf_raise_for_status(response)
            if have and not _continues_at(response, have):
                self._draft.restart()
            size_bytes = self._size_of(response)
            self._take(response, size_bytes)
            self._check(size_bytes, _linked(response, "x-linked-etag") or response.headers.get("etag", ""))

    def _size_of(self, response: httpx2.Response) -> int | None:
        """Return the size of the file, on which the list, the Hub and the sender must agree."""
        linked, sent = _linked(response, "x-linked-size"), response.headers.get("content-length")
        told = [self._listed_bytes, _number(linked)]
        if sent is not None and (rest := _number(sent)) is not None:
            told.append(self._draft.size_bytes + rest)
        sizes = sorted({size for size in told if size is not None})
        if len(sizes) > 1:
            raise SizeMismatch(self._model, f"the Hub says that its file has {sizes[0]} bytes, and also {sizes[-1]}")
        return sizes[0] if sizes else None

    def _take(self, response: httpx2.Response, size_bytes: int | None) -> None:
        for piece in response.iter_bytes():
            if self._is_over():
                raise TimeoutError
            most = self._limit_bytes if size_bytes is None else size_bytes
            if self._draft.size_bytes + len(piece) > most:
                raise SizeMismatch(self._model, f"its file may have {most} bytes, and the Hub sends more")
            self._draft.add(piece)

    def _check(self, size_bytes: int | None, etag: str) -> None:
        if size_bytes is not None and self._draft.size_bytes < size_bytes:
            raise IncompleteDownload(self._model, "the Hub broke off")
        named = etag.removeprefix("W/").strip('"')
        is_wrong = (_SHA256.fullmatch(named) and named != self._draft.sha256()) or (
            _GIT_ID.fullmatch(named) and named != self._draft.git_id()
        )
        if is_wrong:
            self._draft.restart()
            raise ChecksumMismatch(self._model, "what arrived is not the file that the Hub names")


def _linked(response: httpx2.Response, name: str) -> str | None:
    """Return a header of the Hub's own response or of those it redirected to."""
    answers = (*response.history, response)
    return next((answer.headers[name] for answer in answers if name in answer.headers), None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 19 else None


def _continues_at(response: httpx2.Response, position: int) -> bool:
    told = _RANGE.fullmatch(response.headers.get("content-range", ""))
    return response.status_code == 206 and told is not None and int(told[1]) == position
