from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from serve_app.demo.embedded import BASES, embedded_root
from serve_app.engine.base.manifest import manifest_of
from serve_app.engine.base.structure import structure_of
from serve_app.errors import BaseUnusable
from tests.tiny import FAMILIES, tiny_pipeline


def configurations(source: Path, target: Path) -> Path:
    """Copy what says how a base is built, and no weights."""
    for path in source.rglob("*.json"):
        if path.name in ("model_index.json", "config.json"):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return target


@pytest.mark.parametrize("base_id", BASES)
def test_configurations_alone_give_the_structure_of_the_loaded_base(base_id: str, tmp_path: Path) -> None:
    folder = embedded_root() / base_id
    loaded = manifest_of(DiffusionPipeline.from_pretrained(folder))
    assert structure_of(configurations(folder, tmp_path), base_id) == loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_structure_of_its_saved_pipeline(family: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(family)
    pipeline.save_pretrained(tmp_path / "whole")
    found = structure_of(configurations(tmp_path / "whole", tmp_path / "bare"), family)
    assert found.components == manifest_of(pipeline).components


@pytest.mark.parametrize(("part", "fuses"), [("unet", False), ("vae", True)])
def test_a_packed_part_that_adapters_change_is_known_from_its_configuration(
    part: str, fuses: bool, tmp_path: Path
) -> None:
    folder = configurations(embedded_root() / "demo" / "sd15", tmp_path)
    config = folder / part / "config.json"
    packing = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": packing}))
    assert structure_of(folder, "demo/sd15").fuses == fuses


@pytest.mark.parametrize(
    "index",
    [
        None,
        "{",
        "[]",
        "{}",
        json.dumps({"_class_name": ["their_code", "Pipeline"]}),
        json.dumps({"_class_name": "NoSuchPipeline"}),
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}),
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}),
        json.dumps({"_class_name": "DDPMPipeline"}),
    ],
)
def test_what_describes_no_base_is_refused(index: str | None, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(BaseUnusable, match="acme/base cannot be served"):
        structure_of(tmp_path, "acme/base")
