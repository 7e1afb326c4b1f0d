"""Whatever was applied, failed or rescaled before, what is bound equals what a fresh base would have."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import AdapterLimits
from serve_app.engine.adapter import Coverage, LowRank, ParsedAdapter, bytes_of
from serve_app.engine.manifest import adaptable_components, manifest_of
from serve_app.engine.reader import read_adapter
from serve_app.engine.weights import AdapterWeights
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import as_kohya, everything, full, loha, lokr, lora
from tests.tiny_forms import Form, output_projection, put, with_text

ADAPTERS = {
    "attention": lambda pipe: lora(pipe, seed=1),
    "everything": lambda pipe: lora(pipe, chooses=everything, seed=2),
    "text": lambda pipe: with_text(pipe, seed=3),
    "dora": lambda pipe: lora(pipe, chooses=everything, dora=True, seed=4),
    "bias": lambda pipe: lora(pipe, chooses=output_projection, bias=True, seed=5),
    "kohya": lambda pipe: as_kohya(lora(pipe, rank=7, seed=6), alpha=3),
    "loha": loha,
    "lokr": lokr,
    "full": full,
}
BROKEN = "broken"
SCALES = (0.0, 0.3, -1.0, 1.0, 2.5)
MEMBERS = st.tuples(st.sampled_from([*ADAPTERS, BROKEN]), st.sampled_from(SCALES))
HISTORIES = st.lists(st.lists(MEMBERS, max_size=3, unique_by=lambda member: member[0]), min_size=1, max_size=8)


@functools.cache
def adapter(name: str, dtype: torch.dtype) -> ParsedAdapter:
    """Read an adapter once; the broken one has a good layer before the one that fails."""
    if name == BROKEN:
        good = adapter("attention", dtype).components["unet"]
        strange = LowRank(torch.ones(1, 3), torch.ones(3, 1), 1.0, 1.0)
        return ParsedAdapter(BROKEN, {"unet": {**good, "no.such.layer": strange}}, Coverage(1, 1))
    pipeline = tiny_pipeline("sd15", dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), name, Form(ADAPTERS[name](pipeline)))
        return read_adapter(path, name, manifest_of(pipeline), AdapterLimits())


def bound(pipeline: DiffusionPipeline) -> str:
    digest = hashlib.sha256()
    for component in adaptable_components(pipeline).values():
        for parameter in component.parameters():
            digest.update(bytes_of(parameter.data.contiguous()))
    return digest.hexdigest()


@functools.cache
def freshly_bound(members: tuple[tuple[str, float], ...], dtype: torch.dtype) -> str:
    """What a base that has seen nothing else holds with this composition."""
    pipeline = tiny_pipeline("sd15", dtype)
    weights = AdapterWeights(adaptable_components(pipeline))
    weights.apply([(adapter(name, dtype), scale) for name, scale in members])
    return bound(pipeline)


@pytest.mark.parametrize("pristine_in", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_history_leaves_what_a_fresh_base_would_have(
    dtype: torch.dtype, pristine_in: Literal["device", "host"]
) -> None:
    pipeline = tiny_pipeline("sd15", dtype)
    weights = AdapterWeights(adaptable_components(pipeline), pristine_in=pristine_in)
    pristine = weights.checksum()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(HISTORIES)
    def check(history: list[list[tuple[str, float]]]) -> None:
        for members in history:
            composition = [(adapter(name, dtype), scale) for name, scale in members]
            if any(name == BROKEN for name, _ in members):
                with pytest.raises(KeyError):
                    weights.apply(composition)
                members = []
            else:
                weights.apply(composition)
            assert bound(pipeline) == freshly_bound(tuple(members), dtype)

    check()  # one live base sees every history, one after another
    assert weights.checksum() == pristine
    weights.apply([])
    assert bound(pipeline) == freshly_bound((), dtype)


@pytest.mark.parametrize("pristine_in", ["device", "host"])
def test_a_thousand_swaps_change_no_bit_of_the_base(pristine_in: Literal["device", "host"]) -> None:
    pipeline = tiny_pipeline("sd15", torch.bfloat16)
    weights = AdapterWeights(adaptable_components(pipeline), pristine_in=pristine_in)
    pristine, base = weights.checksum(), bound(pipeline)
    names = ("attention", "text", "kohya")
    for turn in range(1000):
        weights.apply([(adapter(names[turn % 3], torch.bfloat16), 0.5 + turn % 7)])
    memory = weights.twin_bytes
    weights.apply([])
    assert (weights.checksum(), bound(pipeline), weights.twin_bytes) == (pristine, base, memory)
