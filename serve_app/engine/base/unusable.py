"""Why a base cannot be served: read from its files before loading, or from the error that loading ended in.

Owns the sentences that an operator reads. Must not fetch or load anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve_app.engine.base.remote_code import INDEX, RemoteCodeNotAllowed
from serve_app.errors import BaseUnusable, HubUnavailable, LoraplexError
from serve_app.families.table import other_medium

SINGLE_FILE = (
    "it is a single file of weights; convert it once with diffusers' `from_single_file` and `save_pretrained`, "
    "and name the folder"
)
_NEEDED_LIBRARY = re.compile(r"requires the (\w+) library|requires (\w+) to be installed|No module named '(\w+)")
# What `pip install loraplex[...]` brings for the packages that bases need.
_EXTRAS = {"torchvision": "vision"}


def check_base_folder(base_id: str, folder: Path) -> None:
    """Refuse a base that its configuration files show not to be servable, before any weight is read.

    Raises:
        BaseUnusable: it is a single file, makes no pictures, or its weights are quantised.
    """
    reason = unusable_reason(folder)
    if reason is not None:
        raise BaseUnusable(base_id, reason)


def unusable_reason(folder: Path) -> str | None:
    """Return why the configuration files of a base say that it cannot be served, None where they do not."""
    if folder.is_file() or (not (folder / INDEX).is_file() and any(folder.glob("*.safetensors"))):
        return SINGLE_FILE
    index = _table(folder / INDEX)
    pipeline = str(index.get("_class_name", ""))
    if (medium := other_medium(pipeline)) is not None:
        return f"{pipeline} makes {medium}, and images alone are served"
    for part, entry in index.items():
        if isinstance(entry, list) and (how := _quantisation(folder / part / "config.json")) is not None:
            return f"its part '{part}' is quantised ({how}), and adapters can be fused into full weights alone"
    return None


def refusal(base_id: str, error: BaseException, *, is_hub: bool) -> LoraplexError:
    """Return what the operator reads of an error; diffusers hides the Hub's own answer behind errors of its own."""
    if isinstance(error, LoraplexError):
        return error
    if isinstance(error, RemoteCodeNotAllowed):
        return BaseUnusable(base_id, f"{error}, and no code of a base is ever run")
    causes = tuple(_causes(error))
    if (library := _missing_library(causes)) is not None:
        extra = _EXTRAS.get(library)
        how = f"pip install 'loraplex[{extra}]'" if extra else f"pip install {library}"
        return BaseUnusable(base_id, f"it needs the package {library}, which is not installed ({how})")
    if is_hub and (found := _of_the_hub(base_id, causes)) is not None:
        return found
    return BaseUnusable(base_id, "its files are missing, incomplete or not in safetensors form")


def _of_the_hub(base_id: str, causes: tuple[BaseException, ...]) -> LoraplexError | None:
    if any(isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError)) for cause in causes):
        return BaseUnusable(base_id, "its repository does not exist, or the Hub token may not read it")
    if any(isinstance(one, EntryNotFoundError) and not isinstance(one, LocalEntryNotFoundError) for one in causes):
        return BaseUnusable(base_id, f"its repository has no {INDEX}; where it has single files: {SINGLE_FILE}")
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


def _quantisation(path: Path) -> str | None:
    settings = _table(path).get("quantization_config")
    if not isinstance(settings, dict):
        return None
    return str(settings.get("quant_method", "in an unknown way"))


def _table(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
