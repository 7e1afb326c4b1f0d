"""Words that an adapter teaches a base's text encoders (textual inversion, pivotal tuning).

Owns what the file beside an adapter may hold, and what the words are called: `<s0>`, `<s1>`, ... in the file's order.
Must not touch a live model: `vocabularies` lends the words to one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import ParsedAdapter, dtype_named
from serve_app.engine.adapters.safetensors_file import read_tensor_file, shown
from serve_app.engine.base.manifest import BaseManifest, Vocabulary
from serve_app.errors import MalformedRequest
from serve_app.refusals import MalformedFile, NonFinite, ShapeMismatch, UnsupportedMethod
from serve_app.settings import AdapterLimits

MAX_TI_TOKENS = 256
# How trainers call the text encoders of each kind, in the pipeline's order.
NAMES = {"clip": ("clip_l", "clip_g"), "t5": ("t5",)}
# Words within the adapter's file, and how the oldest form of an embedding calls its one encoder.
_BUNDLED = re.compile(r"bundle_emb\.[^.]{1,128}\.(clip_l|clip_g|t5|string_to_param\.\*)")
_BUNDLED_NAMES = {"string_to_param.*": "clip_l"}


def word(place: int) -> str:
    """Return how a prompt names a word of an adapter."""
    return f"<s{place}>"


def bundled_ti_tokens(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a file's tensors without the words that OneTrainer and A1111 bundle with it, and those words by encoder.

    Several words follow each other in the file's order, as those of one embeddings file do.
    """
    others: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        match = _BUNDLED.fullmatch(key)
        if match is None or not 1 <= tensor.ndim <= 2 or not tensor.is_floating_point():
            others[key] = tensor
        else:
            rows.setdefault(_BUNDLED_NAMES.get(match[1], match[1]), []).append(torch.atleast_2d(tensor.float()))
    aligned = all(len({part.shape[1] for part in parts}) == 1 for parts in rows.values())
    return (others, {key: torch.cat(parts) for key, parts in rows.items()}) if aligned else (dict(tensors), {})


def with_ti_tokens(
    adapter: ParsedAdapter,
    bundled: Mapping[str, Tensor],
    path: Path | None,
    name: str,
    manifest: BaseManifest,
    limits: AdapterLimits,
) -> ParsedAdapter:
    """Return an adapter with its own words: those `bundled` with it, and of the embeddings file that lies beside it.

    Its digest covers both files.

    Raises:
        RefusedAdapter: one of its subclasses, saying which tensor, and why.
    """
    if not manifest.vocabularies:
        reason = f"it brings embeddings for words of its own, which are not served on {manifest.pipeline}"
        raise UnsupportedMethod(name, reason)
    beside = None if path is None else read_tensor_file(path, name, limits)
    if beside is not None and bundled:
        raise MalformedFile(name, "it bundles embeddings, and others lie beside it: which of them are meant is open")
    tensors = bundled if beside is None else beside.tensors
    known = _known_keys(manifest.vocabularies)
    ti_tokens: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        component = known.get(key)
        if component is None:
            reason = f"its embeddings hold {shown(key)}, but the text encoders of this base are {', '.join(known)}"
            raise MalformedFile(name, reason)
        if component in ti_tokens:
            raise MalformedFile(name, f"its embeddings hold {shown(key)} beside the same text encoder by another name")
        ti_tokens[component] = _rows(tensor, key, name, manifest.vocabularies[component])
    digest = adapter.digest
    if beside is not None:
        digest = hashlib.sha256(f"{digest}{beside.digest}".encode()).hexdigest()
    ordered = {component: ti_tokens[component] for component in manifest.vocabularies if component in ti_tokens}
    return dataclasses.replace(adapter, digest=digest, ti_tokens=ordered)


def ti_tokens_of(adapters: Iterable[ParsedAdapter]) -> Mapping[str, Tensor]:
    """Return the words that a request's adapters bring.

    Raises:
        MalformedRequest: two of them bring words, which have the same names.
    """
    teaching = [adapter.ti_tokens for adapter in adapters if adapter.ti_tokens]
    if len(teaching) > 1:
        raise MalformedRequest(
            f"{len(teaching)} of the adapters bring words of their own, all called {word(0)}, {word(1)}, ...; "
            "name only one of them in a request"
        )
    return teaching[0] if teaching else {}


def _known_keys(vocabularies: Mapping[str, Vocabulary]) -> dict[str, str]:
    """Return key -> component: by place in the pipeline, and by kind."""
    keys = {f"text_encoders_{place}": component for place, component in enumerate(vocabularies)}
    names = {kind: iter(names) for kind, names in NAMES.items()}
    for component, vocabulary in vocabularies.items():
        name = next(names[vocabulary.kind], None)
        if name is not None:
            keys[name] = component
    return keys


def _rows(tensor: Tensor, key: str, name: str, vocabulary: Vocabulary) -> Tensor:
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or rows.shape[1] != vocabulary.width:
        raise ShapeMismatch(
            name, f"its embeddings {shown(key)} have shape {list(tensor.shape)}, but words are {vocabulary.width} wide"
        )
    if not 1 <= len(rows) <= MAX_TI_TOKENS:
        raise MalformedFile(
            name, f"its embeddings {shown(key)} hold {len(rows)} words; from 1 to {MAX_TI_TOKENS} are read"
        )
    rows = rows.to(dtype_named(vocabulary.dtype))
    if not rows.isfinite().all():
        raise NonFinite(name, f"its embeddings {shown(key)} have NaN or infinite values")
    return rows
