"""Every training stage for a few steps: what comes out loads with plain diffusers and has moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from serve_app.demo.drawing import draw
from serve_app.demo.embedded import FAMILIES
from serve_app.demo.tokenizer import build_tokenizer
from serve_app.demo.training.adapters import train_adapter
from serve_app.demo.training.autoencoder import train_autoencoder
from serve_app.demo.training.base import train_base
from serve_app.demo.training.text import train_text_encoders

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    train_autoencoder(folder / "vae", steps=3)
    tokenizer = build_tokenizer(folder / "tokenizer")
    for family in FAMILIES:
        train_text_encoders(family, tokenizer, folder / family, steps=2, seed=1)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stages_in_order_give_a_base_and_an_adapter_that_changes_it(family: str, work: Path) -> None:
    base, adapter = work / "out" / family, work / "out" / f"{family}-night"
    train_base(family, work, base, steps=2, seed=1, bank_size=64)
    train_adapter(family, "night", base, adapter, steps=8, seed=1, bank_size=64)

    pipeline = DiffusionPipeline.from_pretrained(str(base))
    pipeline.set_progress_bar_config(disable=True)
    plain = draw(pipeline, ["a red circle"], [1], steps=2)
    pipeline.load_lora_weights(adapter)
    styled = draw(pipeline, ["a red circle"], [1], steps=2)

    assert plain.shape == (1, 3, 64, 64)
    assert not torch.equal(plain, styled)


def test_the_same_seed_trains_the_same_text_encoder(work: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path / "tokenizer")

    train_text_encoders("sd15", tokenizer, tmp_path / "sd15", steps=2, seed=1)

    weights = Path("text_encoder", "model.safetensors")
    assert (tmp_path / "sd15" / weights).read_bytes() == (work / "sd15" / weights).read_bytes()
