"""Which file of a repository holds the adapter.

Pure: a listing in, candidate names out, in the order in which they are to be believed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from serve_app.catalog.reading.repository import RepositoryListing
from serve_app.errors import ModelNotFound
from serve_app.refusals import NotAnAdapter, RefusedAdapter, UnsafeFile

CANONICAL = "pytorch_lora_weights.safetensors"
SAFE_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# The learned words of pivotal tuning lie beside the adapter in files of their own.
EMBEDDING_SUFFIXES = ("embeddings.safetensors", "_emb.safetensors")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
# Parts of a whole pipeline, and the states of a training run, are no adapters.
_PIPELINE_FOLDERS = (
    "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "safety_checker",
    "image_encoder", "prior", "controlnet",
)  # fmt: skip


def candidates(listing: RepositoryListing, filename: str | None) -> tuple[str, ...]:
    """Return the files that may be the adapter: one where the name decides, several where headers must.

    Raises:
        UnsafeFile: there are pickled weights only, or one was asked for.
        NotAnAdapter: there are no weights that could be an adapter.
        ModelNotFound: the file that was asked for is not there.
    """
    names = [file.name for file in listing.files]
    if filename is not None:
        return (_asked(listing.id, filename, names),)
    if CANONICAL in names:
        return (CANONICAL,)
    safe = [name for name in names if name.endswith(SAFE_SUFFIX) and not name.endswith(EMBEDDING_SUFFIXES)]
    at_root = [name for name in safe if "/" not in name]
    nested = [name for name in safe if "/" in name and not _is_part(name)]
    found = tuple(sorted(at_root or nested))
    # What peft saves for each model of a pipeline lies in a folder of that model's name.
    of_parts = () if found else tuple(sorted(name for name in safe if name.endswith("/adapter_model.safetensors")))
    found = found or of_parts
    if len(of_parts) > 1 or any(_SHARD.search(name) for name in found):
        what = f"it lies in {len(found)} files ({_some(found)}), and only adapters in one file are served"
        raise NotAnAdapter(listing.id, f"{what}: publish it as one")
    if not found:
        raise _nothing(listing, names)
    return found


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


def _asked(model: str, filename: str, names: list[str]) -> str:
    if _SHARD.search(filename) and filename in names:
        raise NotAnAdapter(model, f"'{filename}' is one of the files that the adapter is cut into: publish them as one")
    if filename not in names:
        raise ModelNotFound(model, f"it holds no file '{filename}'")
    if not filename.endswith(SAFE_SUFFIX):
        raise UnsafeFile(model, f"'{filename}' is not a safetensors file, and no other kind is read")
    return filename


def _is_part(name: str) -> bool:
    folders = name.split("/")[:-1]
    return folders[0] in _PIPELINE_FOLDERS or any(folder.startswith("checkpoint") for folder in folders)


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
