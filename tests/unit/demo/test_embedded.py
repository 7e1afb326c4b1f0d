"""The embedded folders look and load like Hub repositories."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open

from serve_app.demo.cards import adapter_card, base_card
from serve_app.demo.embedded import ADAPTERS, BASES, FAMILIES, STYLE_NAMES, adapter_id, base_id, embedded_root
from serve_app.demo.styles import STYLES
from serve_app.demo.train import Plan
from serve_app.demo.training.adapters import RANK
from serve_app.demo.training.folders import folder_size_bytes

MEGABYTE = 10**6


def test_all_models_together_take_at_most_20_mb() -> None:
    assert folder_size_bytes(embedded_root()) <= 20 * MEGABYTE


def test_the_folder_holds_every_named_model_and_no_other() -> None:
    found = {f"demo/{path.name}" for path in (embedded_root() / "demo").iterdir() if path.is_dir()}

    assert found == {*BASES, *ADAPTERS}


def test_each_base_has_at_least_five_adapters() -> None:
    assert len(STYLE_NAMES) >= 5
    assert tuple(STYLES) == STYLE_NAMES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", STYLE_NAMES)
def test_an_adapters_card_names_its_base_and_its_words(family: str, style: str) -> None:
    card = ModelCard.load(embedded_root() / adapter_id(family, style) / "README.md").data.to_dict()

    assert card["base_model"] == base_id(family)
    assert card["base_model_relation"] == "adapter"
    assert card["library_name"] == "diffusers"
    assert {"text-to-image", "diffusers", "lora"} <= set(card["tags"])
    assert card["instance_prompt"] in card["widget"][0]["text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cards_are_the_ones_that_training_writes(family: str) -> None:
    root = embedded_root()

    assert (root / base_id(family) / "README.md").read_text() == base_card(family)
    for style in STYLE_NAMES:
        card = (root / adapter_id(family, style) / "README.md").read_text()
        assert card == adapter_card(family, STYLES[style], RANK)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bases_card_parses(family: str) -> None:
    card = ModelCard.load(embedded_root() / base_id(family) / "README.md").data.to_dict()

    assert card["pipeline_tag"] == "text-to-image"
    assert "base_model" not in card


@pytest.mark.parametrize(
    ("family", "expected"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_a_base_loads_with_plain_diffusers_as_float32_without_warnings(
    family: str, expected: type[DiffusionPipeline]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = DiffusionPipeline.from_pretrained(str(embedded_root() / base_id(family)))

    assert isinstance(pipeline, expected)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for part in modules for parameter in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("model", [*BASES, *ADAPTERS])
def test_weights_are_stored_as_finite_float16(model: str) -> None:
    for path in (embedded_root() / model).rglob("*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            tensors = [stored.get_tensor(key) for key in stored.keys()]  # noqa: SIM118
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in floating} == {torch.float16}
        assert all(bool(tensor.isfinite().all()) for tensor in floating)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_an_adapter_is_loaded_by_plain_diffusers(family: str) -> None:
    shapes: list[dict[str, list[int]]] = []
    for style in STYLE_NAMES:
        path = embedded_root() / adapter_id(family, style) / "pytorch_lora_weights.safetensors"
        with safe_open(path, framework="pt") as stored:
            shapes.append({key: stored.get_slice(key).get_shape() for key in stored.keys()})  # noqa: SIM118
    assert shapes.count(shapes[0]) == len(STYLE_NAMES)  # so that one stands for all

    pipeline = DiffusionPipeline.from_pretrained(str(embedded_root() / base_id(family)))
    pipeline.load_lora_weights(embedded_root() / adapter_id(family, STYLE_NAMES[0]), adapter_name="style")
    loaded = [name for name, _ in pipeline.unet.named_parameters() if ".style." in name]
    assert len(loaded) == len(shapes[0])


@pytest.mark.parametrize("model", [*BASES, *ADAPTERS])
def test_no_file_tells_where_it_was_made(model: str) -> None:
    texts = [p.read_text() for p in (embedded_root() / model).rglob("*") if p.suffix in (".json", ".md")]

    assert not any("/tmp" in text or "_name_or_path" in text for text in texts)


def test_the_record_of_training_names_every_stage_and_what_it_reached() -> None:
    record = json.loads((embedded_root() / "training.json").read_text())
    stages = {stage["stage"]: stage for stage in record["stages"]}

    for family in FAMILIES:
        assert stages[f"base-{family}"]["steps"] == Plan(embedded_root(), embedded_root()).base_steps
        assert stages[f"measured-{family}"]["adherence"] >= 0.85
        assert {f"adapter-{family}-{style}" for style in STYLE_NAMES} <= set(stages)


def test_naming_the_models_imports_no_torch() -> None:
    code = "import sys, serve_app.demo.embedded; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
