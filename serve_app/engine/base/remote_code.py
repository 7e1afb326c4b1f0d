"""Checks that a base's own index makes the loader build classes of diffusers and transformers, and nothing else.

Owns the check before anything of a base is loaded or even fetched. The libraries have refusals of their own, which this
does not rely on.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
_CONFIGURATIONS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")


class RemoteCodeNotAllowed(ValueError):
    """A base asks for code that is neither of the libraries; the text says which part does."""


def pipeline_name(index: str) -> str:
    """Return the pipeline class that a `model_index.json` names, once it is seen to ask for no code of its own.

    Raises:
        RemoteCodeNotAllowed: it does.
        ValueError: it is no index of a pipeline.
    """
    entries = _entries(index)
    name = entries["_class_name"]
    known = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, DiffusionPipeline)):
        raise RemoteCodeNotAllowed("its pipeline is none of diffusers' own")
    for part, entry in entries.items():
        if isinstance(entry, list) and not part.startswith("_"):
            _check_part(part, entry)
    return name


def check_folder(folder: Path) -> str:
    """Return the same for a whole base, with the configurations of its parts looked at, too.

    Raises:
        RemoteCodeNotAllowed, ValueError: as for `pipeline_name`.
        OSError: a file cannot be read.
    """
    index = (folder / INDEX).read_text(encoding="utf-8")
    name = pipeline_name(index)
    for part, entry in _entries(index).items():
        # Classes that choose others by a configuration are the only ones that heed its map of code.
        if isinstance(entry, list) and len(entry) == 2 and str(entry[1]).startswith("Auto"):
            for path in (folder / part / name_ for name_ in _CONFIGURATIONS):
                if path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
                    raise RemoteCodeNotAllowed(f"its part '{part}' maps a class to code of its own")
    return name


def _entries(index: str) -> dict[str, Any]:
    entries = json.loads(index)
    if not isinstance(entries, dict) or "_class_name" not in entries:
        raise ValueError("it names no pipeline")
    return entries


def _check_part(part: str, entry: list[Any]) -> None:
    if len(entry) != 2 or not all(value is None or isinstance(value, str) for value in entry):
        return  # a setting of the pipeline, such as a list of layers
    library = entry[0]
    if library is None or library in LIBRARIES or _is_pipeline_module(library):
        return
    raise RemoteCodeNotAllowed(f"its part '{part}' is of neither diffusers nor transformers")


def _is_pipeline_module(name: Any) -> bool:
    """Say whether a part's class is one that comes with a pipeline of diffusers, such as its safety checker."""
    found = getattr(diffusers.pipelines, name, None) if isinstance(name, str) and name.isidentifier() else None
    return isinstance(found, ModuleType) and hasattr(found, "__path__")
