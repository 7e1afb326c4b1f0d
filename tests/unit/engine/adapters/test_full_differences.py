"""LyCORIS's full differences: whole weights and biases, added at the scale asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import Dense, ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.refusals import NonFinite, RefusedAdapter, ShapeMismatch
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import as_kohya, everything, full, lora
from tests.tiny_forms import Form, put


def read(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> ParsedAdapter:
    manifest = manifest_of(tiny_pipeline("sd15", dtype))
    return parse_adapter(put(folder, "full", Form(tensors)), "owner/full", manifest, AdapterLimits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_they_are_added_at_the_scale_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    live, fresh = tiny_pipeline("sd15", dtype), tiny_pipeline("sd15", dtype)
    tensors = full(live, chooses=everything)
    adapter = read(tmp_path, tensors, dtype)
    FusedWeights(adaptable_components(live)).apply([(adapter, 0.3)])
    for name, module in fresh.unet.named_modules():
        key = "lycoris_" + name.replace(".", "_")
        changed = live.unet.get_submodule(name)
        if f"{key}.diff" in tensors:
            expected = (tensors[f"{key}.diff"].to(dtype).float() * 0.3).to(dtype)
            assert torch.equal(changed.weight, module.weight + expected)
        if f"{key}.diff_b" in tensors:
            assert torch.equal(changed.bias, module.bias + tensors[f"{key}.diff_b"].to(dtype) * 0.3)
    assert adapter.coverage.layers_matched == sum(key.endswith(".diff") for key in tensors)


def test_they_may_stand_beside_low_rank_layers_in_one_file(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    some = full(pipeline, chooses=lambda name, module: "conv1" in name)
    adapter = read(tmp_path, as_kohya(lora(pipeline)) | some)
    assert {type(delta).__name__ for _, _, delta in adapter.layers()} == {"LowRank", "Dense"}


def altered(change: str) -> dict[str, Tensor]:
    """Return full differences of which one is wrong."""
    pipeline = tiny_pipeline("sd15")
    tensors = full(pipeline)
    key = next(key for key in tensors if key.endswith(".diff_b")).removesuffix(".diff_b")
    match change:
        case "wide":
            tensors[f"{key}.diff"] = tensors[f"{key}.diff"].repeat(1, 2)
        case "wide bias":
            tensors[f"{key}.diff_b"] = tensors[f"{key}.diff_b"].repeat(2)
        case "nan":
            tensors[f"{key}.diff"][0] = float("nan")
        case "bias beside factors":
            kohya = as_kohya(lora(pipeline))
            stem = next(iter(kohya)).partition(".")[0]
            tensors = kohya | {f"{stem}.diff_b": torch.ones(32)}
    return tensors


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ("wide", ShapeMismatch, "the file has a difference of shape"),
        ("wide bias", ShapeMismatch, "the file changes a bias of shape"),
        ("nan", NonFinite, "NaN or infinite"),
        ("bias beside factors", ShapeMismatch, "changes a bias that it does not have"),
    ],
)
def test_those_that_do_not_fit_are_refused(
    change: str, error: type[RefusedAdapter], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        read(tmp_path, altered(change))


def test_a_change_of_the_bias_alone_leaves_the_weight(tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in full(tiny_pipeline("sd15")).items() if key.endswith(".diff_b")}
    for _, _, delta in read(tmp_path, tensors).layers():
        assert isinstance(delta, Dense)
        assert delta.bias is not None
        assert not delta.weight.any()
