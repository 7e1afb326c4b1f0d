"""Adapters of many kinds for a tiny SD1.5, read once, and what a fresh base holds with them."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter, bytes_of
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import as_kohya, everything, full, loha, lokr, lora
from tests.tiny_forms import Form, output_projection, put, with_text

ADAPTERS = {
    "attention": lambda pipe: lora(pipe, seed=1),
    "everything": lambda pipe: lora(pipe, chooses=everything, seed=2),
    "text": lambda pipe: with_text(pipe, seed=3),
    "dora": lambda pipe: lora(pipe, dora=True, seed=4),
    "wide dora": lambda pipe: lora(pipe, chooses=everything, dora=True, seed=7),
    "bias": lambda pipe: lora(pipe, chooses=output_projection, bias=True, seed=5),
    "kohya": lambda pipe: as_kohya(lora(pipe, rank=7, seed=6), alpha=3),
    "loha": loha,
    "lokr": lokr,
    "full": full,
}
BROKEN = "broken"
Members = tuple[tuple[str, float], ...]


@functools.cache
def adapter(name: str, dtype: torch.dtype) -> ParsedAdapter:
    """Read an adapter once; the broken one has good layers before the one that fails."""
    if name == BROKEN:
        good = adapter("attention", dtype).components["unet"]
        strange = LowRank(torch.ones(1, 3), torch.ones(3, 1), 1.0, 1.0)
        return ParsedAdapter(BROKEN, {"unet": {**good, "no.such.layer": strange}}, Coverage(1, 1))
    pipeline = tiny_pipeline("sd15", dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), name, Form(ADAPTERS[name](pipeline)))
        return parse_adapter(path, name, manifest_of(pipeline), AdapterLimits())


def composition(members: Members, dtype: torch.dtype) -> list[tuple[ParsedAdapter, float]]:
    """Return the adapters of a composition with their scales."""
    return [(adapter(name, dtype), scale) for name, scale in members]


def digest_of(components: Mapping[str, torch.nn.Module]) -> str:
    """Return the digest of what is bound."""
    digest = hashlib.sha256()
    for component in components.values():
        for parameter in component.parameters():
            digest.update(bytes_of(parameter.data.contiguous()))
    return digest.hexdigest()


@functools.cache
def freshly_bound(members: Members, dtype: torch.dtype) -> str:
    """Return the digest of what a base that has seen nothing else holds with this composition."""
    components = adaptable_components(tiny_pipeline("sd15", dtype))
    FusedWeights(components).apply(composition(members, dtype))
    return digest_of(components)
