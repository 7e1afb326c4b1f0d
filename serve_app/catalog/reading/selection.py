"""Which files of a repository hold the adapter.

Pure: a listing in, candidates out, in the order in which they are to be believed. A candidate is the files that make
one adapter together: mostly one, else its shards, or a file in a folder for each model of the pipeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.catalog.reading.repository import RepositoryListing
from serve_app.errors import ModelNotFound
from serve_app.refusals import MalformedFile, NotAnAdapter, RefusedAdapter, UnsafeFile

CANONICAL = "pytorch_lora_weights.safetensors"
SAFE_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# The learned words of pivotal tuning lie beside the adapter in files of their own.
EMBEDDING_SUFFIXES = ("embeddings.safetensors", "_emb.safetensors")
INDEX_SUFFIX = ".safetensors.index.json"
MAX_FILES = 32
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# Files that peft and diffusers save for each model of a pipeline, in a folder of that model's name.
_OF_MODELS = re.compile(
    r"(?:.+/)?(?:unet|transformer|text_encoder(?:_[23])?)/(?:adapter_model|pytorch_lora_weights)(?:-\d{5}-of-\d{5})?\.safetensors"
)
# Parts of a whole pipeline, and the states of a training run, are no adapters.
_PIPELINE_FOLDERS = (
    "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "safety_checker",
    "image_encoder", "prior", "controlnet",
)  # fmt: skip

Candidate = tuple[str, ...]


def candidates(
    listing: RepositoryListing, filename: str | None, indexes: Mapping[str, Mapping[str, str]]
) -> Sequence[Sequence[Candidate]]:
    """Return what may be the adapter, the most believable first: candidates of one rank must be told apart by headers.

    `indexes` are those of the listing that say which file holds which tensor, by name.

    Raises:
        UnsafeFile: there are pickled weights only, or one was asked for.
        NotAnAdapter: there are no weights that could be an adapter, or only a part of them.
        ModelNotFound: the file that was asked for is not there.
    """
    names = [file.name for file in listing.files]
    safe = [name for name in names if name.endswith(SAFE_SUFFIX) and not name.endswith(EMBEDDING_SUFFIXES)]
    if filename is not None:
        return ((_asked(listing.id, filename, names, indexes),),)
    if CANONICAL in names:
        return (((CANONICAL,),),)
    ranks = (
        [name for name in safe if "/" not in name],
        [name for name in safe if "/" in name and not _is_part(name)],
    )
    found = [_joined(rank, indexes) for rank in ranks if rank]
    of_models = [name for name in safe if _OF_MODELS.fullmatch(name) and not _is_state(name)]
    if len({name.rpartition("/")[0].rpartition("/")[0] for name in of_models}) == 1:
        found.append([tuple(sorted(of_models, key=lambda name: ("text_encoder" in name, name)))])
    if not found:
        raise _nothing(listing, names)
    for candidate in (one for rank in found for one in rank):
        _check_whole(listing.id, candidate, indexes)
    return found


def indexes_of(listing: RepositoryListing) -> list[str]:
    """Return the files that may say which tensor of an adapter lies in which file."""
    stems = [file.name.removesuffix(INDEX_SUFFIX) for file in listing.files if file.name.endswith(INDEX_SUFFIX)]
    own = [stem for stem in stems if "/" not in stem or not _is_part(stem) or _OF_MODELS.fullmatch(stem + SAFE_SUFFIX)]
    return [stem + INDEX_SUFFIX for stem in own[:MAX_FILES]]


def read_index(model: str, name: str, content: bytes) -> dict[str, str]:
    """Return what an index says: the name of a tensor -> the listed name of its file; nothing where it says nothing.

    Raises:
        MalformedFile: it is no index.
    """
    try:
        table: Any = json.loads(content)
        folder = name.rpartition("/")[0]
        return {str(key): f"{folder}/{file}".lstrip("/") for key, file in table.get("weight_map", {}).items()}
    except (ValueError, RecursionError, AttributeError):
        raise MalformedFile(model, f"'{name}' is no index of the files that the adapter is cut into") from None


def _joined(names: Sequence[str], indexes: Mapping[str, Mapping[str, str]]) -> list[Candidate]:
    """Return files by adapter: those that an index or their numbers join are one."""
    groups: dict[str, list[str]] = {}
    index_of = {file: index.removesuffix(INDEX_SUFFIX) for index, files in indexes.items() for file in files.values()}
    for name in sorted(names):
        shard = _SHARD.fullmatch(name)
        groups.setdefault(index_of.get(name) or (shard[1] if shard else name), []).append(name)
    return [tuple(files) for files in groups.values()]


def _check_whole(model: str, files: Candidate, indexes: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse an adapter of which a file is missing: the rest would be a part of it."""
    wanted = {name for index in indexes.values() if set(index.values()) & set(files) for name in index.values()}
    for shard in filter(None, map(_SHARD.fullmatch, files)):
        numbers = range(1, min(int(shard[3]), MAX_FILES) + 1)
        wanted |= {f"{shard[1]}-{number:05}-of-{shard[3]}{SAFE_SUFFIX}" for number in numbers}
    missing = sorted(wanted - set(files))
    if missing:
        raise NotAnAdapter(model, f"it is cut into several files, of which '{missing[0]}' is missing")
    if len(files) > MAX_FILES:
        raise NotAnAdapter(model, f"it is cut into {len(files)} files; at most {MAX_FILES} are read")


