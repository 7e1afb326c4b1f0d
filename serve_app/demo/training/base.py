"""The third stage: a base's UNet learns to draw, by v-prediction on a bank of latents."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.demo.architectures import TextEncoder, assemble, make_scheduler, make_unet
from serve_app.demo.training.bank import Captioner, fill_bank, velocity_loss
from serve_app.demo.training.folders import save_base
from serve_app.demo.training.optimiser import Muon, WeightAverage, rate_at

log = logging.getLogger(__name__)

_PEAK_RATE = 0.012
_BATCH = 32
_CHECKPOINT_S = 600.0


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts trained before the UNet."""

    autoencoder: AutoencoderKL
    encoders: list[TextEncoder]
    tokenizer: CLIPTokenizer


def load_parts(family: str, work: Path) -> Parts:
    """The frozen outputs of the earlier stages."""
    autoencoder = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    encoders: list[TextEncoder] = [CLIPTextModel.from_pretrained(work / family / "text_encoder")]
    if family == "sdxl":
        encoders.append(CLIPTextModelWithProjection.from_pretrained(work / family / "text_encoder_2"))
    for encoder in encoders:
        encoder.eval().requires_grad_(False)
    return Parts(autoencoder, encoders, tokenizer)


def train_base(family: str, work: Path, folder: Path, steps: int, seed: int, bank_size: int = 4096) -> float:
    """Train one base and save it, with checkpoints on the way; the last mean loss."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    parts = load_parts(family, work)
    bank = fill_bank(parts.autoencoder, bank_size, rng)
    log.info("%s: %d pictures encoded", family, bank_size)
    captioner = Captioner(parts.encoders, parts.tokenizer, rng)
    unet = make_unet(family)
    torch.nn.init.zeros_(unet.conv_out.weight)
    unet.to(memory_format=torch.channels_last)
    alphas = make_scheduler().alphas_cumprod
    optimiser = Muon(unet.named_parameters(), rate=_PEAK_RATE, small_rate=1.5e-3, small_names=("conv_in", "conv_out"))
    average = WeightAverage(unet.parameters(), 0.997)
    mean_loss, saved_at = 1.0, time.monotonic()
    for step in range(steps):
        picks = torch.randint(0, bank_size, (_BATCH,))
        condition = captioner.condition([captioner.text_of(bank.scenes[i]) for i in picks.tolist()])
        loss = velocity_loss(unet, alphas, bank.draw(picks), condition)
        optimiser.step(loss, rate_at(step, steps))
        average.update()
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if step % 100 == 0:
            log.info("%s step %d of %d: loss %.4f", family, step, steps, mean_loss)
        if time.monotonic() - saved_at > _CHECKPOINT_S:
            average.exchange()
            _save(family, parts, unet, folder)
            average.exchange()
            saved_at = time.monotonic()
    average.exchange()
    _save(family, parts, unet, folder)
    log.info("%s: loss %.4f after %d steps", family, mean_loss, steps)
    return round(mean_loss, 4)


def _save(family: str, parts: Parts, unet: UNet2DConditionModel, folder: Path) -> None:
    pipeline = assemble(family, parts.autoencoder, parts.encoders, parts.tokenizer, unet)
    save_base(pipeline, folder)
