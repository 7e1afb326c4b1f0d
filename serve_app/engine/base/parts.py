"""Parts of a base that come from elsewhere: a VAE that replaces its own, or a text encoder that it lacks.

Owns where such a part lies in its folder or repository, and how it is loaded. No code of a repository is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.modeling_utils import ModelMixin

from serve_app.engine.base.remote_code import RemoteCodeNotAllowed

_CONFIGURATIONS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
# Patterns reach into folders: these are all files of a repository but its weights and its code.
CONFIGURATION_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
_FILES = ("*.json", "*.model", "*.txt", "*.safetensors", "*.jinja")


def files_of(part: str) -> list[str]:
    """Return the patterns of the files that a repository which is or holds a part is fetched for."""
    return [*_FILES, *(f"{part}/{pattern}" for pattern in _FILES)]


def part_folder(name: str, folder: Path) -> Path:
    """Return where a part lies: a folder of another base has it under its name, a part alone lies at the top."""
    return folder / name if (folder / name).is_dir() else folder


def load_part(name: str, folder: Path, dtype: torch.dtype, packing: Any = None) -> Any:
    """Load a part that is the folder itself, or what lies there under its name; `packing` says how to quantise it.

    Raises:
        RemoteCodeNotAllowed: it asks for code of its own.
        ValueError: it is no model, tokenizer or processor of diffusers or transformers.
        OSError: a file is missing.
    """
    place = part_folder(name, folder)
    configs = {file: _table(place / file) for file in _CONFIGURATIONS}
    if any("auto_map" in config for config in configs.values()):
        raise RemoteCodeNotAllowed(f"its part '{name}' maps a class to code of its own")
    local = {"local_files_only": True}
    if name.startswith(("tokenizer", "processor")):
        kind = transformers.AutoTokenizer if name.startswith("tokenizer") else transformers.AutoProcessor
        return kind.from_pretrained(place, trust_remote_code=False, **local)
    kind = _model_class(configs["config.json"])
    return kind.from_pretrained(place, dtype=dtype, use_safetensors=True, quantization_config=packing, **local)


def _model_class(config: dict[str, Any]) -> Any:
    """Return the class that a model's configuration names, one of the two libraries' own."""
    if "_class_name" in config:
        kind, parent = getattr(diffusers, str(config["_class_name"]), None), ModelMixin
    else:
        (architecture,) = config.get("architectures") or ("",)
        kind, parent = getattr(transformers, architecture, None), transformers.PreTrainedModel
    if not (isinstance(kind, type) and issubclass(kind, parent)):
        raise ValueError("it is no model")
    return kind


def _table(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
