"""Loading a base model: from a folder, a single file or a Hub repository to a frozen pipeline on its device.

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
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve_app.config import BaseModelConfig, DTypeName
from serve_app.engine.base.manifest import adaptable_components
from serve_app.engine.base.parts import CONFIGURATION_FILES, files_of, load_part
from serve_app.engine.base.pipeline_setup import compile_denoiser, configure_pipeline
from serve_app.engine.base.remote_code import INDEX, check_folder, pipeline_name
from serve_app.engine.base.single_file import load_part_file, load_single_file
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
    """Where a model's files are: a folder, a file, or a Hub repository at a revision; exactly one of the three is set.

    `filename` is a single file of the repository, `config` the base whose configuration a single file has.
    """

    folder: Path | None = None
    hub: str | None = None
    revision: str | None = None
    file: Path | None = None
    filename: str | None = None
    config: ResolvedSource | None = None

    @property
    def is_single_file(self) -> bool:
        """Whether this is one file of weights."""
        return self.file is not None or self.filename is not None


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
    config = None if source.config is None else resolve_source(source.config, embedded_root)
    return ResolvedSource(source.folder, source.hub, source.revision, source.file, source.filename, config)


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
        folder = _base_folder(config, source, hub)
        check_base_folder(config.id, folder)
        dtype = resolve_dtype(config.dtype, check_folder(folder), device)
        replaced = {name: _load_part(config.id, name, part, folder, dtype, hub) for name, part in parts.items()}
        pipeline: Any
        if source.is_single_file:
            pipeline = load_single_file(_file_of(config.id, source, hub), folder, dtype, replaced)
        else:
            pipeline = DiffusionPipeline.from_pretrained(
                folder, dtype=dtype, variant=config.variant, use_safetensors=True, local_files_only=True,
                trust_remote_code=False, **replaced,
            )  # fmt: skip
    except _LOADING_ERRORS as error:
        places = (source, source.config or source, *parts.values())
        raise refusal(config.id, error, is_hub=any(place.hub is not None for place in places)) from error
    if not adaptable_components(pipeline) or getattr(pipeline, "vae", None) is None:
        raise BaseUnusable(config.id, f"{type(pipeline).__name__} draws no images that adapters could change")
    _freeze(pipeline.to(device))
    configure_pipeline(pipeline, config)
    if config.compile:
        compile_denoiser(pipeline)
    return LoadedBase(pipeline, read_card(folder))


def fetch(config: BaseModelConfig, hub: HubAccess) -> tuple[Path, ...]:
    """Fetch what `load_base` would read from the Hub into the local cache; return its folders and single files.

    Raises:
        BaseUnusable, HubUnavailable: as for `load_base`.
    """
    places: list[Path] = []
    parts = {name: resolve_source(part, None) for name, part in config.part_sources.items() if part.hub is not None}
    source = config.source
    try:
        if source.described_by.hub is not None:
            described = resolve_source(source.described_by, None)
            fetch_described = _fetch_base if source.config is None else _fetch_configuration
            places.append(fetch_described(config, described, hub))
        if source.filename is not None:
            places.append(_file_of(config.id, resolve_source(source, None), hub))
        places += [_part_place(config.id, name, part, hub) for name, part in parts.items()]
    except _LOADING_ERRORS as error:
        raise refusal(config.id, error, is_hub=True) from error
    return tuple(places)


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


def _base_folder(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a base, for a single file that of its configuration."""
    described = source.config or source
    if described.folder is not None:
        return described.folder
    return (_fetch_base if source.config is None else _fetch_configuration)(config, described, hub)


def _fetch_index(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> str:
    """Check the index of a Hub base before anything else of it is here; return its repository."""
    assert source.hub is not None
    index = _fetch_file(source.hub, INDEX, source.revision, hub)
    check_medium(config.id, pipeline_name(index.read_text(encoding="utf-8")))
    return source.hub


def _fetch_configuration(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a Hub base's configuration and tokenizers in the local cache, without its weights."""
    repository = _fetch_index(config, source, hub)
    folder = snapshot_download(
        repository, revision=source.revision, allow_patterns=CONFIGURATION_FILES,
        token=hub.token, cache_dir=hub.cache_dir,
    )  # fmt: skip
    return Path(folder)


def _fetch_base(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a Hub base in the local cache, fetching what is missing; works offline from the cache.

    Parts that the configuration replaces stay there, but for what a single file of weights needs to be read.
    """
    # Before anything else: what fetches the rest looks into the index for code to load.
    repository, replaced = _fetch_index(config, source, hub), config.part_sources
    folder = DiffusionPipeline.download(
        repository,
        revision=source.revision,
        variant=config.variant,
        use_safetensors=True,
        trust_remote_code=False,
        token=hub.token,
        cache_dir=hub.cache_dir,
        **dict.fromkeys(replaced),
    )
    for name in (f"{part}/config.json" for part, place in replaced.items() if place.is_single_file):
        _fetch_file(repository, name, source.revision, hub)
    with contextlib.suppress(EntryNotFoundError):  # it has no card, or the cache has none
        _fetch_file(repository, CARD, source.revision, hub)
    return Path(folder)


def _fetch_file(repository: str, name: str, revision: str | None, hub: HubAccess) -> Path:
    """Return a file of a Hub base as it is now; from the local cache where the Hub does not answer."""
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


def _load_part(
    base_id: str, name: str, source: ResolvedSource, folder: Path, dtype: torch.dtype, hub: HubAccess
) -> Any:
    place = _part_place(base_id, name, source, hub)
    return load_part_file(name, place, folder, dtype) if source.is_single_file else load_part(name, place, dtype)


def _part_place(base_id: str, name: str, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder or the single file of a part."""
    if source.is_single_file:
        return _file_of(base_id, source, hub)
    return source.folder or _fetch_part(name, source, hub)


def _file_of(base_id: str, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return a single file; from the Hub if it is not in the local cache."""
    if source.file is not None:
        return source.file
    assert source.hub is not None
    assert source.filename is not None
    try:
        return _fetch_file(source.hub, source.filename, source.revision, hub)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        raise BaseUnusable(base_id, f"its repository has no file {source.filename}") from None


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
