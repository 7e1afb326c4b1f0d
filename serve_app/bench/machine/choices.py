"""Choices in the set-up of a pipeline: two ways to do the same work, with the work itself.

Owns the pairs and their subjects. The first of a pair is what diffusers does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from serve_app.bench.machine.stream import ImageSteps
from serve_app.bench.measuring.options import Device, PipelineOptions
from serve_app.bench.models.denoisers import Denoiser, fill_outline, outline_of
from serve_app.engine.adapters.deltas import dtype_named
from serve_app.engine.drawing.texts import encode_individually, text_encoders_of

PROMPTS = ("a small red circle", "two blue squares on a green background", "a star", "a large yellow triangle")


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Do `work` as `usual`, and as `other`; `set_usual` and `set_other` go between them, outside the clock."""

    subject: str
    name: str
    usual: str
    other: str
    work: Callable[[], Tensor]
    set_usual: Callable[[], object]
    set_other: Callable[[], object]


def choices_for(subject: str, pipeline: Any, options: PipelineOptions) -> Iterator[Choice]:
    """Yield the choices for a whole pipeline, drawing images."""

    def draw() -> Tensor:
        generator = torch.Generator("cpu").manual_seed(options.seed)
        size = {"width": options.size, "height": options.size, "num_inference_steps": options.steps}
        return pipeline(PROMPTS[0], generator=generator, output_type="pt", **size).images

    def encode(texts: tuple[str, ...], *, apart: bool) -> Callable[[], Tensor]:
        return lambda: _encoded(pipeline, texts, apart=apart)

    yield _memory_format(subject, (pipeline.unet, pipeline.vae), draw)
    yield from _attention(subject, pipeline.unet, draw, options)
    yield from _vae(subject, pipeline.vae, options.size, options)
    for what, texts in (("4 equal prompts", PROMPTS[:1] * 4), ("4 different prompts", PROMPTS)):
        yield _either(subject, f"{what}, encoded", "as a batch", "each once", encode(texts, apart=False),
                      encode(texts, apart=True))  # fmt: skip


def choices_for_narrow_sdxl(options: PipelineOptions) -> Iterator[Choice]:
    """Yield the choices for SDXL's module tree with narrow layers: its denoiser, and its VAE at real sizes."""
    denoiser: Denoiser = fill_outline(outline_of(options.narrow()), options.narrow())
    images = ImageSteps(denoiser, options.narrow())

    def denoise() -> Tensor:
        return images.run()

    yield _memory_format("narrow SDXL UNet", (denoiser.module,), denoise)
    yield from _attention("narrow SDXL UNet", denoiser.module, denoise, options)
    vae = _narrow_vae(options)
    for side in options.vae_sides:
        yield _memory_format(f"narrow SDXL VAE, {side} px", (vae,), lambda side=side: _decode(vae, side, 1))
        yield from _vae(f"narrow SDXL VAE, {side} px", vae, side, options)


def _memory_format(subject: str, modules: tuple[nn.Module, ...], work: Callable[[], Tensor]) -> Choice:
    def set_to(memory_format: torch.memory_format) -> None:
        layers: tuple[Any, ...] = modules  # untyped: torch's stubs lack this form of `to`
        for module in layers:
            module.to(memory_format=memory_format)

    return Choice(
        subject, "memory format", "contiguous", "channels last", work,
        lambda: set_to(torch.contiguous_format), lambda: set_to(torch.channels_last),
    )  # fmt: skip


def _attention(subject: str, denoiser: Any, work: Callable[[], Tensor], options: PipelineOptions) -> Iterator[Choice]:
    yield Choice(
        subject, "attention", "torch's scaled dot product", "plain products", work,
        lambda: denoiser.set_attn_processor(AttnProcessor2_0()), lambda: denoiser.set_attn_processor(AttnProcessor()),
    )  # fmt: skip
    if options.device is Device.CUDA:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            yield _either(
                subject, "attention kernel", "torch's choice", backend.name.lower(), work, _under(backend, work)
            )


def _under(backend: SDPBackend, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel([backend, SDPBackend.MATH]):
            return work()

    return run


def _vae(subject: str, vae: Any, side: int, options: PipelineOptions) -> Iterator[Choice]:
    """Yield slicing for a batch, tiles of half the picture, and the dtype."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    tile = vae.tile_sample_min_size, vae.tile_latent_min_size

    def tiles(*, is_on: bool) -> None:
        vae.use_tiling = is_on
        vae.tile_sample_min_size, vae.tile_latent_min_size = (side // 2, side // 2 // factor) if is_on else tile

    yield Choice(
        subject, "decoding of 4 images", "as a batch", "one by one", lambda: _decode(vae, side, 4),
        lambda: setattr(vae, "use_slicing", False), lambda: setattr(vae, "use_slicing", True),
    )  # fmt: skip
    vae.use_slicing = False
    yield Choice(
        subject, "decoding", "whole", "in tiles of half the side", lambda: _decode(vae, side, 1),
        lambda: tiles(is_on=False), lambda: tiles(is_on=True),
    )  # fmt: skip
    tiles(is_on=False)
    dtype = dtype_named(options.dtype)
    if dtype != torch.float32:
        yield Choice(
            subject, "dtype of the VAE", str(options.dtype), "float32", lambda: _decode(vae, side, 1),
            lambda: vae.to(dtype), lambda: vae.to(torch.float32),
        )  # fmt: skip
        vae.to(dtype)


def _either(
    subject: str, name: str, usual: str, other: str, first: Callable[[], Tensor], second: Callable[[], Tensor]
) -> Choice:
    """Return a choice between two pieces of work."""
    chosen = [first]
    return Choice(
        subject, name, usual, other, lambda: chosen[0](),
        lambda: chosen.__setitem__(0, first), lambda: chosen.__setitem__(0, second),
    )  # fmt: skip


def _encoded(pipeline: Any, texts: tuple[str, ...], *, apart: bool) -> Tensor:
    around: AbstractContextManager[None] = encode_individually(text_encoders_of(pipeline)) if apart else nullcontext()
    with torch.no_grad(), around:
        return pipeline.encode_prompt(
            list(texts), device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=True,
            negative_prompt=[""] * len(texts),
        )[0]  # fmt: skip


def _decode(vae: Any, side: int, count: int) -> Tensor:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (count, vae.config.latent_channels, side // factor, side // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(vae.device, vae.dtype)
    with torch.no_grad():
        return vae.decode(latents).sample


def _narrow_vae(options: PipelineOptions) -> Any:
    """Return SDXL's VAE with an eighth of its channels and random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        make: Any = AutoencoderKL  # its annotations allow one block alone
        vae = make(
            block_out_channels=(16, 32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=1024,
        )
    return vae.to(torch.device(options.device), dtype_named(options.dtype)).eval().requires_grad_(False)
