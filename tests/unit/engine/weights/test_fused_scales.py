"""An adapter may act with one strength on the denoiser and with another on the text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve_app.core import Scale, Scales
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_forms import Form, fused_by_diffusers, put, unequal, weights_of, with_text


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("sd15", torch.float32),
        ("sd15", torch.bfloat16),
        ("sd15", torch.float16),
        ("sdxl", torch.bfloat16),
        ("sd3", torch.float16),
        ("flux", torch.float32),
    ],
    ids=str,
)
def test_separate_scales_equal_set_adapters_with_a_weight_for_each_component(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    live = tiny_pipeline(family, dtype)
    weights, manifest = FusedWeights(adaptable_components(live)), manifest_of(live)
    scales: list[Scale] = [Scales(0.8, 0.3), Scales(-0.5, 1.4), 0.6]
    paths = [put(tmp_path, f"adapter {seed}", Form(with_text(live, seed=10 * seed))) for seed in range(3)]
    adapters = [parse_adapter(path, "a/b", manifest, AdapterLimits()) for path in paths]
    assert all("text_encoder" in adapter.components for adapter in adapters)

    weights.apply(list(zip(adapters, scales, strict=True)))

    expected = weights_of(fused_by_diffusers(family, dtype, list(zip(paths, scales, strict=True))))
    assert unequal(weights_of(live), expected) == []


def test_the_text_encoders_scale_leaves_the_denoiser_alone(tmp_path: Path) -> None:
    live = tiny_pipeline("sdxl")
    weights, manifest = FusedWeights(adaptable_components(live)), manifest_of(live)
    path = put(tmp_path, "adapter", Form(with_text(live, seed=1)))
    adapter = parse_adapter(path, "a/b", manifest, AdapterLimits())

    weights.apply([(adapter, Scales(0.0, 1.0))])
    touched = {component for component, _ in unequal(weights_of(live), weights_of(tiny_pipeline("sdxl")))}
    assert touched == {"text_encoder", "text_encoder_2"}

    weights.apply([(adapter, Scales(1.0, 0.0))])
    touched = {component for component, _ in unequal(weights_of(live), weights_of(tiny_pipeline("sdxl")))}
    assert touched == {"unet"}
    assert weights.applied == ((adapter.digest, Scales(1.0, 0.0)),)
