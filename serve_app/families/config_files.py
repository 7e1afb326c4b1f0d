"""Reads a base's configuration files, before loading, for whether it can be served at all.

Pure but for reading small files, so that `loraplex check` says as much as a replica does when it starts.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from serve_app.families.table import family_of, other_medium

INDEX = "model_index.json"
CARD = "README.md"
MAX_CARD_BYTES = 256 * 1024
SINGLE_FILE = "a single file is named by `source: {file: PATH}` or `{hub: ID, filename: NAME}`, with a `config`"
# What `pip install loraplex[...]` brings for the packages that bases need.
EXTRAS = {"torchvision": "vision"}


def unusable_reason(folder: Path) -> str | None:
    """Return why the configuration files of a base say that it cannot be served, None where they do not."""
    if folder.is_file() or (not (folder / INDEX).is_file() and any(folder.glob("*.safetensors"))):
        return f"it has no {INDEX}, which a folder of a base has; {SINGLE_FILE}"
    index = _table(folder / INDEX)
    pipeline = str(index.get("_class_name", ""))
    if (medium := other_medium(pipeline)) is not None:
        return f"{pipeline} makes {medium}, and only images are served"
    if family_of(pipeline).needs_torchvision and find_spec("torchvision") is None:
        return missing_package("torchvision")
    for part, entry in index.items():
        if isinstance(entry, list) and (how := _quantisation(folder / part / "config.json")) is not None:
            return f"its part '{part}' is quantised ({how}), and adapters can be fused into full weights only"
    return None


def read_card(folder: Path) -> str:
    """Return the beginning of the model card in a folder, nothing where there is none."""
    try:
        with (folder / CARD).open("rb") as file:
            return file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def missing_package(name: str) -> str:
    """Return the reason where a base needs a package that is not installed."""
    extra = EXTRAS.get(name)
    how = f"pip install 'loraplex[{extra}]'" if extra else f"pip install {name}"
    return f"it needs the package {name}, which is not installed ({how})"


def _quantisation(path: Path) -> str | None:
    settings = _table(path).get("quantization_config")
    if not isinstance(settings, dict):
        return None
    return str(cast("dict[str, Any]", settings).get("quant_method", "in an unknown way"))


def _table(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}
