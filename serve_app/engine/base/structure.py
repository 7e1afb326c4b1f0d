"""The structure of a base from its configuration files alone, without weights.

Owns how `model_index.json` and the components' `config.json` become a `BaseManifest`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from serve_app.engine.base.manifest import BaseManifest, manifest_of
from serve_app.errors import BaseUnusable
from serve_app.families.config_files import packed_parts

INDEX = "model_index.json"
_LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}


def adaptable_parts(index: str) -> tuple[str, ...]:
    """Return the components of a `model_index.json` that adapters can change, in the loader's order.

    Raises:
        ValueError: it names no pipeline that adapters can change.
    """
    entries: dict[str, Any] = json.loads(index)
    names: list[str] = getattr(_pipeline_class(entries), "_lora_loadable_modules", [])
    return tuple(name for name in names if entries.get(name, (None, None))[0] is not None)


def structure_of(folder: Path, base_id: str) -> BaseManifest:
    """Return the manifest of a base whose `model_index.json` and components' `config.json` lie in a folder.

    Raises:
        BaseUnusable: a file is missing, or says nothing that can be built.
    """
    # Optional packages that only other pipelines would use are of no interest here.
    transformers.utils.logging.set_verbosity_error()
    try:
        index = (folder / INDEX).read_text(encoding="utf-8")
        entries: dict[str, Any] = json.loads(index)
        pipeline_class = _pipeline_class(entries)
        # Never initialised: the manifest asks for its class and for these components, nothing else.
        pipeline: Any = object.__new__(pipeline_class)
        names = adaptable_parts(index)
        with torch.device("meta"):
            for name in names:
                pipeline.__dict__[name] = _component(folder / name, *entries[name])
        return replace(manifest_of(pipeline), fuses=not set(names) & set(packed_parts(folder)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise BaseUnusable(base_id, "its configuration files are missing or describe no base that is served") from error


def _pipeline_class(entries: dict[str, Any]) -> type:
    name = entries["_class_name"]
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise ValueError("it is a pipeline of its own code, or of another version of diffusers")
    return found


def _component(folder: Path, library: str, class_name: str) -> torch.nn.Module:
    kind: Any = getattr(_LIBRARIES[library], class_name)
    if library == "diffusers":
        return kind.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return kind(kind.config_class.from_json_file(folder / "config.json"))
