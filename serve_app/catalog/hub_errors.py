"""The Hub client's exceptions in the product's words.

Owns which failure of the Hub means "not there", "not allowed" and "not now". Messages name the model alone:
what the client says may hold hosts.
"""

from __future__ import annotations

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

from serve_app.errors import AccessDenied, HubUnavailable, LoraplexError, ModelNotFound

DEFAULT_RETRY_AFTER_S = 10
MAX_RETRY_AFTER_S = 120

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


def translate(error: Exception, model: str, revision: str | None) -> LoraplexError:
    """Return the product's error for what the Hub client raised about one model."""
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
    if status == 429:
        asked = error.response.headers.get("retry-after", "")
        wait_s = min(int(asked), MAX_RETRY_AFTER_S) if asked.isdecimal() else DEFAULT_RETRY_AFTER_S
        return HubUnavailable(model, "the Hub is limiting requests", max(wait_s, 1))
    return HubUnavailable(model, f"the Hub answered with status {status}")


def _transport_reason(error: Exception) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "the Hub did not answer in time"
    if isinstance(error, OfflineModeIsEnabled):
        return "the service is set to work offline"
    if isinstance(error, httpx2.HTTPError):
        return "the Hub cannot be reached"
    if isinstance(error, OSError):
        return "the download did not complete"
    return "the Hub's answer could not be understood"
