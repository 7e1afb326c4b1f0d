"""Reads a base's configuration files, before loading, for whether it can be served at all.

Pure but for reading small files, so that `loraplex check` says as much as a replica does when it starts.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from serve_app.families.family import Family
from serve_app.families.quantised import PACKAGES, SERVED, Quantization, packing_name, quantization_of
from serve_app.families.table import family_of, other_medium

INDEX = "model_index.json"
CARD = "README.md"
MAX_CARD_BYTES = 256 * 1024
SINGLE_FILE = "a single file is named by `source: {file: PATH}` or `{hub: ID, filename: NAME}`, with a `config`"
# What `pip install loraplex[...]` brings for the packages that bases need.
EXTRAS = {"torchvision": "vision", "torchao": "quantization"}


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
    return next((reason for part in _parts(index) if (reason := unusable_packing(folder, part)) is not None), None)


def family_in(folder: Path) -> Family | None:
    """Return the family that the index in a base's folder names, None where it cannot be read."""
    pipeline = _table(folder / INDEX).get("_class_name")
    return family_of(pipeline) if isinstance(pipeline, str) else None


def unusable_packing(folder: Path, part: str) -> str | None:
    """Return why the weights of a part, in the folder of a base or its own, cannot be served as they are packed."""
    packing = _packing(folder, part)
    if packing is None:
        return None
    quantization = quantization_of(packing)
    if quantization is None:
        return f"its part '{part}' is quantised ({packing_name(packing)}); {SERVED}"
    return missing_packer(quantization)


def packing_in(folder: Path, part: str) -> Quantization | None:
    """Return how the weights of a part are packed, None where they are not, or in a way that is not served."""
    return quantization_of(_packing(folder, part) or {})


def packed_parts(folder: Path) -> tuple[str, ...]:
    """Return the parts of a base whose weights are packed."""
    return tuple(part for part in _parts(_table(folder / INDEX)) if _packing(folder, part) is not None)


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


def missing_packer(quantization: Quantization) -> str | None:
    """Return the reason where the package that packs weights so is not installed."""
    package = PACKAGES[quantization]
    return missing_package(package) if find_spec(package) is None else None


def _parts(index: dict[str, Any]) -> list[str]:
    return [part for part, entry in index.items() if isinstance(entry, list)]


def _packing(folder: Path, part: str) -> dict[str, Any] | None:
    place = folder / part if (folder / part).is_dir() else folder
    settings = _table(place / "config.json").get("quantization_config")
    return cast("dict[str, Any]", settings) if isinstance(settings, dict) else None


def _table(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}
