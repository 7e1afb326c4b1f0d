"""Adapters that lie in several files: shards, and a folder for each model; whole, or refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from serve_app.catalog.reading.choosing import choose, settings_of
from serve_app.catalog.sources.folder import FolderSource
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.adapters.safetensors_file import parts_of
from serve_app.engine.base.manifest import BaseManifest, manifest_of
from serve_app.engine.weights.fuse import fuse_weight
from serve_app.refusals import MalformedFile, NotAnAdapter, RefusedAdapter, UnsupportedMethod
from serve_app.settings import AdapterLimits
from tests.adapter_changes import changes
from tests.spelt_adapters import SPELLINGS, base_of, spelt
from tests.tiny import tiny_pipeline

INDEX = "pytorch_lora_weights.safetensors.index.json"


def shard(number: int) -> str:
    return f"pytorch_lora_weights-0000{number}-of-00003.safetensors"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "a/b").mkdir(parents=True)
    return tmp_path / "a/b"


async def read(
    repository: Path, manifest: BaseManifest, filename: str | None = None, limits: AdapterLimits | None = None
) -> ParsedAdapter:
    """Choose the files as the catalog does and parse them as admission does."""
    source = FolderSource((repository.parent.parent,))
    listing = await source.find("a/b", None)
    assert listing is not None
    files, facts = await choose(source, listing, filename)
    parts = parts_of(files, [repository / name for name in files])
    settings = await settings_of(source, listing, files)
    adapter = parse_adapter(parts, "a/b", manifest, limits or AdapterLimits(), settings=settings)
    assert facts.layers == adapter.coverage.layers_in_file
    return adapter


def write_shards(repository: Path, *, with_map: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    base = base_of("flux")
    tensors, truth = spelt(base, SPELLINGS["ComfyUI, original names"], "DoRA, a magnitude per output")
    places = {key: shard(number % 3 + 1) for number, key in enumerate(tensors)}  # factors of a layer lie apart
    for name in set(places.values()):
        save_file({key: tensor for key, tensor in tensors.items() if places[key] == name}, repository / name)
    (repository / INDEX).write_text(json.dumps({"weight_map": places} if with_map else {}))
    return base, truth


@pytest.mark.parametrize("filename", [None, INDEX])
@pytest.mark.parametrize("with_map", [True, False])
async def test_shards_are_the_one_adapter_that_they_are_cut_from(
    repository: Path, filename: str | None, with_map: bool
) -> None:
    base, truth = write_shards(repository, with_map=with_map)
    found = changes(base, await read(repository, base.manifest, filename))
    assert found.keys() == truth.keys()
    for module, expected in truth.items():
        torch.testing.assert_close(found[module], expected, rtol=1e-4, atol=2e-6, msg=module)


async def test_a_shard_that_lacks_what_the_index_puts_there_refuses_the_adapter(repository: Path) -> None:
    base, _ = write_shards(repository)
    table = json.loads((repository / INDEX).read_text())
    table["weight_map"]["diffusion_model.more.lora_A.weight"] = shard(2)
    (repository / INDEX).write_text(json.dumps(table))
    with pytest.raises(MalformedFile, match=r"diffusion_model\.more\.lora_A\.weight into .*, which lacks it"):
        await read(repository, base.manifest)
    (repository / shard(3)).unlink()
    with pytest.raises(NotAnAdapter, match="of which .* is missing"):
        await read(repository, base.manifest)


async def test_two_shards_never_hold_one_tensor(repository: Path) -> None:
    base, _ = write_shards(repository, with_map=False)
    shutil.copy(repository / shard(1), repository / shard(2))
    with pytest.raises(MalformedFile, match="two of its files hold the tensor"):
        await read(repository, base.manifest)
    with pytest.raises(MalformedFile, match="two of its files hold the tensor"):
        parse_adapter(parts_of(("x", "y"), [repository / shard(1)] * 2), "a/b", base.manifest, AdapterLimits())


async def test_limits_hold_for_all_files_together(repository: Path) -> None:
    base, _ = write_shards(repository)
    largest = max((repository / shard(number)).stat().st_size for number in (1, 2, 3))
    for limits in ({"max_file": largest}, {"max_tensors": 20}):
        with pytest.raises(RefusedAdapter, match="over the limit"):
            await read(repository, base.manifest, limits=AdapterLimits(**limits))


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        (
            [
                "lycoris_down_blocks_0_attentions_0_proj_in.weight",
                "lycoris_down_blocks_0_attentions_0_proj_in.on_input",
            ],
            "IA3",
        ),
        (["lycoris_mid_block_attentions_0_proj_in.weight"], "IA3"),
        (["lycoris_mid_block_attentions_0_proj_in.oft_blocks"], "OFT or BOFT"),
        (["lora_unet_mid_block_attentions_0_proj_in.a1.weight"], "GLoRA"),
        (["unet:0:up", "unet:0:down"], "the form of cloneofsimo's first trainer"),
    ],
)
async def test_a_method_that_is_not_served_is_refused_by_its_name(
    repository: Path, keys: list[str], method: str
) -> None:
    tensors = {key: torch.ones(4, 4) for key in keys}
    save_file(tensors, repository / "merged.safetensors")
    with pytest.raises(UnsupportedMethod, match=f"uses {method}"):
        await read(repository, base_of("sd15").manifest)
    with pytest.raises(UnsupportedMethod, match=f"uses {method}"):
        parse_adapter(repository / "merged.safetensors", "a/b", base_of("sd15").manifest, AdapterLimits())


async def test_where_no_file_of_the_root_is_an_adapter_those_below_are_looked_at(repository: Path) -> None:
    base = base_of("flux")
    tensors, _ = spelt(base, SPELLINGS["LyCORIS"], "LoRA")
    (repository / "lora").mkdir()
    save_file(tensors, repository / "lora/style.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4)}, repository / "merged.safetensors")
    source = FolderSource((repository.parent.parent,))
    listing = await source.find("a/b", None)
    assert listing is not None
    assert (await choose(source, listing, None))[0] == ("lora/style.safetensors",)


CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "to_v"]},
    "text_encoder": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"]},
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("folders", [("unet", "text_encoder"), ("unet",), ("text_encoder",)], ids="+".join)
async def test_what_peft_saves_in_a_folder_for_each_model_has_the_scale_of_each(
    repository: Path, folders: tuple[str, ...]
) -> None:
    pipeline: Any = tiny_pipeline("sd15")
    truth: dict[tuple[str, str], torch.Tensor] = {}
    for component in folders:
        pristine = getattr(pipeline, component)
        model: Any = get_peft_model(copy.deepcopy(pristine), LoraConfig(init_lora_weights=False, **CONFIGS[component]))
        model.save_pretrained(repository / component)
        model.merge_adapter()
        merged = {name.replace(".base_layer", ""): w for name, w in model.base_model.model.state_dict().items()}
        for name, before in pristine.state_dict().items():
            if not torch.equal(before, merged[name]):
                truth[component, name.removesuffix(".weight")] = merged[name].double()
    adapter = await read(repository, manifest_of(pipeline))
    assert {(component, module) for component, module, _ in adapter.layers()} == truth.keys()
    assert adapter.coverage.layers_matched == len(truth)
    for component, module, delta in adapter.layers():
        before = getattr(pipeline, component).get_submodule(module).weight
        fuse_weight(out := torch.empty_like(before), before, before, delta, 1.0)
        torch.testing.assert_close(out.double(), truth[component, module], rtol=1e-5, atol=1e-6, msg=module)


@pytest.mark.parametrize("filename", [None, "unet/pytorch_lora_weights.safetensors"])
async def test_what_models_of_diffusers_save_by_themselves_has_the_scale_of_each(
    repository: Path, filename: str | None
) -> None:
    pipeline: Any = tiny_pipeline("sd15")
    unet = copy.deepcopy(pipeline.unet)
    unet.add_adapter(LoraConfig(init_lora_weights=False, **CONFIGS["unet"]))
    unet.save_lora_adapter(repository / "unet")
    adapter = await read(repository, manifest_of(pipeline), filename)
    assert {(delta.alpha, delta.divisor) for _, _, delta in adapter.layers()} == {(3.0, 4.0)}
