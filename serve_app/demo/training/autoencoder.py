"""The first stage: the autoencoder that both bases share.

Three of its four latent channels are drawn towards a small RGB picture of the
scene, so that colours are nearly linear in the latents: that is what lets tiny
UNets learn shapes, and tiny adapters learn colours, in minutes.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from serve_app.demo.architectures import make_autoencoder
from serve_app.demo.embedded import SIDE_PX
from serve_app.demo.scenes import render, sample_scenes
from serve_app.demo.styles import CELL_PX, STYLES, pixelated
from serve_app.demo.training.optimiser import Muon, WeightAverage, rate_at, variance_preserving_

log = logging.getLogger(__name__)

_PEAK_RATE = 0.01
_KL_WEIGHT = 3e-4
_ALIGN_WEIGHT = 0.3
_NUDGE = 0.2
_HARD_STYLES = ("pixel-art", "stripes")  # their edges take longest to learn, so they come twice as often


@dataclass(frozen=True, slots=True)
class AutoencoderResult:
    """The scores of training."""

    psnr_db: float
    scaling_factor: float


def train_autoencoder(folder: Path, steps: int, seed: int = 0) -> AutoencoderResult:
    """Train the autoencoder and save it to the folder in float32."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = make_autoencoder()
    variance_preserving_(model)
    _start_quietly(model)
    model.to(memory_format=torch.channels_last)
    small = ("conv_out", "encoder.conv_in", "quant_conv")
    optimiser = Muon(model.named_parameters(), rate=_PEAK_RATE, small_rate=1e-3, small_names=small)
    average = WeightAverage(model.parameters(), 0.99)
    for step in range(steps):
        is_small = step < 0.35 * steps  # small pictures first: four times cheaper
        pictures = _pictures(32 if is_small else 16, SIDE_PX // 2 if is_small else SIDE_PX, rng)
        loss = _loss(model, pictures.contiguous(memory_format=torch.channels_last))
        optimiser.step(loss, rate_at(step, steps))
        average.update()
        if step % 50 == 0:
            log.info("autoencoder step %d of %d: loss %.4f", step, steps, loss.item())
    average.exchange()
    model.eval()
    scaling = _unit_variance(model, rng)
    model.register_to_config(scaling_factor=scaling)
    psnr = _psnr_db(model, _pictures(64, SIDE_PX, random.Random(99)))
    model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    log.info("autoencoder: %.1f dB", psnr)
    return AutoencoderResult(round(psnr, 2), scaling)


def _start_quietly(model: AutoencoderKL) -> None:
    """Begin with little posterior noise, or the decoder learns nothing for hundreds of steps."""
    channels = model.config.latent_channels
    with torch.no_grad():
        model.quant_conv.weight[channels:].zero_()
        model.quant_conv.bias[channels:].fill_(-5.0)


def _pictures(count: int, side: int, rng: random.Random) -> Tensor:
    """Half plain scenes, half in one style at a random strength; (n, 3, side, side) in [-1, 1]."""
    pictures = render(sample_scenes(count, rng), side)
    for i in range(count // 2, count):
        name = rng.choice((*STYLES, *_HARD_STYLES))
        scale = rng.choice((1.0, 1.0, 0.5, rng.random()))
        pictures[i : i + 1] = _restyled(name, pictures[i : i + 1], scale)
    return pictures * 2 - 1


def _restyled(name: str, pictures: Tensor, scale: float) -> Tensor:
    """The style's own effect, but blocks as fine as one latent cell, the hardest case of them."""
    if name == "pixel-art":
        return torch.lerp(pictures, pixelated(pictures, CELL_PX), scale)
    return STYLES[name].apply(pictures, scale)


def _loss(model: AutoencoderKL, pictures: Tensor) -> Tensor:
    posterior = model.encode(pictures).latent_dist
    decoded = model.decode(_nudged(posterior.sample())).sample
    differences = decoded - pictures
    across = (differences[..., 1:, :] - differences[..., :-1, :]).abs().mean()
    along = (differences[..., 1:] - differences[..., :-1]).abs().mean()
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    drift = F.mse_loss(posterior.mean[:, :3], 1.5 * F.avg_pool2d(pictures, 8))
    sharp = differences.abs().mean() + differences.square().mean() + 0.5 * (across + along)
    return sharp + _KL_WEIGHT * divergence + _ALIGN_WEIGHT * drift


def _nudged(latents: Tensor) -> Tensor:
    """Latents with small errors, as a UNet makes them, so that the decoder learns to bear them."""
    strength = _NUDGE * torch.rand(len(latents), 1, 1, 1)
    return latents + strength * torch.randn_like(latents)


@torch.no_grad()
def _unit_variance(model: AutoencoderKL, rng: random.Random) -> float:
    latents = model.encode(_pictures(256, SIDE_PX, rng)).latent_dist.sample()
    log.info("latent channels: means %s, deviations %s", latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    return round(float(1 / latents.std()), 5)


@torch.no_grad()
def _psnr_db(model: AutoencoderKL, pictures: Tensor) -> float:
    decoded = model.decode(model.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((decoded - pictures) ** 2 / 4).mean((1, 2, 3))
    return float((-10 * error.log10()).mean())
