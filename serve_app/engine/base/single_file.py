"""Weights that lie in one file under their first implementation's names, as Civitai and ComfyUI keep checkpoints.

Owns what is checked around diffusers' `from_single_file`, which leaves out weights that it does not know and says
nothing of those that it misses. Must not fetch anything.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file import FromSingleFileMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError

from serve_app.engine.base.remote_code import INDEX, pipeline_name
from serve_app.families.single_file import (
    Header,
    denoiser_elements,
    prediction_of,
    predicts_as_edm,
    read_header,
    unusable_file_reason,
)

_READING_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, SingleFileComponentError)
_OTHER_SHAPE = re.compile(r"because (\S+) expected shape \S+\((\[[\d, ]*\])\), but got \S+\((\[[\d, ]*\])\)")
_NOT_THERE = re.compile(r"^(\w+) = \w+\.from_pretrained", re.MULTILINE)
# The denoisers whose weights are as many numbers under either name.
_COUNTED = ("UNet2DConditionModel", "FluxTransformer2DModel")


class SingleFileUnusable(ValueError):
    """A single file cannot be served; the text says why and names no path."""


def load_single_file(file: Path, folder: Path, dtype: torch.dtype, parts: Mapping[str, Any]) -> Any:
    """Load a pipeline whose weights lie in `file` and whose configuration in `folder`; `parts` replaces some of them.

    Raises:
        SingleFileUnusable: it is quantised or incomplete, or has another structure than the configuration.
        OSError: a file of the configuration is missing.
    """
    header = _checked_header(file)
    kind: Any = getattr(diffusers, pipeline_name((folder / INDEX).read_text(encoding="utf-8")))
    if not issubclass(kind, FromSingleFileMixin):
        raise SingleFileUnusable(f"diffusers reads no {kind.__name__} from a single file")
    pipeline: Any = _read(kind.from_single_file, file, folder, dtype, kind.__name__, **parts)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name not in parts:
            _check_whole(name, part, header)
    pipeline.scheduler = _scheduler_for(header, pipeline.scheduler)
    return pipeline


def load_part_file(name: str, file: Path, folder: Path, dtype: torch.dtype) -> Any:
    """Load a part of a base, such as its transformer or its VAE, from a file of its own.

    Raises:
        SingleFileUnusable, OSError: as for `load_single_file`.
    """
    header = _checked_header(file)
    entry = json.loads((folder / INDEX).read_text(encoding="utf-8")).get(name) or (None, "")
    kind: Any = getattr(diffusers, str(entry[1]), None)
    if not (isinstance(kind, type) and issubclass(kind, FromOriginalModelMixin)):
        raise SingleFileUnusable(f"diffusers does not read its part '{name}' from a single file")
    part = _read(kind.from_single_file, file, folder, dtype, kind.__name__, subfolder=name)
    _check_whole(name, part, header)
    return part


def _checked_header(file: Path) -> Header:
    if (reason := unusable_file_reason(file)) is not None:
        raise SingleFileUnusable(reason)
    return read_header(file)


def _read(read: Callable[..., Any], file: Path, folder: Path, dtype: torch.dtype, kind: str, **arguments: Any) -> Any:
    try:
        return read(str(file), config=str(folder), torch_dtype=dtype, local_files_only=True, **arguments)
    except _READING_ERRORS as error:
        raise SingleFileUnusable(_cause(str(error), kind)) from error


def _cause(said: str, kind: str) -> str:
    if shapes := _OTHER_SHAPE.search(said):
        name, expected, found = shapes.groups()
        return f"its single file has another structure than its configuration: {name} is {found}, not {expected}"
    if lacking := _NOT_THERE.search(said):
        return (
            f"its single file holds no weights of '{lacking[1]}'; say in `parts` where they are, or name a file that "
            "is the denoiser alone in the `parts` of its base"
        )
    if "meta tensor" in said:
        return "its single file lacks weights of the denoiser or the VAE that its configuration describes"
    return f"its single file is not the {kind} that its configuration describes"


def _check_whole(name: str, part: torch.nn.Module, header: Header) -> None:
    tensors = part.state_dict()
    if lacking := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise SingleFileUnusable(
            f"its single file lacks {len(lacking)} of the {len(tensors)} weights of '{name}', such as {lacking[0]}"
        )
    extra = denoiser_elements(header) - sum(tensor.numel() for tensor in tensors.values())
    if type(part).__name__ in _COUNTED and extra > 0:
        raise SingleFileUnusable(f"its single file has {extra} numbers more than the '{name}' of its configuration")


def _scheduler_for(header: Header, scheduler: Any) -> Any:
    """Return the noise scheduler of the configuration as the file says that it predicts."""
    kind = type(scheduler)
    if predicts_as_edm(header) and not kind.__name__.startswith("EDM"):
        raise SingleFileUnusable(f"its single file predicts as EDM models do, and {kind.__name__} does not")
    changes = prediction_of(header)
    if unknown := sorted(changes.keys() - inspect.signature(kind).parameters.keys()):
        raise SingleFileUnusable(f"its single file asks for '{unknown[0]}', which {kind.__name__} does not take")
    return kind.from_config(scheduler.config, **changes) if changes else scheduler
