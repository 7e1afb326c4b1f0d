"""The Hub client's exceptions in the product's words.

Owns which failure of the Hub means "not there", "not allowed", "not now" and "no room here". Messages name the model
alone: what the client says may hold hosts.
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
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve_app.errors import AccessDenied, DiskFull, HubUnavailable, LoraplexError, ModelNotFound
from serve_app.file_locks import is_disk_full

DEFAULT_RETRY_AFTER_S = 10
MAX_RETRY_AFTER_S = 120
_WINDOW = re.compile(r"\bt=(\d{1,6})\b")

# What the client can raise besides answers: its transport, the local disk, a client closed by another
# thread's failed connection (RuntimeError), and answers of an unexpected shape.
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
    """The repository is there, but not the revision that was asked for."""


@dataclass(eq=False)
class HubRetryAfter(HubUnavailable):
    """The Hub said itself when to come back; `is_limiting` where that holds for every question."""

    is_limiting: bool = False


class NonRetryableHubError(HubUnavailable):
    """Asking again at once would change nothing."""


def translate(error: Exception, model: str, revision: str | None) -> LoraplexError:
    """Return the product's error for what the Hub client raised about one model."""
    if isinstance(error, LoraplexError):
        return error
    if isinstance(error, (GatedRepoError, DisabledRepoError)):
        return AccessDenied(model)
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(model, "the Hub has no such repository that this service may read")
    if isinstance(error, RevisionNotFoundError):
        return MissingRevision(model, f"it has no revision '{revision}'")
    if isinstance(error, LocalEntryNotFoundError):
        return _after_local_miss(error, model, revision)
    if isinstance(error, EntryNotFoundError):
        return ModelNotFound(model, "the file is not in the repository")
    if isinstance(error, HfHubHTTPError):
        return _from_status(error, model)
    if isinstance(error, OfflineModeIsEnabled):
        return NonRetryableHubError(model, "the service is set to work offline")
    if isinstance(error, OSError) and is_disk_full(error):
        return DiskFull(model)
    return HubUnavailable(model, _transport_reason(error))


def _after_local_miss(error: Exception, model: str, revision: str | None) -> LoraplexError:
    cause = error.__cause__
    if isinstance(cause, Exception) and not isinstance(cause, LocalEntryNotFoundError):
        return translate(cause, model, revision)
    return HubUnavailable(model, "the Hub cannot be reached")


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
    """Return for how long an answer asks to be left alone: in seconds, until a date, or until the Hub counts anew."""
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
    """Return the seconds between two dates of HTTP, the second by the Hub's own clock where it tells it."""
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
