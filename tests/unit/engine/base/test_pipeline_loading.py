"""Loading a base: what is accepted, what is refused at the start, and in which form it arrives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import BaseModelConfig
from serve_app.engine.base.fetching import ResolvedSource, resolve_source
from serve_app.engine.base.loading import resolve_dtype
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import BaseUnusable
from serve_app.families.schedulers import SCHEDULERS
from serve_app.settings import ModelSource
from tests.engine_cases import BASE, load, one_image, request, wrap
from tests.tiny import tiny_folder, tiny_pipeline

ONE_SCHEDULER = ("DDIMScheduler",)  # some of the others take long to make
CPU, GPU = torch.device("cpu"), torch.device("cuda")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder("sd15"), tmp_path / "base")


def load_from(folder: Path, vae: Path | None = None, **changes: Any) -> BasePipeline:
    config = BaseModelConfig(id=BASE, source=ModelSource(folder=folder), schedulers=ONE_SCHEDULER, **changes)
    parts = {} if vae is None else {"vae": ResolvedSource(folder=vae)}
    return BasePipeline.load(config, ResolvedSource(folder=folder), parts=parts, device=CPU)


def halve(file: Path) -> None:
    save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file)


def test_no_parameter_needs_a_gradient(folder: Path) -> None:
    pipeline = load_from(folder)
    parameters = [each for module in pipeline.components.values() for each in module.parameters()]
    assert parameters
    assert not any(parameter.requires_grad for parameter in parameters)


def test_pickled_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(tensors, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(BaseUnusable, match="not in safetensors form"):
        load_from(folder)


def test_a_base_that_brings_its_own_code_is_refused(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": ["pipeline", "Mine"]}))
    (folder / "pipeline.py").write_text("raise SystemExit('this must never run')\n")
    with pytest.raises(BaseUnusable):
        load_from(folder)


def test_pickled_weights_of_a_text_encoder_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "text_encoder/model.safetensors")
    (folder / "text_encoder/model.safetensors").unlink()
    torch.save(tensors, folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(BaseUnusable, match="not in safetensors form"):
        load_from(folder)


def change_index(folder: Path, **entries: object) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))


TRAP = "from pathlib import Path; Path(__file__).with_name('it ran').touch()\nclass Mine: pass\n"


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ({"unet": ["mine", "Mine"]}, "unet/mine.py"),
        ({"scheduler": ["mine", "Mine"]}, "scheduler/mine.py"),
        ({"_class_name": "mine"}, "mine.py"),
        ({"unet": ["subprocess", "Popen"]}, "unet/subprocess.py"),
        ({"unet": ["pipeline_utils", "Mine"]}, "unet/pipeline_utils.py"),
        ({"_class_name": "UNet2DConditionModel"}, "pipeline.py"),
    ],
)
def test_a_base_whose_index_asks_for_code_is_refused_and_none_of_it_runs(
    folder: Path, entries: dict[str, object], code: str
) -> None:
    change_index(folder, **entries)
    (folder / code).write_text(TRAP)
    with pytest.raises(BaseUnusable, match="no code of a base is ever run"):
        load_from(folder)
    assert list(folder.rglob("it ran")) == []


def test_a_part_whose_configuration_maps_its_class_to_code_is_refused(folder: Path) -> None:
    change_index(folder, text_encoder=["transformers", "AutoModel"])
    config = folder / "text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "mine.Mine"}}))
    (folder / "text_encoder/mine.py").write_text(TRAP)
    with pytest.raises(BaseUnusable, match="'text_encoder' maps a class to code"):
        load_from(folder)
    assert list(folder.rglob("it ran")) == []


def test_a_vae_that_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder / "vae", tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    with pytest.raises(BaseUnusable):
        load_from(folder, vae=other)


def test_nothing_can_be_configured_to_run_a_base_s_code() -> None:
    for name in ("trust_remote_code", "custom_pipeline"):
        with pytest.raises(ValueError, match=f"unknown key '{name}'"):
            BaseModelConfig.model_validate({"id": BASE, "source": {"hub": "me/base"}, name: True})


@pytest.mark.parametrize("spoil", ["missing", "truncated", "no index"])
def test_a_base_with_broken_files_is_refused_without_naming_paths(folder: Path, spoil: str) -> None:
    if spoil == "missing":
        shutil.rmtree(folder / "vae")
    elif spoil == "truncated":
        (folder / UNET).write_bytes((folder / UNET).read_bytes()[:1000])
    else:
        (folder / "model_index.json").unlink()
    with pytest.raises(BaseUnusable) as caught:
        load_from(folder)
    assert str(folder) not in str(caught.value)


def test_a_base_whose_file_lacks_a_weight_is_refused(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    del tensors["conv_in.bias"]
    save_file(tensors, folder / UNET)
    with pytest.raises(BaseUnusable, match="its files lack weights of 'unet'"):
        load_from(folder)


def test_the_fingerprint_is_that_of_the_structure_and_the_dtype(folder: Path) -> None:
    fingerprint = load_from(folder).manifest.fingerprint
    assert load_from(tiny_folder("sd15")).manifest.fingerprint == fingerprint
    assert load_from(folder, dtype="bfloat16").manifest.fingerprint != fingerprint
    halve(folder / "text_encoder/model.safetensors")
    assert load_from(folder).manifest.fingerprint == fingerprint


@pytest.mark.parametrize("place", ["the folder itself", "its vae part"])
def test_a_vae_override_decodes_the_images(folder: Path, tmp_path: Path, place: str) -> None:
    plain = one_image(load_from(folder), request())
    other = tmp_path / "other"
    shutil.copytree(folder / "vae", other if place == "the folder itself" else other / "vae")
    for file in other.rglob("*.safetensors"):
        halve(file)
    assert one_image(load_from(folder, vae=other), request()) != plain


def test_a_scheduler_override_is_the_default_of_every_request() -> None:
    pipeline = load("sd15", scheduler="EulerDiscreteScheduler", schedulers=ONE_SCHEDULER)
    other = load("sd15", schedulers=("EulerDiscreteScheduler",))
    assert one_image(pipeline, request()) == one_image(other, request(scheduler="EulerDiscreteScheduler"))
    assert one_image(pipeline, request(scheduler="DDIMScheduler")) == one_image(other, request())
    assert one_image(pipeline, request()) != one_image(other, request())


@pytest.mark.parametrize("name", ["EulerScheduler", "UNet2DConditionModel", "FlowMatchEulerDiscreteScheduler"])
def test_a_scheduler_that_cannot_serve_the_base_fails_its_start(name: str) -> None:
    live = tiny_pipeline("sd15")
    with pytest.raises(BaseUnusable, match=name):
        wrap(live, scheduler=name)
    with pytest.raises(BaseUnusable, match=name):
        wrap(live, schedulers=("DDIMScheduler", name))


def test_a_base_that_predicts_a_flow_offers_the_schedulers_of_flows() -> None:
    offered = wrap(tiny_pipeline("sd3"), "sd3").schedulers()
    assert {"FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"} < set(offered) == set(SCHEDULERS["flow"])


def test_schedulers_that_take_no_noise_levels_are_not_offered_where_the_pipeline_sets_them() -> None:
    assert "FlowMatchHeunDiscreteScheduler" not in wrap(tiny_pipeline("flux"), "flux").schedulers()


@pytest.mark.parametrize(
    ("name", "class_name", "device", "expected"),
    [
        ("auto", "StableDiffusionPipeline", CPU, torch.float32),
        ("auto", "StableDiffusionXLPipeline", GPU, torch.float16),
        ("auto", "FluxPipeline", GPU, torch.bfloat16),
        ("bfloat16", "StableDiffusionPipeline", CPU, torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_device_and_the_family(
    name: Any, class_name: str, device: torch.device, expected: torch.dtype
) -> None:
    assert resolve_dtype(name, class_name, device) == expected


def test_an_embedded_base_lies_under_the_embedded_root(tmp_path: Path) -> None:
    source = resolve_source(ModelSource(embedded="demo/sd15"), tmp_path)
    assert source == ResolvedSource(folder=tmp_path / "demo" / "sd15")
    hub = resolve_source(ModelSource(hub="me/base", revision="v1"), tmp_path)
    assert hub == ResolvedSource(hub="me/base", revision="v1")


def test_a_base_is_served_in_the_dtype_that_is_configured() -> None:
    assert load_from(tiny_folder("sd15"), dtype="bfloat16").manifest.dtype == "bfloat16"
    assert load_from(tiny_folder("sd15")).manifest.dtype == "float32"
