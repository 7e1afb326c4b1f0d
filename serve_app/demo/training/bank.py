"""Training pictures encoded once: their latents, and what is drawn from them for one step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from serve_app.demo.architectures import TextEncoder, encode_texts
from serve_app.demo.embedded import SIDE_PX
from serve_app.demo.scenes import Scene, caption, render, sample_scenes, unrelated_caption

P_EMPTY = 0.10  # captions dropped, for classifier-free guidance
P_UNRELATED = 0.05  # captions of words that say nothing of the picture
_P_ZEROS = 0.7  # share of dropped captions that SDXL sees as zeros, as its pipeline sends an absent negative prompt


@dataclass(frozen=True, slots=True)
class LatentBank:
    """Scenes and the scaled mean and deviation of their latents, each (n, 4, h, w)."""

    scenes: Sequence[Scene]
    mean: Tensor
    deviation: Tensor

    def draw(self, picks: Tensor) -> Tensor:
        """A fresh sample of the picked latents."""
        mean = self.mean[picks]
        return mean + self.deviation[picks] * torch.randn_like(mean)


@torch.no_grad()
def fill_bank(
    autoencoder: AutoencoderKL,
    count: int,
    rng: random.Random,
    restyle: Callable[[Tensor], Tensor] = lambda pictures: pictures,
) -> LatentBank:
    """Encode scenes, each picture restyled first."""
    scenes = sample_scenes(count, rng)
    posteriors = [
        autoencoder.encode(restyle(render(scenes[i : i + 64], SIDE_PX)) * 2 - 1).latent_dist
        for i in range(0, count, 64)
    ]
    scale = autoencoder.config.scaling_factor
    return LatentBank(
        scenes,
        torch.cat([p.mean for p in posteriors]) * scale,
        torch.cat([p.std for p in posteriors]) * scale,
    )


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The conditions of the UNet: the text's sequence and, for SDXL, its added conditions."""

    sequence: Tensor
    added: dict[str, Tensor] | None


@dataclass(frozen=True, slots=True)
class Captioner:
    """Turns scenes into the UNet's conditioning, as the pipelines do."""

    encoders: list[TextEncoder]
    tokenizer: CLIPTokenizer
    rng: random.Random

    def text_of(self, scene: Scene) -> str:
        """A caption; sometimes empty, sometimes unrelated."""
        draw = self.rng.random()
        if draw < P_EMPTY:
            return ""
        if draw < P_EMPTY + P_UNRELATED:
            return unrelated_caption(self.rng)
        return caption(scene, self.rng)[0]

    def condition(self, texts: list[str]) -> Conditioning:
        """Encode the texts."""
        sequence, pooled = encode_texts(self.encoders, self.tokenizer, texts)
        if pooled is None:
            return Conditioning(sequence, None)
        zeroed = torch.tensor([text == "" and self.rng.random() < _P_ZEROS for text in texts])[:, None]
        sequence, pooled = sequence.masked_fill(zeroed[..., None], 0.0), pooled.masked_fill(zeroed, 0.0)
        return Conditioning(sequence, {"text_embeds": pooled, "time_ids": self._time_ids(len(texts))})

    def _time_ids(self, count: int) -> Tensor:
        """SDXL's sizes and crop: mostly the usual ones, sometimes others, so that none of them matters."""
        rows = [[SIDE_PX, SIDE_PX, 0, 0, SIDE_PX, SIDE_PX] for _ in range(count)]
        for row in rows:
            if self.rng.random() < 0.15:
                sizes = [self.rng.randrange(SIDE_PX // 4, 4 * SIDE_PX) for _ in range(4)]
                row[:] = [*sizes[:2], self.rng.randrange(32), self.rng.randrange(32), *sizes[2:]]
        return torch.tensor(rows)


def velocity_loss(unet: Callable[..., Any], alphas: Tensor, latents: Tensor, condition: Conditioning) -> Tensor:
    """Mean squared error of the predicted velocity (Salimans and Ho 2022) at stratified random times."""
    times = ((torch.rand(len(latents)) + torch.arange(len(latents))) / len(latents) * len(alphas)).long()
    signal = alphas[times].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    predicted = unet(noisy, times, condition.sequence, added_cond_kwargs=condition.added).sample
    return F.mse_loss(predicted, target)