def _asked(model: str, filename: str, names: list[str], indexes: Mapping[str, Mapping[str, str]]) -> Candidate:
    if filename not in names:
        raise ModelNotFound(model, f"it holds no file '{filename}'")
    stem = filename.removesuffix(INDEX_SUFFIX)
    for files in _joined([name for name in names if name.endswith(SAFE_SUFFIX)], indexes):
        shard = _SHARD.fullmatch(files[0])
        if stem != filename and (files[0] in indexes.get(filename, {}).values() or (shard and shard[1] == stem)):
            _check_whole(model, files, indexes)
            return files
        if filename in files and (shard or len(files) > 1):
            raise NotAnAdapter(
                model,
                f"'{filename}' is one of the files that the adapter is cut into: name their index "
                f"('*{INDEX_SUFFIX}'), or leave 'filename' out",
            )
    if not filename.endswith(SAFE_SUFFIX):
        raise UnsafeFile(model, f"'{filename}' is not a safetensors file, and no other kind is read")
    return (filename,)


def embeddings_beside(listing: RepositoryListing, adapter: str) -> str | None:
    """Return the file in the adapter's folder with the words that it teaches the text encoders, or None.

    Trainers name it after the repository or the adapter's file, or simply `embeddings`. Another name is taken where
    the folder holds one such file and one adapter.
    """
    folder, _, filename = adapter.rpartition("/")
    beside = [file.name for file in listing.files if file.name.rpartition("/")[0] == folder]
    stem, repository = filename.removesuffix(SAFE_SUFFIX), listing.id.rpartition("/")[2]
    prefix = f"{folder}/" if folder else ""
    for name in (f"{stem}_emb", f"{repository}_emb", f"{stem}_embeddings", "embeddings"):
        if prefix + name + SAFE_SUFFIX in beside and name != stem:
            return prefix + name + SAFE_SUFFIX
    safe = [name for name in beside if name.endswith(SAFE_SUFFIX)]
    found = [name for name in safe if name.endswith(EMBEDDING_SUFFIXES) and name != adapter]
    return found[0] if len(found) == 1 and len(safe) == 2 else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_part(name: str) -> bool:
    return name.split("/")[0] in _PIPELINE_FOLDERS or _is_state(name)


def _is_state(name: str) -> bool:
    return any(folder.startswith("checkpoint") for folder in name.split("/")[:-1])


def _nothing(listing: RepositoryListing, names: list[str]) -> RefusedAdapter:
    if "model_index.json" in names:
        return NotAnAdapter(listing.id, "it is a whole model, not an adapter of one that is served")
    pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickled:
        shown = ", ".join(pickled[:3])
        return UnsafeFile(
            listing.id, f"it offers pickled weights only ({shown}), which can run code; publish safetensors"
        )
    parts = [name for name in names if name.endswith(SAFE_SUFFIX)]
    if parts:
        return NotAnAdapter(
            listing.id,
            f"its safetensors files lie where parts of whole models or of training runs do ({_some(parts)}); if one of "
            "them is the adapter, name it as 'filename'",
        )
    return NotAnAdapter(listing.id, "it holds no safetensors file")
