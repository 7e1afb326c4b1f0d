"""Whatever adapters are chosen together, at whatever scales, the weights are those that diffusers fuses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_forms import forms_of, fused_by_diffusers, put, unequal, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1800)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPOSITIONS = 100  # of each base and dtype: 900
SCALES = [0.0, 0.3, 0.7, 1.0, -1.0, 2.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_any_composition_has_the_bits_of_diffusers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    chance = random.Random(f"{family} {dtype}")
    beside, in_place = (tiny_pipeline(family, dtype) for _ in range(2))
    fused = FusedWeights(adaptable_components(beside), fused_sets=2)
    written = FusedWeights(adaptable_components(in_place), base_weights="host")
    paths = {name: put(tmp_path, name, form(beside)) for name, form in forms_of(family).items()}
    adapters = {name: parse_adapter(path, name, manifest_of(beside), AdapterLimits()) for name, path in paths.items()}
    for _ in range(COMPOSITIONS):
        names = chance.sample(sorted(adapters), chance.choice([1, 2, 2, 3]))
        names.sort(key=lambda name: "DoRA" not in name)  # peft takes what was merged before one out, with rounding
        # Diffusers multiplies alphas that it keeps as tensors in 32 bits.
        composition = [(name, 1.0 if name == "peft, alpha tensors" else chance.choice(SCALES)) for name in names]
        expected = weights_of(fused_by_diffusers(family, dtype, [(paths[name], scale) for name, scale in composition]))
        for weights, pipeline in ((fused, beside), (written, in_place)):
            weights.apply([(adapters[name], scale) for name, scale in composition])
            assert unequal(weights_of(pipeline), expected) == [], composition
