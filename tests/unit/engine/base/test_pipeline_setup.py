"""How a base is set up: what the configuration says, and images that stay those of the same set-up in diffusers."""

from __future__ import annotations

import pytest
import torch

from serve_app.config import BaseModelConfig
from serve_app.engine.base.pipeline_setup import (
    TILES,
    configure_pipeline,
    decode_by_tiles,
    decode_one_by_one,
    set_memory_format,
)
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.fused import FusedWeights
from tests.engine_cases import base_config, largest_difference, load, one_image, request
from tests.tiny import tiny_pipeline


def strides_of(base: BasePipeline) -> set[bool]:
    """Say for each convolution with room for a difference whether it is laid out by channels last."""
    weights = [one for part in base.components.values() for one in part.parameters() if one.ndim == 4]
    return {one.is_contiguous(memory_format=torch.channels_last) for one in weights if min(one.shape) > 1}


def test_channels_last_is_taken_where_the_configuration_says_so_and_draws_the_same() -> None:
    plain, last = load("sd15"), load("sd15", memory_format="channels_last")
    assert (strides_of(plain), strides_of(last)) == ({False}, {True})
    assert largest_difference(one_image(plain, request()), one_image(last, request())) <= 1


def test_fused_convolutions_keep_the_memory_format() -> None:
    pipeline = tiny_pipeline("sd15")
    configure_pipeline(pipeline, base_config("sd15", memory_format="channels_last"))
    weights = FusedWeights({"unet": pipeline.unet})
    assert weights.checksum() == FusedWeights({"unet": tiny_pipeline("sd15").unet}).checksum()


def test_images_of_a_pass_are_decoded_each_as_alone() -> None:
    vae = tiny_pipeline("sd15").vae
    decode_one_by_one(vae)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = vae.decode(latents).sample
    assert all(torch.equal(together[place], vae.decode(latents[place : place + 1]).sample[0]) for place in range(3))


@pytest.mark.parametrize(("times", "is_tiled"), [(1, True), (TILES, False)])
def test_tiles_begin_beyond_the_size_that_was_asked_for(times: int, is_tiled: bool) -> None:
    vae, whole = tiny_pipeline("sd15").vae, tiny_pipeline("sd15").vae
    side = int(vae.tile_latent_min_size * 1.5)
    decode_by_tiles(vae, times)
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.decode(latents).sample, whole.decode(latents).sample) is not is_tiled


@pytest.mark.parametrize(("wanted", "is_tiled"), [("auto", False), ("always", True), ("never", False)])
def test_on_a_cpu_only_always_tiles(wanted: str, is_tiled: bool) -> None:
    pipeline = tiny_pipeline("sd15")
    configure_pipeline(
        pipeline, BaseModelConfig.model_validate({"id": "a", "source": {"folder": "."}, "vae_tiling": wanted})
    )
    assert pipeline.vae.use_tiling is is_tiled


def test_a_part_with_three_dimensional_convolutions_keeps_its_layout() -> None:
    pipeline = tiny_pipeline("sd15")
    pipeline.vae = torch.nn.Sequential(torch.nn.Conv3d(2, 2, 3), torch.nn.Conv2d(2, 2, 3))
    set_memory_format(pipeline, torch.channels_last)
    assert pipeline.vae[1].weight.is_contiguous()
    assert not pipeline.unet.conv_in.weight.is_contiguous()
