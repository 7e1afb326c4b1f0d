"""Loading a base model: from a folder or a Hub repository to a frozen pipeline on its device.

Owns where the weights lie, their dtype and the parts from elsewhere. Must not know requests or
adapters. Weights are read from safetensors alone, and no code of a repository is ever run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import httpx2
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve_app.config import BaseModelConfig, DTypeName
from serve_app.engine.base.manifest import adaptable_components
from serve_app.engine.base.parts import files_of, load_part
from serve_app.engine.base.pipeline_setup import compile_denoiser, configure_pipeline
from serve_app.engine.base.remote_code import INDEX, check_folder, pipeline_name
from serve_app.engine.base.unusable import check_base_folder, check_medium, refusal
from serve_app.errors import BaseUnusable
from serve_app.families.config_files import CARD, read_card
from serve_app.settings import ModelSource

# These overflow nowhere in half precision but in SDXL's own VAE, which its configuration says
# (`force_upcast`). Newer families were trained in bfloat16 and overflow in float16.
_FLOAT16_FAMILIES = ("StableDiffusion", "StableDiffusionXL", "LatentConsistencyModel")

INDEX_TIMEOUT_S = 10.0
_LOADING_ERRORS = (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, BaseUnusable)


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """Where a model's files are: a folder, or a Hub repository at a revision. Exactly one of the two is set."""

    folder: Path | None = None
    hub: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How the Hub is reached: `token` None means without one, `cache_dir` None the Hub client's own cache.

    The endpoint is the Hub client's, which it takes from its environment.
    """

    token: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen pipeline on its device, and the text of its model card where it has one."""

    pipeline: Any
    card: str = ""


def resolve_source(source: ModelSource, embedded_root: Path | None) -> ResolvedSource:
    """Turn a configured source into a place: embedded models are folders under `embedded_root`."""
    if source.embedded is not None:
        if embedded_root is None:
            raise ValueError(f"'{source.embedded}' is embedded, but this installation has no embedded models")
        return ResolvedSource(folder=embedded_root / source.embedded)
    return ResolvedSource(folder=source.folder, hub=source.hub, revision=source.revision)


def default_device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(
    config: BaseModelConfig,
    source: ResolvedSource,
    parts: Mapping[str, ResolvedSource],
    *,
    device: torch.device,
    hub: HubAccess,
) -> LoadedBase:
    """Load a base, freeze it, move it to `device` and set it up as the configuration says.

    Its components are those of its own `model_index.json`: a base that comes with a safety checker keeps it.
    `parts` replaces some of them.

    Raises:
        BaseUnusable: its files are missing, incomplete, pickled, quantised, need code of their own or a package that
            is not installed, or are no image model; the sentence says which.
        HubUnavailable: the Hub did not answer and the local cache does not have all files.
    """
    _quieten()
    try:
        folder = source.folder or _fetch_base(config, source, hub)
        check_base_folder(config.id, folder)
        dtype = resolve_dtype(config.dtype, check_folder(folder), device)
        folders = {name: part.folder or _fetch_part(name, part, hub) for name, part in parts.items()}
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, variant=config.variant, use_safetensors=True, local_files_only=True,
            trust_remote_code=False, **{name: load_part(name, place, dtype) for name, place in folders.items()},
        )  # fmt: skip
    except _LOADING_ERRORS as error:
        raise refusal(config.id, error, is_hub=source.hub is not None) from error
    if not adaptable_components(pipeline) or getattr(pipeline, "vae", None) is None:
        raise BaseUnusable(config.id, f"{type(pipeline).__name__} draws no images that adapters could change")
    _freeze(pipeline.to(device))
    configure_pipeline(pipeline, config)
    if config.compile:
        compile_denoiser(pipeline)
    return LoadedBase(pipeline, read_card(folder))


def fetch(config: BaseModelConfig, hub: HubAccess) -> tuple[Path, ...]:
    """Fetch what `load_base` would read from the Hub into the local cache; return its folders, none for a local base.

    Raises:
        BaseUnusable, HubUnavailable: as for `load_base`.
    """
    folders: list[Path] = []
    try:
        if config.source.hub is not None:
            folders.append(_fetch_base(config, resolve_source(config.source, None), hub))
        for name, part in config.part_sources.items():
            if part.hub is not None:
                folders.append(_fetch_part(name, resolve_source(part, None), hub))
    except _LOADING_ERRORS as error:
        raise refusal(config.id, error, is_hub=True) from error
    return tuple(folders)


def resolve_dtype(name: DTypeName, class_name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to load in; "auto" is float32 on a CPU, else what the pipeline's family was trained for."""
    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    if device.type == "cpu":
        return torch.float32
    family = class_name.removesuffix("Pipeline")
    return torch.float16 if family in _FLOAT16_FAMILIES else torch.bfloat16


def _quieten() -> None:
    """Silence the bars and the warnings that quote prompts: a server's log is no place for either."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _fetch_base(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a Hub base in the local cache, fetching what is missing; works offline from the cache."""
    assert source.hub is not None
    # Before anything else of it is here: what fetches the rest looks into the index for code to load.
    index = _fetch_small(source.hub, INDEX, source.revision, hub)
    check_medium(config.id, pipeline_name(index.read_text(encoding="utf-8")))
    folder = DiffusionPipeline.download(
        source.hub,
        revision=source.revision,
        variant=config.variant,
        use_safetensors=True,
        trust_remote_code=False,
        token=hub.token,
        cache_dir=hub.cache_dir,
    )
    with contextlib.suppress(EntryNotFoundError):  # it has no card, or the cache has none
        _fetch_small(source.hub, CARD, source.revision, hub)
    return Path(folder)


def _fetch_small(repository: str, name: str, revision: str | None, hub: HubAccess) -> Path:
    """Return a small file of a Hub base as it is now; from the local cache where the Hub does not answer."""
    is_away = False
    try:
        # Asked for first because this does not retry: the download of a file would, for most of a minute.
        url = hf_hub_url(repository, name, revision=revision)
        get_hf_file_metadata(url, token=hub.token, timeout=INDEX_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        raise
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError):
        is_away = True
    path = hf_hub_download(
        repository, name, revision=revision, token=hub.token, cache_dir=hub.cache_dir, local_files_only=is_away
    )
    return Path(path)


def _fetch_part(name: str, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a Hub repository that is a part of a base or holds one, without its other models."""
    assert source.hub is not None
    folder = snapshot_download(
        source.hub, revision=source.revision, allow_patterns=files_of(name), token=hub.token, cache_dir=hub.cache_dir
    )
    return Path(folder)


def _freeze(pipeline: Any) -> None:
    """Clear gradients everywhere: matmul kernels are chosen by `requires_grad`, so bits would depend on it."""
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(requires_grad=False).eval()
