"""Parts of a base that come from elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from serve_app.config import BaseModelConfig
from serve_app.engine.base.fetching import ResolvedSource, weights_in
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import BaseUnusable
from serve_app.settings import ModelSource
from tests.engine_cases import BASE
from tests.family_cases import asked, drawn
from tests.tiny import tiny_folder
from tests.tiny_families.build import tiny_family

Folders = tuple[Path, Path, Path]
LACKS = ("text_encoder_4", "tokenizer_4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return HiDream as its repository has it, and the language model that it lacks, and the two as one."""
    base, llama, whole = (tmp_path_factory.mktemp(name) for name in ("hidream", "llama", "whole"))
    tiny_family("hidream").save_pretrained(whole)
    shutil.copytree(whole, base, dirs_exist_ok=True)
    index = json.loads((base / "model_index.json").read_text())
    for part in LACKS:
        del index[part]
        shutil.copytree(base / part, llama, dirs_exist_ok=True)
        shutil.rmtree(base / part)
    (base / "model_index.json").write_text(json.dumps(index))
    return base, llama, whole


def load(base: Path, **parts: Path) -> BasePipeline:
    config = BaseModelConfig(id=BASE, source=ModelSource(folder=base))
    sources = {name: ResolvedSource(folder=part) for name, part in parts.items()}
    return BasePipeline.load(config, ResolvedSource(folder=base), parts=sources, device=torch.device("cpu"))


def test_a_base_draws_with_a_text_encoder_and_its_tokenizer_from_another_repository(
    folders: Folders,
) -> None:
    base, llama, whole = folders
    assembled = load(base, **dict.fromkeys(LACKS, llama))
    assert drawn(assembled, asked("text"))[0] == drawn(load(whole), asked("text"))[0]


@pytest.mark.parametrize("names", [(), ("unet/{}.fp16",), ("vae/{}",), ("unet/{}.fp16", "vae/{}")])
def test_the_weights_of_a_base_are_told_where_at_most_replaced_parts_come_in_its_variant(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    here = [tmp_path / f"{name.format('diffusion_pytorch_model')}.safetensors" for name in names]
    for path in (tmp_path / "model_index.json", *here):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    parts = {"unet": ModelSource(hub="me/unet")}
    config = BaseModelConfig(id=BASE, source=ModelSource(folder=tmp_path), variant="fp16", parts=parts)
    assert list(weights_in(tmp_path, config)) == [path for path in here if path.parent.name == "vae"]


def test_a_base_of_which_every_part_is_replaced_loads_in_its_variant_and_tells_the_weights_that_it_read(
    tmp_path: Path,
) -> None:
    whole, base = tiny_folder("sd15"), tmp_path / "base"
    shutil.copytree(whole, base, ignore=shutil.ignore_patterns("*.safetensors"))
    names = ["unet", "vae", "text_encoder"]
    parts = dict.fromkeys(names, ModelSource(folder=whole))
    config = BaseModelConfig(id=BASE, source=ModelSource(folder=base), variant="fp16", parts=parts)
    sources = dict.fromkeys(names, ResolvedSource(folder=whole))
    loaded = BasePipeline.load(config, ResolvedSource(folder=base), parts=sources, device=torch.device("cpu"))
    told = {file for place in loaded.read_from for file in weights_in(place, config)}
    assert told == {file for part in parts for file in (whole / part).glob("*.safetensors")} != set()


def test_a_base_without_a_part_that_it_needs_is_refused(folders: Folders) -> None:
    with pytest.raises(BaseUnusable):
        load(folders[0])
