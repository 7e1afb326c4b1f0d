"""Why a base cannot be served: read from its files before loading, or from the error that loading ended in.

Owns the sentences that an operator reads. Must not fetch or load anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve_app.engine.base.remote_code import INDEX, RemoteCodeNotAllowed
from serve_app.engine.base.single_file import SingleFileUnusable
from serve_app.errors import BaseUnusable, HubUnavailable, LoraplexError
from serve_app.families.config_files import SINGLE_FILE, missing_package, unusable_reason
from serve_app.families.table import other_medium

_NEEDED_LIBRARY = re.compile(r"requires the (\w+) library|requires (\w+) to be installed|No module named '(\w+)")


def check_base_folder(base_id: str, folder: Path) -> None:
    """Refuse a base that its configuration files show not to be servable, before any weight is read.

    Raises:
        BaseUnusable: it holds single files alone, makes no pictures, or its weights are quantised.
    """
    reason = unusable_reason(folder)
    if reason is not None:
        raise BaseUnusable(base_id, reason)


def check_medium(base_id: str, pipeline: str) -> None:
    """Refuse a pipeline class that makes no pictures, before its weights are fetched.

    Raises:
        BaseUnusable: so it is.
    """
    if (medium := other_medium(pipeline)) is not None:
        raise BaseUnusable(base_id, f"{pipeline} makes {medium}, and only images are served")


def refusal(base_id: str, error: BaseException, *, is_hub: bool) -> LoraplexError:
    """Return what the operator reads of an error; diffusers hides the Hub's own answer behind errors of its own."""
    if isinstance(error, LoraplexError):
        return error
    if isinstance(error, RemoteCodeNotAllowed):
        return BaseUnusable(base_id, f"{error}, and no code of a base is ever run")
    if isinstance(error, SingleFileUnusable):
        return BaseUnusable(base_id, str(error))
    causes = tuple(_causes(error))
    if (library := _missing_library(causes)) is not None:
        return BaseUnusable(base_id, missing_package(library))
    if is_hub and (found := _of_the_hub(base_id, causes)) is not None:
        return found
    return BaseUnusable(base_id, "its files are missing, incomplete or not in safetensors form")


def _of_the_hub(base_id: str, causes: tuple[BaseException, ...]) -> LoraplexError | None:
    if any(isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError)) for cause in causes):
        return BaseUnusable(base_id, "its repository does not exist, or the Hub token may not read it")
    if any(isinstance(one, EntryNotFoundError) and not isinstance(one, LocalEntryNotFoundError) for one in causes):
        return BaseUnusable(base_id, f"its repository has no {INDEX}, which a base has; {SINGLE_FILE}")
    if any(_is_unreachable(cause) for cause in causes):
        return HubUnavailable(base_id, "the Hub did not answer, and the local cache lacks files")
    return None


def _is_unreachable(cause: BaseException) -> bool:
    """Say whether this is the Hub not answering; its client may use either of two HTTP libraries of one shape."""
    hub_errors = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    return isinstance(cause, hub_errors) or any(kind.__name__ == "TransportError" for kind in type(cause).__mro__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _missing_library(causes: tuple[BaseException, ...]) -> str | None:
    for cause in causes:
        found = _NEEDED_LIBRARY.search(str(cause)) if isinstance(cause, (ImportError, ValueError)) else None
        if found is not None:
            return next(name for name in found.groups() if name).lower()
    return None
