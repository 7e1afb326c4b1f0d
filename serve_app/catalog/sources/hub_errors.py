"""The Hub client's exceptions as the product's errors.

Owns which failure of the Hub means that a model does not exist, is not allowed, is unavailable now, or does not fit on
the disk. Messages name only the model: the client's texts may contain hosts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve_app.errors import AccessDenied, DiskFull, HubUnavailable, LoraplexError, ModelNotFound
from serve_app.file_locks import is_disk_full

DEFAULT_RETRY_AFTER_S = 10
MAX_RETRY_AFTER_S = 120
_WINDOW = re.compile(r"\bt=(\d{1,6})\b")

# Errors of the client: HTTP errors, its transport, the local disk, a client closed by another thread's failed
# connection (RuntimeError), and responses of an unexpected shape.
HUB_FAILURES = (
    HfHubHTTPError,
    httpx2.HTTPError,
    EntryNotFoundError,
    OSError,
    RuntimeError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
)


class MissingRevision(ModelNotFound):
    """The repository exists, but not the requested revision."""


@dataclass(eq=False)
class HubRetryAfter(HubUnavailable):
    """The Hub sent a Retry-After; `is_limiting` says that it holds for every request."""

    is_limiting: bool = False


class NonRetryableHubError(HubUnavailable):
    """A retry would fail in the same way."""


def translate(error: Exception, model: str, revision: str | None) -> LoraplexError:
    """Return the product's error for an exception of the Hub client about one model."""
    if isinstance(error, LoraplexError):
        return error
    if isinstance(error, (GatedRepoError, DisabledRepoError)):
        return AccessDenied(model)
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(model, "the Hub has no such repository that this service may read")
    if isinstance(error, RevisionNotFoundError):
        return MissingRevision(model, f"it has no revision '{revision}'")
    if isinstance(error, EntryNotFoundError):
        return ModelNotFound(model, "the file is not in the repository")
    if isinstance(error, HfHubHTTPError):
        return _from_status(error, model)
    if isinstance(error, OfflineModeIsEnabled):
        return NonRetryableHubError(model, "the service is set to work offline")
    if isinstance(error, OSError) and is_disk_full(error):
        return DiskFull(model)
    return HubUnavailable(model, _transport_reason(error))


def _from_status(error: HfHubHTTPError, model: str) -> LoraplexError:
    status = error.response.status_code
    if status in (401, 403):
        return AccessDenied(model)
    if status == 404:
        return ModelNotFound(model)
    asked_s = _asked_pause_s(error.response.headers)
    if status == 429:
        return HubRetryAfter(model, "the Hub is limiting requests", asked_s or DEFAULT_RETRY_AFTER_S, is_limiting=True)
    reason = f"the Hub answered with status {status}"
    return HubUnavailable(model, reason) if asked_s is None else HubRetryAfter(model, reason, asked_s)


def _asked_pause_s(headers: httpx2.Headers) -> int | None:
    """Return the wait in seconds from the `Retry-After` header (seconds or a date) or from the `RateLimit` window."""
    asked = headers.get("retry-after", "").strip()
    window = _WINDOW.search(headers.get("ratelimit", ""))
    if asked.isdecimal():
        pause_s = int(asked[:9])
    elif asked:
        pause_s = _seconds_until(asked, headers.get("date", ""))
    else:
        pause_s = int(window[1]) if window else None
    return None if pause_s is None else max(1, min(pause_s, MAX_RETRY_AFTER_S))


def _seconds_until(date: str, now: str) -> int | None:
    """Return the seconds between two HTTP dates; `now` is the Hub's own date, or empty for this machine's clock."""
    try:
        until = parsedate_to_datetime(date)
        since = parsedate_to_datetime(now) if now else datetime.now(UTC)
        return int((until - since).total_seconds())
    except (ValueError, TypeError):
        return None


def _transport_reason(error: Exception) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "the Hub did not answer in time"
    if isinstance(error, httpx2.RemoteProtocolError):
        return "the Hub broke off"
    if isinstance(error, httpx2.HTTPError):
        return "the Hub cannot be reached"
    if isinstance(error, OSError):
        return "it could not be written to this node's disk"
    return "the Hub's answer could not be understood"
