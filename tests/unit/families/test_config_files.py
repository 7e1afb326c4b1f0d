import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from serve_app.cli.serve_file import ServeFileInvalid, applications_of
from serve_app.families.config_files import unusable_reason
from tests.serve_files import applications


def base_folder(folder: Path, index: dict[str, Any], **configs: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    for part, config in configs.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


SDXL = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}


def test_a_base_whose_files_say_nothing_against_it_is_usable(tmp_path: Path) -> None:
    assert unusable_reason(base_folder(tmp_path / "base", SDXL, unet={"sample_size": 128})) is None


def test_a_video_model_is_refused_by_what_it_makes(tmp_path: Path) -> None:
    reason = unusable_reason(base_folder(tmp_path / "base", {"_class_name": "WanPipeline"}))
    assert reason == "WanPipeline makes videos, and only images are served"


@pytest.mark.parametrize(
    ("packing", "name"),
    [
        ({"quant_method": "gguf"}, "gguf"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
            "torchao Int4",
        ),
        ({}, "in an unknown way"),
    ],
)
def test_a_part_that_is_quantised_in_a_way_that_is_not_served_is_refused_by_its_name(
    packing: dict[str, Any], name: str, tmp_path: Path
) -> None:
    reason = unusable_reason(base_folder(tmp_path / "base", SDXL, unet={"quantization_config": packing}))
    assert reason is not None
    assert reason.startswith(f"its part 'unet' is quantised ({name}")
    assert reason.endswith("int8 and float8 weights of torchao and nf4 weights of bitsandbytes are served")


@pytest.mark.parametrize(
    ("packing", "package"),
    [
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
    ],
)
def test_a_quantised_part_that_could_be_served_is_refused_only_where_its_package_is_missing(
    packing: dict[str, Any], package: str, tmp_path: Path
) -> None:
    reason = unusable_reason(base_folder(tmp_path / "base", SDXL, unet={"quantization_config": packing}))
    is_there = find_spec(package) is not None
    assert (reason is None) == is_there
    assert is_there or f"it needs the package {package}, which is not installed" in str(reason)


@pytest.mark.parametrize("place", ["the file", "its folder"])
def test_a_folder_of_single_files_is_refused_with_the_way_to_name_one(tmp_path: Path, place: str) -> None:
    file = tmp_path / "checkpoint.safetensors"
    file.touch()
    reason = unusable_reason(file if place == "the file" else tmp_path)
    assert reason is not None
    assert "`source: {file: PATH}`" in reason


def test_loraplex_check_names_each_base_and_the_cause(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", {"_class_name": "LTXPipeline"})
    good = base_folder(tmp_path / "good", SDXL)
    file = tmp_path / "quantised.safetensors"
    save_file({"scaled_fp8": numpy.zeros(1)}, file)
    (tmp_path / "empty.safetensors").touch()
    sources = [
        {"folder": str(folder)},
        {"file": str(file), "config": {"folder": str(good)}},
        {"file": str(tmp_path / "empty.safetensors"), "config": {"folder": str(folder)}},
        {"file": str(tmp_path / "only on the nodes.safetensors"), "config": {"hub": "a/b"}},
    ]
    bases: list[dict[str, Any]] = [{"id": f"a/{number}", "source": source} for number, source in enumerate(sources)]
    bases.append({"id": "a/nf4", "source": {"folder": str(good)}, "quantization": "nf4"})
    serve_file = tmp_path / "serve.yaml"
    serve_file.write_text(json.dumps({"applications": applications({"bases": bases})}))
    with pytest.raises(ServeFileInvalid) as caught:
        applications_of(serve_file)
    assert [fault.removeprefix("applications.") for fault in caught.value.faults] == [
        "1.args.base: LTXPipeline makes videos, and only images are served",
        "2.args.base: its single file is quantised (fp8 with scales), "
        "and single files are read with plain weights only",
        "3.args.base: LTXPipeline makes videos, and only images are served",
        "3.args.base: its single file is missing, cut off or not in safetensors form",
        "5.args.base: it needs the package bitsandbytes, which is not installed (pip install bitsandbytes)",
    ]
