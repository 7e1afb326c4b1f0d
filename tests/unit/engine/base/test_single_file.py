"""Bases and parts whose weights lie in one file under their original names."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve_app.config import BaseModelConfig
from serve_app.demo.embedded import embedded_root
from serve_app.engine.base.fetching import resolve_source
from serve_app.engine.base.single_file import load_part_file
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.errors import BaseUnusable
from tests.engine_cases import BASE, one_image, parsed_adapter, request
from tests.single_files import original_flux, original_vae, write_single_file
from tests.tiny import tiny_folder, tiny_pipeline

CPU = torch.device("cpu")
MARK = torch.zeros(0)
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


@functools.cache
def live(family: str) -> Any:
    return DiffusionPipeline.from_pretrained(embedded_root() / "demo" / family)


def load(source: dict[str, Any], **changes: Any) -> BasePipeline:
    config = BaseModelConfig.model_validate({"id": BASE, "source": source, "schedulers": ["DDIMScheduler"], **changes})
    parts = {name: resolve_source(part, embedded_root()) for name, part in config.part_sources.items()}
    return BasePipeline.load(config, resolve_source(config.source, embedded_root()), parts=parts, device=CPU)


def single(file: Path, family: str = "sdxl") -> dict[str, Any]:
    return {"file": file, "config": {"embedded": f"demo/{family}"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tmp_path_factory.mktemp("checkpoint") / "sdxl.safetensors", live("sdxl"))


@pytest.mark.parametrize("family", [pytest.param("sd15", marks=pytest.mark.slow), "sdxl"])
def test_a_single_file_is_the_base_of_its_folder_to_the_bit_and_so_is_an_adapter_on_it(
    tmp_path: Path, family: str
) -> None:
    file = write_single_file(tmp_path / "checkpoint.safetensors", live(family))
    seen: list[tuple[Any, ...]] = []
    for source in (single(file, family), {"embedded": f"demo/{family}"}):
        pipeline = load(source)
        weights = FusedWeights(pipeline.components)
        plain = one_image(pipeline, request())
        weights.apply([(parsed_adapter(pipeline.manifest), 0.7)])
        adapted = one_image(pipeline, request())
        assert adapted != plain
        seen.append((pipeline.manifest.fingerprint, weights.checksum(), plain, adapted))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("marks", [pytest.param(("v_pred",), marks=pytest.mark.slow), ("v_pred", "ztsnr")])
def test_a_checkpoint_that_says_so_by_its_keys_predicts_velocities(tmp_path: Path, marks: tuple[str, ...]) -> None:
    file = write_single_file(tmp_path / "noob.safetensors", live("sdxl"), **dict.fromkeys(marks, MARK))
    folders: list[Path] = []
    for name, has_zero_snr in (("epsilon", False), ("v_prediction", "ztsnr" in marks)):
        folders.append(shutil.copytree(embedded_root() / "demo" / "sdxl", tmp_path / name))
        config = folders[-1] / "scheduler" / "scheduler_config.json"
        settings = {"prediction_type": name, "rescale_betas_zero_snr": has_zero_snr}
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    drawn = one_image(load({"file": file, "config": {"folder": folders[0]}}), request())
    assert drawn != one_image(load({"folder": folders[0]}), request())
    assert drawn == one_image(load({"folder": folders[1]}), request())


def lacking(tensors: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a weight of the denoiser is missing": (lambda all_: lacking(all_, FIRST_LAYER), "lacks weights of the denoiser"),
    "a part is missing": (lambda all_: lacking(all_, "first_stage_model."), "holds no weights of 'vae'"),
    "a weight of a text encoder is missing": (
        lambda all_: lacking(all_, "conditioner.embedders.1.model.ln_final.bias"),
        r"lacks 1 of the \d+ weights of 'text_encoder_2', such as text_model.final_layer_norm.bias",
    ),
    "a layer is wider": (
        lambda all_: {**all_, FIRST_LAYER: torch.zeros(48, 9, 3, 3)},
        r"another structure .*: conv_in.weight is \[48, 9, 3, 3\], not \[48, 4, 3, 3\]",
    ),
    "a layer is more": (
        lambda all_: {**all_, "model.diffusion_model.middle_block.1.more.weight": torch.zeros(7)},
        "7 numbers more than the 'unet'",
    ),
    "it is quantised by bitsandbytes": (lambda all_: {**all_, "x.weight.absmax": MARK}, r"quantised \(bitsandbytes\)"),
    "it is fp8 with scales": (lambda all_: {**all_, "scaled_fp8": MARK}, r"quantised \(fp8 with scales\)"),
    "its weights are integers": (lambda all_: {**all_, FIRST_LAYER: all_[FIRST_LAYER].char()}, r"\(i8 weights\)"),
    "it predicts as EDM does": (lambda all_: {**all_, "edm_vpred.sigma_max": MARK}, "EDM"),
    "it holds something else": (lambda _: {"a": torch.zeros(3)}, "is not the|holds no weights"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_single_file_that_cannot_be_served_says_why_and_names_no_path(
    checkpoint: Path, tmp_path: Path, spoilt: str
) -> None:
    change, sentence = SPOILT[spoilt]
    save_file(change(load_file(checkpoint)), tmp_path / "spoilt.safetensors")
    with pytest.raises(BaseUnusable, match=sentence) as caught:
        load(single(tmp_path / "spoilt.safetensors"))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("spoil", ["missing", "cut off", "pickled"])
def test_a_single_file_that_is_no_whole_safetensors_file_is_refused(
    checkpoint: Path, tmp_path: Path, spoil: str
) -> None:
    file = tmp_path / "spoilt.safetensors"
    if spoil == "cut off":
        file.write_bytes(checkpoint.read_bytes()[:-1])
    elif spoil == "pickled":
        torch.save({"state_dict": {}}, file)
    with pytest.raises(BaseUnusable, match="missing, cut off or not in safetensors form"):
        load(single(file))


def test_a_configuration_of_another_family_is_told_apart(checkpoint: Path) -> None:
    with pytest.raises(BaseUnusable, match="single file"):
        load(single(checkpoint, "sd15"))
    with pytest.raises(BaseUnusable, match="is not the FluxTransformer2DModel"):
        load({"folder": tiny_folder("flux")}, parts={"transformer": {"file": checkpoint}})


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_may_be_a_single_file(tmp_path: Path, prefix: str) -> None:
    plain = one_image(load({"folder": tiny_folder("sd15")}), request())
    vae = tiny_pipeline("sd15").vae
    for halving in (1.0, 0.5):
        tensors = {name: tensor.contiguous() * halving for name, tensor in original_vae(vae, prefix).items()}
        save_file(tensors, tmp_path / "vae.safetensors")
        drawn = one_image(load({"folder": tiny_folder("sd15")}, vae={"file": tmp_path / "vae.safetensors"}), request())
        assert (drawn == plain) == (halving == 1.0)


def test_a_part_that_diffusers_reads_from_no_single_file_is_refused(checkpoint: Path) -> None:
    with pytest.raises(BaseUnusable, match="does not read its part 'text_encoder' from a single file"):
        load({"folder": tiny_folder("sd15")}, parts={"text_encoder": {"file": checkpoint}})


@pytest.mark.slow  # diffusers knows these names at FLUX's own width alone: a gigabyte for one block of each kind
def test_a_flux_transformer_may_be_a_single_file(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("flux"), tmp_path / "flux")
    settings = json.loads((folder / "transformer" / "config.json").read_text())
    settings |= {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [16, 56, 56]}
    settings |= {"attention_head_dim": 128, "num_attention_heads": 24}
    (folder / "transformer" / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel.from_config(settings)
    transformer.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(transformer.parameters()):  # every row has a value of its own
            rows = (torch.arange(len(parameter)) + number) % 251
            parameter.copy_(rows.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape))
    save_file(original_flux(transformer), tmp_path / "flux.safetensors")
    read = load_part_file("transformer", tmp_path / "flux.safetensors", folder, torch.bfloat16).state_dict()
    assert read.keys() == transformer.state_dict().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in transformer.state_dict().items())
    settings["guidance_embeds"] = False
    (folder / "transformer" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="numbers more than the 'transformer'"):
        load_part_file("transformer", tmp_path / "flux.safetensors", folder, torch.bfloat16)
