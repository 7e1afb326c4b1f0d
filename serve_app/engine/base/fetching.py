"""Where the files of a base lie: in folders, in single files, or on the Hub and then in the local cache.

Owns the ways from a configured source to files on this machine. Must not load a weight.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
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
from huggingface_hub.utils import filter_repo_objects

from serve_app.config import BaseModelConfig
from serve_app.engine.base.parts import CONFIGURATION_FILES, files_of
from serve_app.engine.base.remote_code import INDEX, pipeline_name
from serve_app.engine.base.unusable import check_medium
from serve_app.errors import BaseUnusable
from serve_app.families.config_files import CARD
from serve_app.settings import ModelSource

INDEX_TIMEOUT_S = 10.0


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
class HubNeed:
    """What a base has of one Hub repository: what fits the patterns, and the weights of `whole`, if that is said.

    The Hub's client has the last word: what is left out here it fetches, and what is too much lies there unused.
    """

    repository: str
    revision: str | None
    patterns: tuple[str, ...]
    whole: BaseModelConfig | None = None

    def choose(self, names: Collection[str]) -> set[str]:
        """Return those of a repository's files that are needed."""
        chosen = set(filter_repo_objects(names, allow_patterns=list(self.patterns)))
        if self.whole is None:
            return chosen
        return chosen | _weights_among(names, self.whole)


def _weights_among(names: Iterable[str], config: BaseModelConfig) -> set[str]:
    """Return the files of a base's folder from which diffusers reads weights, without parts that are replaced."""
    replaced = config.part_sources
    tensors = {name for name in names if name.endswith(".safetensors") and name.partition("/")[0] not in replaced}
    weights: Any
    try:
        weights = variant_compatible_siblings(tensors, variant=config.variant)[0]
    except ValueError:  # only parts that are replaced come in the variant, if any does
        weights = variant_compatible_siblings(tensors)[0]
    return set(weights)


def weights_in(place: Path, config: BaseModelConfig) -> tuple[Path, ...]:
    """Return the files of weights that are read from the folder of a base or of a part, or from a single file."""
    if place.is_file():
        return (place,)
    names = {path.relative_to(place).as_posix() for path in place.rglob("*.safetensors")}
    if (place / INDEX).exists():  # whose own folder may hold a single file of the same weights
        names = _weights_among((name for name in names if "/" in name), config)
    return tuple(place / name for name in sorted(names))


def hub_needs(config: BaseModelConfig) -> tuple[HubNeed, ...]:
    """Return what the functions of this module would fetch from the Hub for a base."""
    source, described = config.source, config.source.described_by
    needs: list[HubNeed] = []
    if described.hub is not None:
        whole = config if source.config is None else None
        needs.append(HubNeed(described.hub, described.revision, tuple(CONFIGURATION_FILES), whole))
    parts = config.part_sources
    for name, place in (*parts.items(), *([("", source)] if source.filename is not None else [])):
        if place.hub is not None:
            patterns = files_of(name) if place.filename is None else [glob.escape(place.filename)]
            needs.append(HubNeed(place.hub, place.revision, tuple(patterns)))
    return tuple(needs)


def resolve_source(source: ModelSource, embedded_root: Path | None) -> ResolvedSource:
    """Turn a configured source into a place: embedded models are folders under `embedded_root`."""
    if source.embedded is not None:
        if embedded_root is None:
            raise ValueError(f"'{source.embedded}' is embedded, but this installation has no embedded models")
        return ResolvedSource(folder=embedded_root / source.embedded)
    config = None if source.config is None else resolve_source(source.config, embedded_root)
    return ResolvedSource(source.folder, source.hub, source.revision, source.file, source.filename, config)


def base_folder(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a base, for a single file that of its configuration."""
    described = source.config or source
    if described.folder is not None:
        return described.folder
    return (fetch_base if source.config is None else fetch_configuration)(config, described, hub)


def _fetch_index(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> str:
    """Check the index of a Hub base before anything else of it is here; return its repository."""
    assert source.hub is not None
    index = _fetch_file(source.hub, INDEX, source.revision, hub)
    check_medium(config.id, pipeline_name(index.read_text(encoding="utf-8")))
    return source.hub


def fetch_configuration(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a Hub base's configuration and tokenizers in the local cache, without its weights."""
    repository = _fetch_index(config, source, hub)
    folder = snapshot_download(
        repository, revision=source.revision, allow_patterns=CONFIGURATION_FILES,
        token=hub.token, cache_dir=hub.cache_dir,
    )  # fmt: skip
    return Path(folder)


def fetch_base(config: BaseModelConfig, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder of a Hub base in the local cache, fetching what is missing; works offline from the cache.

    Parts that the configuration replaces stay there, but for what a single file of weights needs to be read.
    """
    # Before anything else: the download of the rest looks into the index for code to load.
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


def part_place(base_id: str, name: str, source: ResolvedSource, hub: HubAccess) -> Path:
    """Return the folder or the single file of a part."""
    if source.is_single_file:
        return single_file(base_id, source, hub)
    return source.folder or _fetch_part(name, source, hub)


def single_file(base_id: str, source: ResolvedSource, hub: HubAccess) -> Path:
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
